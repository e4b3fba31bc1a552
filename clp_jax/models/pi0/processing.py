"""From a robot's numbers to a model's inputs, and from the model's actions back to the robot's.

The order is openpi's: the robot's units, delta actions, normalisation, image size, tokens, padding.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from clp_jax.errors import InputError
from clp_jax.models.pi0.architecture import Architecture
from clp_jax.processing import transforms
from clp_jax.processing.norm_stats import By, NormStats
from clp_jax.processing.robots import Robot, to_model_units
from clp_jax.processing.tokenizer import PromptTokenizer

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""openpi's camera names for π0 and π0.5."""


@dataclasses.dataclass(frozen=True)
class Processing:
    """Everything between one robot and one model.

    Attributes:
      robot: the robot.
      architecture: the model, π0 or π0.5.
      norm_stats: of ``state`` and ``actions``, after delta actions.
      tokenizer: of prompts.
      action_horizon: actions of a chunk.
      max_token_len: tokens of a prompt, padding included.
      state_in_prompt: whether the prompt spells the state.
    """

    robot: Robot
    architecture: Architecture
    norm_stats: Mapping[str, NormStats]
    tokenizer: PromptTokenizer
    action_horizon: int
    max_token_len: int
    state_in_prompt: bool

    def __post_init__(self):
        self.robot.check_plain(self.architecture.kind)
        if not self.robot.state and (self.architecture.kind == "pi0" or self.state_in_prompt):
            raise InputError(
                f"robot {self.robot.name!r} has no state, which a π0 reads, and a π0.5 with --state-in-prompt; name "
                "its columns."
            )
        check_fit(self.architecture, self.robot, self.norm_stats, self.tokenizer.vocab_size, quantiles=self.quantiles)

    @property
    def quantiles(self) -> bool:
        """Whether normalisation uses quantiles: for every kind but π0, as in openpi."""
        return self.architecture.kind != "pi0"

    @property
    def normalised_by(self) -> By:
        """As `quantiles`, by name."""
        return "quantiles" if self.quantiles else "deviation"

    @property
    def cameras(self) -> tuple[str, ...]:
        """The model's cameras that the robot has, in the model's order."""
        return tuple(camera for camera in CAMERAS if camera in self.robot.images)

    @property
    def action_dim(self) -> int:
        """Dimensions of the robot's actions; statistics may be padded to the model's."""
        return self.robot.action_dim or len(self.norm_stats["actions"].mean)

    def check_dims(self, state: int, actions: int) -> None:
        """Raise an `InputError` if the model cannot hold so many dimensions.

        A state that is spelled in the prompt and never projected may have any number, as in openpi.
        """
        most = self.architecture.action_dim or 0
        wide = {"state": 0 if self.architecture.kind != "pi0" else state, "actions": actions}
        for name, dims in wide.items():
            if dims > most:
                raise InputError(f"the robot's {name} have {dims} dimensions, the model at most {most}.")

    def prompt_tokens(self, prompt: str, state_dims: int) -> int:
        """Tokens of a prompt before it is cut; a state is counted with three digits a value, the most there are."""
        return len(self.tokenizer.encode(prompt, np.zeros(state_dims) if self.state_in_prompt else None))

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
          images: per camera of `cameras`; uint8, or float in [0, 1]; channels first or last.
          prompt: the instruction.
          actions: the chunk that begins here, for training.

        Returns:
          The keys of `calibration`, without the first axis.
        """
        dim = self.architecture.action_dim
        assert dim is not None
        self.check_dims(len(state), self.action_dim if actions is None else actions.shape[1])
        state, actions = to_normal(self.robot, self.norm_stats, state, actions, quantiles=self.quantiles)
        result = self._images(images)
        ids, mask = self.tokenizer(prompt, self.max_token_len, state if self.state_in_prompt else None)
        result |= {"tokenized_prompt": ids, "tokenized_prompt_mask": mask}
        # Only a π0 reads this array; a wider state, which is spelled alone, is cut to the array that others are given.
        result["state"] = transforms.pad(state, dim)[:dim].astype(np.float32)
        if actions is not None:
            result["actions"] = transforms.pad(actions, dim).astype(np.float32)
        return result

    def outputs(
        self, actions: Float[np.ndarray, "h adim"], *, state: Float[np.ndarray, " d"]
    ) -> Float[np.ndarray, "h rdim"]:
        """The robot's actions from the model's.

        Args:
          actions: of the model, padded and normalised.
          state: of the robot when they were asked for, in its units.
        """
        return from_normal(self.robot, self.norm_stats, actions, state, dim=self.action_dim, quantiles=self.quantiles)

    def note(self, actions: Float[np.ndarray, "h adim"]) -> str | None:
        """Nothing: every sample is an answer."""
        del actions

    def for_augmentation(self) -> "Processing":
        """The same: no image is cropped before."""
        return self

    @property
    def files(self) -> Mapping[str, bytes]:
        """None; PaliGemma's tokenizer is the same for all."""
        return {}

    def _images(self, images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The robot's cameras alone: nothing attends to the black images that openpi masks in place of the others."""
        result: dict[str, np.ndarray] = {}
        for camera in self.cameras:
            result[f"image/{camera}"] = square(images[camera], self.architecture.vision.image_size)
            result[f"image_mask/{camera}"] = np.bool_(1)
        return result


def check_fit(
    architecture: Architecture, robot: Robot, norm_stats: Mapping[str, NormStats], vocab_size: int, *, quantiles: bool
) -> None:
    """Raise an `InputError` unless statistics and tokenizer are such as the model needs."""
    names = ("state", "actions") if robot.state else ("actions",)
    missing = [name for name in names if name not in norm_stats]
    if missing:
        raise InputError(f"the norm stats lack {' and '.join(missing)}; they hold {', '.join(norm_stats)}.")
    if quantiles and any(norm_stats[name].q01 is None for name in names):
        raise InputError(
            f"a {architecture.kind} is normalised with quantiles, which the norm stats lack; run clp norm-stats."
        )
    if vocab_size > architecture.vocab_size:
        raise InputError(f"the tokenizer has {vocab_size} tokens, the model {architecture.vocab_size}.")


def to_normal(
    robot: Robot,
    norm_stats: Mapping[str, NormStats],
    state: Float[np.ndarray, " d"],
    actions: Float[np.ndarray, "h adim"] | None,
    *,
    quantiles: bool,
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "h adim"] | None]:
    """State, if any, and actions as the model knows them: units, relative where the robot says so, normalised."""
    state, actions = to_model_units(robot, state, actions)
    if actions is not None:
        actions = transforms.to_delta(actions, state, robot.delta)
        actions = transforms.normalise(actions, norm_stats["actions"], quantiles=quantiles)
    if robot.state:
        state = transforms.normalise(state, norm_stats["state"], quantiles=quantiles)
    return state, actions


def from_normal(
    robot: Robot,
    norm_stats: Mapping[str, NormStats],
    actions: Float[np.ndarray, "h adim"],
    state: Float[np.ndarray, " d"],
    *,
    dim: int,
    quantiles: bool,
) -> Float[np.ndarray, "h {dim}"]:
    """The inverse of `to_normal` for ``dim`` actions, with the robot's state when they were asked for."""
    state, _ = to_normal(robot, norm_stats, state, None, quantiles=quantiles)
    if robot.state:  # forth and back as in openpi, whose policy knows the state only normalised
        state = transforms.unnormalise(state, norm_stats["state"], quantiles=quantiles)
    actions = transforms.unnormalise(actions, norm_stats["actions"], quantiles=quantiles)
    actions = transforms.to_absolute(actions, state, robot.delta)[:, :dim]
    return transforms.aloha_actions_from_pi(actions) if robot.units == "aloha" else actions


def square(image: Shaped[np.ndarray, "_ _ _"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """An image as uint8 of the model's size, padded with black; from float in [0, 1] or channels first, too."""
    return transforms.resize_with_pad(transforms.parse_image(image), size)
