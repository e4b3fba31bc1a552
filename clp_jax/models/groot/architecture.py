"""Sizes of a GR00T-N1.5: Eagle's image encoder and language model, and the action head's two transformers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from clp_jax.models.family import Remat
from clp_jax.models.layers.lora import Adapters
from clp_jax.models.layers.siglip import SiglipSizes
from clp_jax.models.towers import OfTowers, Tower

Kind = Literal["groot_n15"]

Padding = Literal["flash", "eager"]
"""What attention gives to a token all of whose keys are masked: zero, as flash attention and PyTorch's sdpa do, or the
mean of all values, as transformers' eager attention does."""


@dataclasses.dataclass(frozen=True)
class QwenSizes:
    """Eagle's language model, a Qwen3.

    Attributes:
      width: channels of the residual stream.
      depth: transformer blocks.
      mlp_dim: hidden channels of the gated feed-forward.
      num_heads: query heads.
      num_kv_heads: key and value heads.
      head_dim: channels of a head; heads times channels need not be the width.
      rope_theta: base of the rotary embedding.
      eps: of every RMS norm.
      adapters: LoRA, if there is any.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    eps: float
    adapters: Adapters | None = None


@dataclasses.dataclass(frozen=True)
class AttentionSizes:
    """The transformer between the language model and the action head.

    Attributes:
      width: channels of the residual stream.
      depth: blocks.
      mlp_dim: hidden channels of the feed-forward.
      num_heads: heads; they split the width.
      dropout: share of values that training leaves out.
      final_dropout: whether also at the end of both branches of a block.
      adapters: LoRA, if there is any.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    dropout: float = 0.2
    final_dropout: bool = True
    adapters: Adapters | None = None


@dataclasses.dataclass(frozen=True)
class DitSizes:
    """The diffusion transformer.

    Attributes:
      width: channels of the residual stream.
      depth: blocks; even ones read the context, odd ones their own tokens.
      mlp_dim: hidden channels of the feed-forward.
      num_heads: heads; they split the width.
      output_width: channels of a token that the decoder reads.
      time_channels: sines and cosines that the embedding of time starts from.
      dropout: share of values that training leaves out.
      final_dropout: whether also at the end of both branches of a block.
      adapters: LoRA, if there is any.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    output_width: int
    time_channels: int
    dropout: float = 0.2
    final_dropout: bool = True
    adapters: Adapters | None = None


@dataclasses.dataclass(frozen=True)
class Architecture(OfTowers):
    """A whole model.

    Attributes:
      kind: of the model.
      vision: SigLIP.
      llm: Qwen3.
      vl: self-attention over what the language model gives.
      dit: the diffusion transformer.
      vocab_size: rows of the embedding table.
      image_token: id in whose places the image tokens are put.
      action_dim: dimensions of an action, padding included.
      state_dim: dimensions of the state, padding included.
      hidden_width: hidden channels of the state encoder and of the action decoder.
      embodiments: robots that have weights of their own.
      horizon: actions of a chunk.
      max_seq_len: rows of the actions' position embedding.
      future_tokens: learned tokens between state and actions.
      num_timestep_buckets: steps to which times are rounded.
      noise_s: t = (noise_s - x) / noise_s with x ~ Beta(noise_alpha, 1) in training.
      noise_alpha: see noise_s.
      num_inference_timesteps: Euler steps of sampling.
      cameras: the model's cameras, sorted.
      embodiment: which of them the robot is: a tag of upstream's or a number; None where nothing says it.
      padding: what attention gives to padding tokens of a prompt.
      lm_head: whether the checkpoint also holds the language model's head, which is tied and never used.
      pooling_head: whether the checkpoint also holds the image encoder's pooling head, which is never used.
      dropout: whether training leaves out values at all.
      lora_scale: alpha / rank of adapters; None stands for NVIDIA's, which is 16 / rank.
      dtype: of activations; parameters keep theirs.
      remat: memory of training against time.
    """

    kind: Kind
    vision: SiglipSizes
    llm: QwenSizes
    vl: AttentionSizes
    dit: DitSizes
    vocab_size: int
    image_token: int
    action_dim: int
    state_dim: int
    hidden_width: int
    embodiments: int = 32
    horizon: int = 16
    max_seq_len: int = 1024
    future_tokens: int = 32
    num_timestep_buckets: int = 1000
    noise_s: float = 0.999
    noise_alpha: float = 1.5
    num_inference_timesteps: int = 4
    cameras: tuple[str, ...] = ("ego_view",)
    embodiment: str | None = None
    padding: Padding = "flash"
    lm_head: bool = True
    pooling_head: bool = True
    dropout: bool = True
    lora_scale: float | None = None
    dtype: str = "bfloat16"
    remat: Remat = "all"

    @property
    def towers(self) -> tuple[Tower, ...]:
        """All towers, in data-flow order.

        The language model's last state is normalised, unlike all states before it. The blocks of the diffusion
        transformer alternate between cross- and self-attention.
        """
        return (
            Tower("vision", self.vision.depth, optional=True),
            Tower("llm", self.llm.depth, incomparable=(self.llm.depth,)),
            Tower("vl", self.vl.depth),
            Tower("dit", self.dit.depth, period=2),
        )

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Every tower is a stack of its own."""
        return (("llm",), ("vl",), ("dit",), ("vision",))

    def with_depths(self, depths: Mapping[str, int]) -> "Architecture":
        """The same model at other depths, e.g. after pruning; towers not named keep theirs."""
        resized: dict[str, Any] = {
            name: dataclasses.replace(getattr(self, name), depth=depth) for name, depth in depths.items()
        }
        return dataclasses.replace(self, **resized)


GROOT_N15 = Architecture(
    "groot_n15",
    SiglipSizes(width=1152, depth=27, mlp_dim=4304, num_heads=16, patch_size=14, num_tokens=256),
    QwenSizes(2048, 12, 6144, num_heads=16, num_kv_heads=8, head_dim=128, rope_theta=1e6, eps=1e-6),
    AttentionSizes(2048, 4, 8192, num_heads=32),
    DitSizes(1536, 16, 6144, num_heads=32, output_width=1024, time_channels=256),
    vocab_size=151_680,
    image_token=151_669,
    action_dim=32,
    state_dim=64,
    hidden_width=1024,
)
"""GR00T-N1.5-3B as released: 2.7 B parameters with the tied head counted twice, 2.4 B without."""
