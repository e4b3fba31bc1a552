"""Sizes of a π0-family model, read from the shapes in its parameter tree.

A checkpoint knows its own width, depth, heads and LoRA ranks, so no configuration class has to be kept in step with it:
tiny, full-size and pruned models are the same code. Only what shapes cannot tell (activation dtype, LoRA scale) is
given.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from clp_jax.aliases import Tree
from clp_jax.errors import InputError
from clp_jax.models.family import Remat
from clp_jax.models.layers.siglip import SiglipSizes
from clp_jax.models.towers import OfTowers, Tower
from clp_jax.trees import flatten

Kind = Literal["pi0", "pi05", "pi0_fast"]

_LAYERS = "PaliGemma/llm/layers"
_ENCODER = "PaliGemma/img/Transformer/encoderblock"


@dataclasses.dataclass(frozen=True)
class GemmaSizes:
    """One Gemma expert of the language stack.

    Attributes:
      width: channels of the residual stream.
      depth: transformer blocks.
      mlp_dim: hidden channels of the gated feed-forward.
      num_heads: query heads.
      num_kv_heads: key and value heads; equal to ``num_heads`` means one fused ``qkv_einsum``.
      head_dim: channels of a head.
      attn_lora_rank: rank of the adapters on the attention einsums, 0 without.
      ffn_lora_rank: rank of the adapters on the feed-forward, 0 without.
      lora_scale: alpha / rank of the attention adapters (openpi applies no scale in the feed-forward).
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attn_lora_rank: int = 0
    ffn_lora_rank: int = 0
    lora_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Architecture(OfTowers):
    """A whole model.

    Attributes:
      kind: ``pi0``, ``pi05`` (adaRMS, state in the prompt) or ``pi0_fast`` (autoregressive, one expert).
      vision: SigLIP.
      vlm: Gemma expert 0.
      action: Gemma expert 1; None for ``pi0_fast``.
      vocab_size: rows of the embedding table.
      action_dim: dimensions of an action and of the state; None for ``pi0_fast``, whose actions are tokens.
      dtype: activation dtype, openpi's ``config.dtype``. Parameters keep their own dtype.
      remat: memory of training against time; openpi's is "all".
      skip_dead: in the last block of π0 and π0.5, run the VLM only as far as its keys and values, all that reaches the
        actions. Neither actions nor gradients depend on it. None: where it saves time.
    """

    kind: Kind
    vision: SiglipSizes
    vlm: GemmaSizes
    action: GemmaSizes | None
    vocab_size: int
    action_dim: int | None
    dtype: str = "bfloat16"
    remat: Remat = "all"
    skip_dead: bool | None = None

    @property
    def experts(self) -> tuple[GemmaSizes, ...]:
        """The Gemma experts that share the scanned stack."""
        return (self.vlm,) if self.action is None else (self.vlm, self.action)

    @property
    def towers(self) -> tuple[Tower, ...]:
        """All towers; where there is an action expert, nothing reads the VLM stream after its last block.

        That block reaches the actions only as keys and values.
        """
        last = () if self.action is None else (self.vlm.depth,)
        towers = (
            Tower("vision", self.vision.depth, optional=True),
            Tower("vlm", self.vlm.depth, incomparable=last),
        )
        return towers if self.action is None else (*towers, Tower("action", self.action.depth))

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The VLM and the action expert share one scanned stack and therefore keep the same blocks."""
        return (("vlm",) if self.action is None else ("vlm", "action"), ("vision",))

    def with_depths(self, depths: Mapping[str, int]) -> "Architecture":
        """The same model at other depths, e.g. after pruning; towers not named keep theirs."""
        resized: dict[str, Any] = {
            name: dataclasses.replace(getattr(self, name), depth=d) for name, d in depths.items()
        }
        return dataclasses.replace(self, **resized)


def architecture_of_tree(tree: Tree, *, dtype: str = "bfloat16", lora_scale: float = 1.0) -> Architecture:
    """The sizes that the shapes of a tree tell; see the family's ``architecture_of``."""
    shapes = {name: tuple(leaf.shape) for name, leaf in flatten(tree).items()}
    kind = _kind(shapes)
    vlm = _gemma(shapes, "", lora_scale)
    action = None if kind == "pi0_fast" else _gemma(shapes, "_1", lora_scale)
    if action is not None and action.depth != vlm.depth:
        raise InputError(f"the experts of one stack have different depths {sorted((vlm.depth, action.depth))}.")
    return Architecture(
        kind=kind,
        vision=_siglip(shapes),
        vlm=vlm,
        action=action,
        vocab_size=_shape(shapes, "PaliGemma/llm/embedder/input_embedding", 2)[0],
        action_dim=None if kind == "pi0_fast" else _shape(shapes, "action_in_proj/kernel", 2)[0],
        dtype=dtype,
    )


