"""From a robot's numbers to a SmolVLA's inputs and back, as lerobot's processors do it."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Shaped

from clp_jax.errors import InputError
from clp_jax.models.smolvla.architecture import Architecture
from clp_jax.models.smolvla.tokenizer import VlmTokenizer
from clp_jax.processing import transforms
from clp_jax.processing.norm_stats import By, NormStats
from clp_jax.processing.robots import Robot

_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class Processing:
    """Everything between one robot and one SmolVLA.

    Prompts are padded to ``max_token_len`` on the right, also where the checkpoint pads to the longest of a batch:
    padding is masked as a key, and positions count valid tokens alone, so that no valid token changes beyond rounding.

    Attributes:
      robot: the robot; its actions are absolute and in its own units.
      architecture: the model.
      norm_stats: of ``state`` and ``actions``.
      tokenizer: of prompts.
      action_horizon: actions of a chunk.
      max_token_len: tokens of a prompt, padding included.
    """

    robot: Robot
    architecture: Architecture
    norm_stats: Mapping[str, NormStats]
    tokenizer: VlmTokenizer
    action_horizon: int
    max_token_len: int

    def __post_init__(self):
        self.robot.check_plain(self.architecture.kind)
        if any(self.robot.delta) or self.robot.units != "own":
            raise InputError(
                f"robot {self.robot.name!r} has delta actions or units of another robot, which a SmolVLA does not "
                "know; leave delta and units out of the robot file."
            )
        if not self.robot.state:
            raise InputError(f"robot {self.robot.name!r} has no state, which a SmolVLA reads; name its columns.")
        missing = [name for name in ("state", "actions") if name not in self.norm_stats]
        if missing:
            raise InputError(f"the norm stats lack {' and '.join(missing)}; they hold {', '.join(self.norm_stats)}.")
        if self.tokenizer.vocab_size > self.architecture.vocab_size:
            raise InputError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model {self.architecture.vocab_size}."
            )

    @property
    def state_in_prompt(self) -> bool:
        """The state is projected; no word spells it."""
        return False

    @property
    def cameras(self) -> tuple[str, ...]:
        """The model's cameras that the robot has, in the model's order."""
        return tuple(camera for camera in self.architecture.cameras if camera in self.robot.images)

    @property
    def action_dim(self) -> int:
        """Dimensions of the robot's actions, which the loss counts."""
        return self.architecture.true_action_dim

    @property
    def normalised_by(self) -> By:
        """Mean and deviation normalise, as in lerobot."""
        return "deviation"

    def check_dims(self, state: int, actions: int) -> None:
        """Raise an `InputError` unless they are what ``config.json`` says: the loss counts its dimensions."""
        a = self.architecture
        for name, dims, known in (("state", state, a.true_state_dim), ("actions", actions, a.true_action_dim)):
            if dims != known:
                raise InputError(
                    f"the robot's {name} have {dims} dimensions, config.json of the checkpoint says {known}; correct "
                    "its input_features or output_features if that is another robot's."
                )

    def prompt_tokens(self, prompt: str, state_dims: int) -> int:
        """Tokens of a prompt before it is cut; it spells no state."""
        del state_dims
        return len(self.tokenizer.encode(prompt))

    def inputs(
        self,
        *,
        state: Float[np.ndarray, " d"],
        images: Mapping[str, Shaped[np.ndarray, "_ _ _"]],
        prompt: str,
        actions: Float[np.ndarray, "h adim"] | None = None,
    ) -> dict[str, np.ndarray]:
        """What the model reads of one observation.

        Args:
          state: of the robot, in its units.
          images: per camera of `cameras`; uint8, or float in [0, 1]; channels first or last. They keep their size: the
            model resizes them, so all observations of a batch need the same size of a camera.
          prompt: the instruction.
          actions: the chunk that begins here, for training.

        Returns:
          The keys of `calibration`, without the first axis.
        """
        a = self.architecture
        ids, mask = self.tokenizer(prompt, self.max_token_len)
        result: dict[str, np.ndarray] = {"tokenized_prompt": ids, "tokenized_prompt_mask": mask}
        for camera in self.cameras:
            result[f"image/{camera}"] = _pixels(images[camera])
            result[f"image_mask/{camera}"] = np.bool_(1)
        result["state"] = transforms.pad(self._normalise(state, "state"), a.state_dim).astype(np.float32)
        if actions is not None:
            result["actions"] = transforms.pad(self._normalise(actions, "actions"), a.action_dim).astype(np.float32)
        return result

    def outputs(
        self, actions: Float[np.ndarray, "h adim"], *, state: Float[np.ndarray, " d"]
    ) -> Float[np.ndarray, "h rdim"]:
        """The robot's actions from the model's.

        Args:
          actions: of the model, padded and normalised.
          state: not needed, actions are absolute.
        """
        del state
        actions = actions[:, : self.action_dim]
        if "actions" in self.architecture.as_they_are:
            return actions
        stats, d = self.norm_stats["actions"], self.action_dim
        return actions * stats.std[:d] + stats.mean[:d]

    def note(self, actions: Float[np.ndarray, "h adim"]) -> str | None:
        """Nothing: every sample is an answer."""
        del actions

    def for_augmentation(self) -> "Processing":
        """The same: no image is cropped before."""
        return self

    @property
    def files(self) -> Mapping[str, bytes]:
        """None; the policy folder has all of them."""
        return {}

    def _normalise(self, x: Float[np.ndarray, "*n d"], name: str) -> Float[np.ndarray, "*n d"]:
        if name in self.architecture.as_they_are:
            return x
        stats, d = self.norm_stats[name], x.shape[-1]
        return (x - stats.mean[:d]) / (stats.std[:d] + _EPSILON)


def _pixels(image: Shaped[np.ndarray, "_ _ _"]) -> np.ndarray:
    """uint8 with channels last. Floats are rounded, so that x / 255 is x again."""
    if np.issubdtype(image.dtype, np.floating):
        image = np.rint(255 * image).astype(np.uint8)
    return transforms.parse_image(image)
