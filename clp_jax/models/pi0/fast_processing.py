"""From a robot's numbers to π0-FAST's inputs, and from the tokens that it writes back to the robot's actions."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, Shaped

from clp_jax.errors import InputError
from clp_jax.models.pi0.architecture import Architecture
from clp_jax.models.pi0.fast_tokenizer import FOLDER, FastTokenizer
from clp_jax.models.pi0.processing import CAMERAS, check_fit, from_normal, square, to_normal
from clp_jax.processing import transforms
from clp_jax.processing.norm_stats import By, NormStats
from clp_jax.processing.robots import Robot

FAST_CAMERAS = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")
"""openpi's camera names for π0-FAST."""

UNREAD_STATE = 32
"""openpi's dimensions of the state that stands beside the prompt, which alone spells it to the model."""


@dataclasses.dataclass(frozen=True)
class FastProcessing:
    """Everything between one robot and one π0-FAST.

    The model's cameras may have the names of π0's, too, as in openpi's LIBERO: their order says where they go, and a
    name with "wrist" that training leaves crop and rotation out. A camera that the robot lacks is black and not
    masked, as openpi has it for this model.

    Attributes:
      robot: the robot.
      architecture: the model.
      norm_stats: of ``state`` and ``actions``, after delta actions, with quantiles.
      tokenizer: of prompts, states and actions.
      action_horizon: actions of a chunk.
      max_token_len: tokens of an observation, padding included: words, state and, in training, actions.
    """

    robot: Robot
    architecture: Architecture
    norm_stats: Mapping[str, NormStats]
    tokenizer: FastTokenizer
    action_horizon: int
    max_token_len: int

    def __post_init__(self):
        self.robot.check_plain(self.architecture.kind)
        if not set(self.robot.images) <= set(self.cameras):
            raise InputError(
                f"robot {self.robot.name!r} has the cameras {', '.join(self.robot.images)}; give them names of "
                f"{', '.join(FAST_CAMERAS)}, or of {', '.join(CAMERAS)}."
            )
        if not self.robot.state:
            raise InputError(f"robot {self.robot.name!r} has no state, which a π0-FAST reads; name its columns.")
        check_fit(self.architecture, self.robot, self.norm_stats, self.tokenizer.vocab_size, quantiles=True)

    @property
    def normalised_by(self) -> By:
        """Quantiles normalise."""
        return "quantiles"

    @property
    def state_in_prompt(self) -> bool:
        """The prompt spells the state."""
        return True

    @property
    def cameras(self) -> tuple[str, ...]:
        """All of the model's cameras, in its order, by the names that the robot uses."""
        return CAMERAS if set(self.robot.images) <= set(CAMERAS) else FAST_CAMERAS

    @property
    def action_dim(self) -> int:
        """Dimensions of the robot's actions."""
        return self.robot.action_dim or len(self.norm_stats["actions"].mean)

    def check_dims(self, state: int, actions: int) -> None:
        """Any number of dimensions can be spelled."""
        del state, actions

    def prompt_tokens(self, prompt: str, state_dims: int) -> int:
        """Tokens of words and state before they are cut; three digits a value, the most there are."""
        return len(self.tokenizer.prefix(prompt, np.zeros(state_dims)))

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
          images: per camera of the robot; uint8, or float in [0, 1]; channels first or last.
          prompt: the instruction.
          actions: the chunk that begins here, for training.

        Returns:
          The keys of `calibration`, without the first axis.
        """
        state, actions = to_normal(self.robot, self.norm_stats, state, actions, quantiles=True)
        tokens = self.tokenizer(prompt, self.max_token_len, state, actions)
        result: dict[str, np.ndarray] = {
            "tokenized_prompt": tokens.ids,
            "tokenized_prompt_mask": tokens.valid,
            "token_ar_mask": tokens.causal,
            "token_loss_mask": tokens.target,
            "state": transforms.pad(state[:UNREAD_STATE], UNREAD_STATE).astype(np.float32),
        }
        size = self.architecture.vision.image_size
        black = np.zeros((size, size, 3), np.uint8)
        for camera in self.cameras:
            result[f"image/{camera}"] = square(images[camera], size) if camera in images else black
            result[f"image_mask/{camera}"] = np.bool_(1)
        return result

    def outputs(self, actions: Int[np.ndarray, " t"], *, state: Float[np.ndarray, " d"]) -> Float[np.ndarray, "h rdim"]:
        """The robot's actions from the tokens that the model wrote.

        Where they spell none, zeros stand for normalised actions, as in openpi, and a warning is logged.

        Args:
          actions: token ids.
          state: of the robot when they were asked for, in its units.
        """
        found = self._decoded(actions)
        if found is None:
            self.tokenizer.warn_of_undecodable()
            found = np.zeros((self.action_horizon, self.action_dim))
        return from_normal(self.robot, self.norm_stats, found, state, dim=self.action_dim, quantiles=True)

    def note(self, actions: Int[np.ndarray, " t"]) -> str | None:
        """What a client must know of an answer: that the model wrote no actions."""
        if self._decoded(actions) is not None:
            return None
        return "the model wrote no actions: zeros, the middle of the range before delta actions, stand for them"

    def for_augmentation(self) -> "FastProcessing":
        """The same: no image is cropped before."""
        return self

    @property
    def files(self) -> Mapping[str, bytes]:
        """The action tokenizer: the model's tokens mean nothing without it."""
        return {f"{FOLDER}/{name}": content for name, content in self.tokenizer.actions.files.items()}

    def _decoded(self, tokens: Int[np.ndarray, " t"]) -> Float[np.ndarray, "h adim"] | None:
        return self.tokenizer.decode(tokens, self.action_horizon, self.action_dim)
