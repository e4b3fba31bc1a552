"""From a robot's numbers to a GR00T-N1.5's inputs and back, as lerobot's and NVIDIA's processors do it."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from clp_jax.errors import InputError
from clp_jax.models.groot.architecture import Architecture
from clp_jax.models.groot.embodiments import number_of
from clp_jax.models.groot.modes import Part, mode, to_model, to_robot
from clp_jax.models.groot.pictures import middle, resized, stretched
from clp_jax.models.groot.rotations import WIDTHS
from clp_jax.models.groot.tokenizer import EagleTokenizer
from clp_jax.processing import transforms
from clp_jax.processing.columns import part
from clp_jax.processing.norm_stats import By, NormStats
from clp_jax.processing.robots import Robot


@dataclasses.dataclass(frozen=True)
class Processing:
    """Everything between one robot and one GR00T-N1.5.

    Prompts are padded to ``max_token_len`` on the left, and the action head does not read the padding: an observation
    is what upstream's policies make of it alone. (In a batch of prompts of several lengths upstream reads its padding.)

    The robot's ``processor`` says whose images and instructions: those of lerobot 0.4, which is what None stands for,
    show the whole image, resampled bicubically, and write the instruction as a list of Python; those of Isaac-GR00T
    show the middle 95 %, resampled bilinearly, and write the instruction as it is.

    Attributes:
      robot: the robot; its actions are absolute and in its own units.
      architecture: the model, with the robot's embodiment.
      norm_stats: of ``state`` and ``actions``, with their extremes.
      tokenizer: of prompts.
      action_horizon: actions of a chunk.
      max_token_len: tokens of a prompt, images and padding included.
      whole: whether images are not cropped, because augmentation will choose the crop.
    """

    robot: Robot
    architecture: Architecture
    norm_stats: Mapping[str, NormStats]
    tokenizer: EagleTokenizer
    action_horizon: int
    max_token_len: int
    whole: bool = False

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
        for name, parts in self._parts.items():
            for lacking in filter(None, (one.mode.lacks(self.norm_stats[name]) for one in parts)):
                raise InputError(
                    f"the norm stats lack {lacking} of {name}, which normalise for a GR00T-N1.5; run clp norm-stats."
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
        """Dimensions of the robot's actions."""
        return len(self.norm_stats["actions"].mean)

    @property
    def normalised_by(self) -> By:
        """The extremes normalise, unless the robot says otherwise of its parts."""
        return "range"

    def for_augmentation(self) -> "Processing":
        """The same with whole images, of which augmentation chooses a part."""
        return dataclasses.replace(self, whole=True)

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
            if self._seen(name) > most[name]:
                raise InputError(
                    f"the robot's {name} have {self._seen(name)} dimensions, the model at most {most[name]}."
                )

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
            f"image/{camera}": self._picture(transforms.parse_image(images[camera])) for camera in self.cameras
        }
        result |= {"tokenized_prompt": ids, "tokenized_prompt_mask": mask, "context_mask": mask}
        result["embodiment_id"] = np.int32(number_of(a.embodiment, a.embodiments))
        result["state"] = self._to_model("state", state, a.state_dim)
        if actions is not None:
            result["actions"] = self._to_model("actions", actions, a.action_dim)
            counted = np.arange(a.action_dim) < self._seen("actions")
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
        return to_robot(actions[:, : self._seen("actions")], self._parts["actions"], self.norm_stats["actions"])

    def note(self, actions: Float[np.ndarray, "h adim"]) -> str | None:
        """Nothing: every sample is an answer."""
        del actions

    @property
    def files(self) -> Mapping[str, bytes]:
        """None; the folder of the checkpoint has all of them."""
        return {}

    @property
    def _isaac(self) -> bool:
        return self.robot.processor == "isaac"

    def _picture(self, image: UInt8[np.ndarray, "_ _ 3"]) -> UInt8[np.ndarray, "size size 3"]:
        size = self.architecture.vision.image_size
        if not self._isaac:
            return stretched(image, size)
        return resized(image if self.whole else middle(image), size)

    def _tokens(self, prompt: str) -> tuple[np.ndarray, np.ndarray]:
        return self.tokenizer(
            prompt,
            self.max_token_len,
            images=len(self.cameras),
            tokens_per_image=self.architecture.vision.num_tokens,
            plain=self._isaac,
        )

    @functools.cached_property
    def _parts(self) -> dict[str, tuple[Part, ...]]:
        """The parts of ``state`` and ``actions``, each with its mode; one of all where the robot says nothing."""
        robot = self.robot
        said = {"state": (robot.state, robot.state_modes), "actions": (robot.actions, robot.action_modes)}
        return {vector: self._modes_of(vector, *texts) for vector, texts in said.items()}

    def _modes_of(self, vector: str, texts: Sequence[str], modes: Sequence[str]) -> tuple[Part, ...]:
        dims = len(self.norm_stats[vector].mean)
        if not modes:
            return (Part(dims, mode("min_max")),)
        if len(modes) != len(texts):
            raise InputError(
                f"the {vector} of robot {self.robot.name!r} have {len(texts)} parts and {len(modes)} modes; give one "
                "for each part."
            )
        widths = [part(text).width_in(self.robot.widths) for text in texts]
        found = [mode(text) for text in modes]
        for text, width, one in zip(texts, widths, found, strict=True):
            if width is None or one.source == "":
                raise InputError(
                    f"nothing says how many dimensions {text} of robot {self.robot.name!r} has, or which rotation it "
                    "is; the meta/modality.json of a data set does, or the metadata.json of a checkpoint."
                )
            if one.target is not None and width != WIDTHS[one.source or one.target]:
                raise InputError(f"{text} has {width} dimensions, a rotation by {one.source} {WIDTHS[one.source]}.")
            if one.scaling == "sin_cos" and vector == "actions":
                raise InputError(f"{text} of the actions has mode sin_cos, from which no action can be made.")
        if sum(filter(None, widths)) != dims:
            raise InputError(
                f"the statistics have {dims} dimensions of {vector}, the parts of robot {self.robot.name!r} "
                f"{sum(filter(None, widths))}; give those of the same parts in the same order with --norm-stats."
            )
        return tuple(Part(width, one) for width, one in zip(widths, found, strict=True) if width is not None)

    def _seen(self, vector: str) -> int:
        """Dimensions that the model sees of ``state`` or ``actions``."""
        return sum(one.mode.width(one.dims) for one in self._parts[vector])

    def _to_model(self, vector: str, x: Float[np.ndarray, "*n d"], dim: int) -> Float[np.ndarray, "*n e"]:
        return transforms.pad(to_model(x, self._parts[vector], self.norm_stats[vector]), dim)