def is_pi0(tree: Tree) -> bool:
    """Whether a tree has openpi's names."""
    return "PaliGemma" in tree


def _kind(shapes: Mapping[str, tuple[int, ...]]) -> Kind:
    if not any(name.startswith("PaliGemma/") for name in shapes):
        raise InputError(
            "this is not a π0-family checkpoint: no parameter is named PaliGemma/...; "
            f"it holds {', '.join(sorted(shapes)[:3]) or 'nothing'}. Give an openpi π0, π0.5 or π0-FAST checkpoint."
        )
    if "action_in_proj/kernel" not in shapes:
        return "pi0_fast"
    return "pi05" if "time_mlp_in/kernel" in shapes else "pi0"


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, ndim: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None or len(shape) != ndim:
        found = "is missing" if shape is None else f"has shape {shape}"
        raise InputError(f"not a π0-family parameter tree: {name} {found}, expected {ndim} axes.")
    return shape


def _gemma(shapes: Mapping[str, tuple[int, ...]], suffix: str, lora_scale: float) -> GemmaSizes:
    attn, mlp = f"{_LAYERS}/attn", f"{_LAYERS}/mlp{suffix}"
    depth, num_heads, head_dim, width = _shape(shapes, f"{attn}/attn_vec_einsum{suffix}/w", 4)
    fused = f"{attn}/qkv_einsum{suffix}/w" in shapes
    num_kv_heads = num_heads if fused else _shape(shapes, f"{attn}/kv_einsum{suffix}/w", 5)[2]
    attn_lora = shapes.get(f"{attn}/attn_vec_einsum{suffix}/lora_a", (0,))[-1]
    ffn_lora = shapes.get(f"{mlp}/linear_lora_a", (0,))[-1]
    mlp_dim = _shape(shapes, f"{mlp}/linear", 3)[1]
    return GemmaSizes(width, depth, mlp_dim, num_heads, num_kv_heads, head_dim, attn_lora, ffn_lora, lora_scale)


def _siglip(shapes: Mapping[str, tuple[int, ...]]) -> SiglipSizes:
    depth, width, num_heads, _ = _shape(shapes, f"{_ENCODER}/MultiHeadDotProductAttention_0/query/kernel", 4)
    patch_size = _shape(shapes, "PaliGemma/img/embedding/kernel", 4)[0]
    num_tokens = _shape(shapes, "PaliGemma/img/pos_embedding", 3)[1]
    if math.isqrt(num_tokens) ** 2 != num_tokens:
        raise InputError(f"PaliGemma/img/pos_embedding holds {num_tokens} tokens, which is not a square image.")
    mlp_dim = _shape(shapes, f"{_ENCODER}/MlpBlock_0/Dense_0/kernel", 3)[2]
    return SiglipSizes(width, depth, mlp_dim, num_heads, patch_size, num_tokens)


_SO400M = SiglipSizes(width=1152, depth=27, mlp_dim=4304, num_heads=16, patch_size=14, num_tokens=256)
_GEMMA_2B = GemmaSizes(width=2048, depth=18, mlp_dim=16_384, num_heads=8, num_kv_heads=1, head_dim=256)
_GEMMA_300M = GemmaSizes(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256)

PI0 = Architecture("pi0", _SO400M, _GEMMA_2B, _GEMMA_300M, vocab_size=257_152, action_dim=32)
"""π0 as released: 3.2 B parameters."""

PI05 = dataclasses.replace(PI0, kind="pi05")
"""π0.5 as released: 3.4 B parameters."""

PI0_FAST = dataclasses.replace(PI0, kind="pi0_fast", action=None, action_dim=None)
"""π0-FAST as released: 2.9 B parameters."""
