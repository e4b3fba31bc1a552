"""From a robot's numbers to a GR00T-N1.5's inputs and back, as lerobot's and NVIDIA's processors do it."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from clp_jax.errors import InputError
from clp_jax.models.groot.architecture import Architecture
from clp_jax.models.groot.embodiments import number_of
from clp_jax.models.groot.tokenizer import EagleTokenizer
from clp_jax.processing import transforms
from clp_jax.processing.norm_stats import By, NormStats
from clp_jax.processing.robots import Robot


@dataclasses.dataclass(frozen=True)
class Processing:
    """Everything between one robot and one GR00T-N1.5.

    Prompts are padded to ``max_token_len`` on the left, and the action head does not read the padding: an observation
    is what upstream's policies make of it alone. (In a batch of prompts of several lengths upstream reads its padding.)

    Attributes:
      robot: the robot; its actions are absolute and in its own units.
      architecture: the model, with the robot's embodiment.
      norm_stats: of ``state`` and ``actions``, with their extremes.
      tokenizer: of prompts.
      action_horizon: actions of a chunk.
      max_token_len: tokens of a prompt, images and padding included.
    """

    robot: Robot
    architecture: Architecture
    norm_stats: Mapping[str, NormStats]
    tokenizer: EagleTokenizer
    action_horizon: int
    max_token_len: int

    def __post_init__(self):
        if any(self.robot.delta) or self.robot.units != "own":
            raise InputError(
                f"robot {self.robot.name!r} has delta actions or units of another robot, which a GR00T-N1.5 does not "
                "know; leave delta and units out of the robot file."
            )
        number_of(self.architecture.embodiment, self.architecture.embodiments)
        for name in ("state", "actions"):
            if name not in self.norm_stats:
                raise InputError(f"the norm stats lack {name}; they hold {', '.join(self.norm_stats)}.")
            if self.norm_stats[name].min is None:
                raise InputError(
                    f"the norm stats lack min and max of {name}, which normalise for a GR00T-N1.5; run clp norm-stats."
                )
        if self.tokenizer.image_token != self.architecture.image_token:
            raise InputError(
                f"images have token {self.tokenizer.image_token} in the tokenizer and {self.architecture.image_token} "
                "in the model; give the tokenizer that belongs to it."
            )
        if self.tokenizer.vocab_size > self.architecture.vocab_size:
            raise InputError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model {self.architecture.vocab_size}."
            )

    @property
    def state_in_prompt(self) -> bool:
        """The state is encoded; no word spells it."""
        return False

    @property
    def cameras(self) -> tuple[str, ...]:
        """The robot's cameras in the order of the prompt: sorted by name."""
        return tuple(sorted(self.robot.images))

    @property
    def action_dim(self) -> int:
        """Dimensions of the robot's actions, which the loss counts."""
        return len(self.norm_stats["actions"].mean)

    @property
    def normalised_by(self) -> By:
        """The extremes normalise."""
        return "range"

    def check_dims(self, state: int, actions: int) -> None:
        """Raise an `InputError` unless they are those of the statistics and the model can hold them."""
        most = {"state": self.architecture.state_dim, "actions": self.architecture.action_dim}
        for name, dims in (("state", state), ("actions", actions)):
            known = len(self.norm_stats[name].mean)
            if dims != known:
                raise InputError(
                    f"the robot's {name} have {dims} dimensions, the statistics {known}; choose the same parts of the "
                    "columns in the same order, or give other statistics with --norm-stats."
                )
            if dims > most[name]:
                raise InputError(f"the robot's {name} have {dims} dimensions, the model at most {most[name]}.")

    def prompt_tokens(self, prompt: str, state_dims: int) -> int:
        """Tokens of images and prompt; raises an `InputError` where they are too many, for nothing is ever cut."""
        del state_dims
        return int(self._tokens(prompt)[1].sum())

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
          actions: the chunk that begins here, for training; held at its last where the episode ends, which counts.

        Returns:
          The keys of `calibration`, without the first axis.
        """
        a = self.architecture
        ids, mask = self._tokens(prompt)
        result: dict[str, np.ndarray] = {
            f"image/{camera}": stretched(transforms.parse_image(images[camera]), a.vision.image_size)
            for camera in self.cameras
        }
        result |= {"tokenized_prompt": ids, "tokenized_prompt_mask": mask, "context_mask": mask}
        result["embodiment_id"] = np.int32(number_of(a.embodiment, a.embodiments))
        result["state"] = transforms.pad(normalise(state, self.norm_stats["state"]), a.state_dim)
        if actions is not None:
            result["actions"] = transforms.pad(normalise(actions, self.norm_stats["actions"]), a.action_dim)
            counted = np.arange(a.action_dim) < self.action_dim
            result["action_mask"] = np.broadcast_to(counted, result["actions"].shape).copy()
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
        return unnormalise(actions[:, : self.action_dim], self.norm_stats["actions"])

    def note(self, actions: Float[np.ndarray, "h adim"]) -> str | None:
        """Nothing: every sample is an answer."""
        del actions

    @property
    def files(self) -> Mapping[str, bytes]:
        """None; the folder of the checkpoint has all of them."""
        return {}

    def _tokens(self, prompt: str) -> tuple[np.ndarray, np.ndarray]:
        return self.tokenizer(
            prompt,
            self.max_token_len,
            images=len(self.cameras),
            tokens_per_image=self.architecture.vision.num_tokens,
        )


def normalise(x: Float[np.ndarray, "*n d"], stats: NormStats) -> Float[np.ndarray, "*n d"]:
    """The data's smallest value at -1 and the largest at 1, in float32 as upstream; beyond them nothing is clipped.

    A dimension in which the data never change becomes 0.

    >>> low, high = np.zeros(2), np.array([2.0, 0.0])
    >>> normalise(np.array([3.0, 7.0]), NormStats(low, high, min=low, max=high)).tolist()
    [2.0, 0.0]
    """
    low, width = _range(stats)
    scaled = 2 * (x.astype(np.float32) - low) / np.where(width == 0, np.float32(1), width) - 1
    return np.where(width == 0, np.float32(0), scaled)


def unnormalise(x: Float[np.ndarray, "*n d"], stats: NormStats) -> Float[np.ndarray, "*n d"]:
    """The inverse of `normalise`; a dimension that never changes has its one value."""
    low, width = _range(stats)
    return (x.astype(np.float32) + 1) * np.float32(0.5) * width + low


def stretched(image: UInt8[np.ndarray, "_ _ 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The whole image in a square, whatever its shape, as one tile of Eagle's image processor; resampling is bicubic.

    Upstream's library rounds after each direction and begins with the width; new releases of Pillow begin with the
    cheaper one, so each is asked for by itself. Pillow's weights are finer: values differ by one, rarely by two.
    """
    from PIL import Image

    if image.shape[:2] == (size, size):
        return image
    wide = Image.fromarray(image).resize((size, image.shape[0]), resample=Image.Resampling.BICUBIC)
    return np.asarray(wide.resize((size, size), resample=Image.Resampling.BICUBIC))


def _range(stats: NormStats) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """Smallest values and widths in float32."""
    assert stats.min is not None
    assert stats.max is not None
    low = stats.min.astype(np.float32)
    return low, stats.max.astype(np.float32) - low
