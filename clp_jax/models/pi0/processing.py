"""From a robot's numbers to a model's inputs, and from the model's actions back to the robot's.

The order is openpi's: the robot's units, delta actions, normalisation, image size, tokens, padding.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Shaped

from clp_jax.errors import InputError
from clp_jax.models.pi0.architecture import Architecture
from clp_jax.processing import transforms
from clp_jax.processing.norm_stats import NormStats
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
        if self.architecture.kind == "pi0_fast":
            raise InputError(
                "π0-FAST writes actions as tokens with a processor that clp_jax does not carry; give a .npz of "
                "model-ready observations."
            )
        if not self.robot.state and (self.architecture.kind == "pi0" or self.state_in_prompt):
            raise InputError(
                f"robot {self.robot.name!r} has no state, which a π0 reads, and a π0.5 with --state-in-prompt; name "
                "its columns."
            )
        names = self._normalised
        missing = [name for name in names if name not in self.norm_stats]
        if missing:
            raise InputError(f"the norm stats lack {' and '.join(missing)}; they hold {', '.join(self.norm_stats)}.")
        if self.quantiles and any(self.norm_stats[name].q01 is None for name in names):
            raise InputError("π0.5 is normalised with quantiles, which the norm stats lack; run clp norm-stats.")
        if self.tokenizer.vocab_size > self.architecture.vocab_size:
            raise InputError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model {self.architecture.vocab_size}."
            )

    @property
    def _normalised(self) -> tuple[str, ...]:
        """What has statistics: a robot may be without state."""
        return ("state", "actions") if self.robot.state else ("actions",)

    @property
    def quantiles(self) -> bool:
        """Whether normalisation uses quantiles: for every kind but π0, as in openpi."""
        return self.architecture.kind != "pi0"

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
        robot, dim = self.robot, self.architecture.action_dim
        assert dim is not None
        self.check_dims(len(state), self.action_dim if actions is None else actions.shape[1])
        state, actions = to_model_units(robot, state, actions)
        if actions is not None:
            actions = transforms.to_delta(actions, state, robot.delta)
        if self.robot.state:
            state = transforms.normalise(state, self.norm_stats["state"], quantiles=self.quantiles)
        result = self._images(images)
        ids, mask = self.tokenizer(prompt, self.max_token_len, state if self.state_in_prompt else None)
        result |= {"tokenized_prompt": ids, "tokenized_prompt_mask": mask}
        # Only a π0 reads this array; a wider state, which is spelled alone, is cut to the array that others are given.
        result["state"] = transforms.pad(state, dim)[:dim].astype(np.float32)
        if actions is not None:
            actions = transforms.normalise(actions, self.norm_stats["actions"], quantiles=self.quantiles)
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
        quantiles = self.quantiles
        pi_state, _ = to_model_units(self.robot, state)
        if self.robot.state:  # forth and back as in openpi, whose policy knows the state only normalised
            normal = transforms.normalise(pi_state, self.norm_stats["state"], quantiles=quantiles)
            pi_state = transforms.unnormalise(normal, self.norm_stats["state"], quantiles=quantiles)
        actions = transforms.unnormalise(actions, self.norm_stats["actions"], quantiles=quantiles)
        actions = transforms.to_absolute(actions, pi_state, self.robot.delta)[:, : self.action_dim]
        return transforms.aloha_actions_from_pi(actions) if self.robot.units == "aloha" else actions

    def _images(self, images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The robot's cameras alone: nothing attends to the black images that openpi masks in place of the others."""
        size = self.architecture.vision.image_size
        result: dict[str, np.ndarray] = {}
        for camera in self.cameras:
            image = transforms.parse_image(images[camera])
            result[f"image/{camera}"] = transforms.resize_with_pad(image, size)
            result[f"image_mask/{camera}"] = np.bool_(1)
        return result
