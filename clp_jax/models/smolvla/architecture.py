"""Sizes of a SmolVLA, and the settings of lerobot that change what it computes or how it is trained."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from clp_jax.models.family import Remat
from clp_jax.models.layers.siglip import SiglipSizes
from clp_jax.models.towers import OfTowers, Tower

EMPTY_CAMERA = "observation.images.empty_camera_{i}"
"""lerobot's names for cameras that no robot has; a policy with ``empty_cameras`` lists them among its inputs."""


@dataclasses.dataclass(frozen=True)
class LlamaSizes:
    """One stream of Llama blocks: channels, blocks, feed-forward."""

    width: int
    depth: int
    mlp_dim: int


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How lerobot trains the policy.

    Attributes:
      freeze_vision_encoder: the image encoder is not trained.
      train_expert_only: nothing of the vision-language model is trained.
      train_state_proj: the projection of the state is trained.
      lr: peak of the learning rate.
      betas: of AdamW.
      eps: of AdamW.
      weight_decay: of AdamW, on all parameters.
      clip_norm: largest global norm of the gradient.
      warmup_steps: of a run with at least ``decay_steps`` steps.
      decay_steps: length of the cosine.
      end_lr: learning rate after the cosine.
    """

    freeze_vision_encoder: bool = True
    train_expert_only: bool = True
    train_state_proj: bool = True
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-10
    clip_norm: float = 10.0
    warmup_steps: int = 1_000
    decay_steps: int = 30_000
    end_lr: float = 2.5e-6


@dataclasses.dataclass(frozen=True)
class Architecture(OfTowers):
    """A whole model.

    Attributes:
      vision: SigLIP.
      scale_factor: the connector folds so many image tokens of each direction into one.
      vlm: the language model's blocks.
      action: the action expert's blocks, as many as the language model's.
      num_heads: query heads, of both streams.
      num_kv_heads: key and value heads, of both streams.
      head_dim: channels of a head.
      rms_eps: epsilon of the RMS norms.
      vocab_size: rows of the embedding table.
      action_dim: dimensions of an action, padded.
      state_dim: dimensions of the state, padded.
      true_action_dim: dimensions of the robot's actions, which the loss counts.
      true_state_dim: dimensions of the robot's state.
      cameras: lerobot's keys of the images, in the order in which the model reads them.
      camera_sizes: height and width of the images of each camera, the encoder's if they are not told.
      robot_keys: the model's inputs that the policy's preprocessor gets by renaming, each with the robot's key.
      as_they_are: which of ``state`` and ``actions`` are not normalised.
      chunk_size: actions of a chunk.
      n_action_steps: actions of a chunk that are executed.
      tokenizer_max_length: longest prompt in tokens.
      pad_language_to: "longest" of a batch or "max_length".
      num_steps: Euler steps of sampling.
      empty_cameras: at most so many missing cameras keep their place in the prefix, masked.
      prefix_length: shorter prefixes are padded to it.
      image_tokens: ids of the tokens (fake image, global image) around every image; None without them.
      min_period: shortest period of the time embedding.
      max_period: longest period of the time embedding.
      training: lerobot's settings of training.
      dtype: of activations; "bfloat16" leaves the projections of state, actions and time, and what the expert's odd
        blocks make of the VLM's keys and values, in float32, as lerobot does.
      remat: memory of training against time.
      kind: always "smolvla".
    """

    vision: SiglipSizes
    scale_factor: int
    vlm: LlamaSizes
    action: LlamaSizes
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    vocab_size: int
    action_dim: int
    state_dim: int
    true_action_dim: int
    true_state_dim: int
    cameras: tuple[str, ...]
    camera_sizes: tuple[tuple[int, int], ...] = ()
    robot_keys: tuple[tuple[str, str], ...] = ()
    as_they_are: tuple[str, ...] = ()
    chunk_size: int = 50
    n_action_steps: int = 50
    tokenizer_max_length: int = 48
    pad_language_to: str = "longest"
    num_steps: int = 10
    empty_cameras: int = 0
    prefix_length: int = -1
    image_tokens: tuple[int, int] | None = None
    min_period: float = 4e-3
    max_period: float = 4.0
    training: TrainingSettings = TrainingSettings()
    dtype: str = "bfloat16"
    remat: Remat = "all"
    kind: Literal["smolvla"] = "smolvla"

    @property
    def towers(self) -> tuple[Tower, ...]:
        """All towers. Even blocks attend jointly, odd ones let the expert read the VLM: kept blocks alternate so too.

        The VLM stream after its last block reaches the actions only as keys and values: nothing reads it there.
        """
        return (
            Tower("vision", self.vision.depth, optional=True),
            Tower("vlm", self.vlm.depth, period=2, incomparable=(self.vlm.depth,)),
            Tower("action", self.action.depth, period=2),
        )

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Block i of the expert reads block i of the VLM: they keep the same blocks."""
        return (("vlm", "action"), ("vision",))

    @property
    def tokens_per_image(self) -> int:
        """Tokens of an image in the prefix, without those around it."""
        return self.vision.num_tokens // self.scale_factor**2

    def with_depths(self, depths: Mapping[str, int]) -> "Architecture":
        """The same model at other depths, e.g. after pruning; towers not named keep theirs."""
        resized: dict[str, Any] = {
            name: dataclasses.replace(getattr(self, name), depth=d) for name, d in depths.items()
        }
        return dataclasses.replace(self, **resized)


SMOLVLA = Architecture(
    vision=SiglipSizes(width=768, depth=12, mlp_dim=3072, num_heads=12, patch_size=16, num_tokens=1024),
    scale_factor=4,
    vlm=LlamaSizes(width=960, depth=16, mlp_dim=2560),
    action=LlamaSizes(width=720, depth=16, mlp_dim=2048),
    num_heads=15,
    num_kv_heads=5,
    head_dim=64,
    rms_eps=1e-5,
    vocab_size=49_280,
    action_dim=32,
    state_dim=32,
    true_action_dim=6,
    true_state_dim=6,
    cameras=tuple(f"observation.images.camera{i}" for i in (1, 2, 3)),
)
"""SmolVLA as released, on the SmolVLM2 of 500 M parameters, for a robot of six joints: 450 M parameters."""
