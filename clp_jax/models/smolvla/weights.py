"""The leaves of SmolVLA's two streams: those of even blocks and those of odd ones are stacked apart."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
from jaxtyping import Float

from clp_jax.aliases import AnyArray
from clp_jax.models.smolvla.architecture import Architecture

Weights = Mapping[str, Float[AnyArray, "..."]]
"""The leaves of one block, or of all blocks of one kind on a leading axis."""


class Pair(NamedTuple):
    """One thing for even blocks and one for odd ones."""

    even: Any
    odd: Any


class Streams(NamedTuple):
    """One thing for each stream; None for a stream that does not run."""

    vlm: Any
    action: Any


class BlockStack(nn.Module):
    """The leaves of all blocks of one kind in one stream; axis 0 counts them.

    Attributes:
      rows: number of blocks.
      width: of the stream.
      mlp_dim: hidden channels of the feed-forward.
      query_dim: channels of all query heads.
      kv_dim: channels of all key (or value) heads.
      kv_inputs: channels that keys and values are made of.
    """

    rows: int
    width: int
    mlp_dim: int
    query_dim: int
    kv_dim: int
    kv_inputs: int

    @nn.compact
    def __call__(self) -> dict[str, Float[AnyArray, "..."]]:
        d, f, q, kv = self.width, self.mlp_dim, self.query_dim, self.kv_dim
        kernels = {
            "q_proj": (d, q),
            "k_proj": (self.kv_inputs, kv),
            "v_proj": (self.kv_inputs, kv),
            "o_proj": (q, d),
            "gate_proj": (d, f),
            "up_proj": (d, f),
            "down_proj": (f, d),
        }
        leaves = {}
        for name, (inputs, outputs) in kernels.items():
            init = nn.initializers.normal(stddev=inputs**-0.5)
            leaves[name] = self.param(name, init, (self.rows, inputs, outputs))
        for name in ("input_layernorm", "post_attention_layernorm"):
            leaves[name] = self.param(name, nn.initializers.ones_init(), (self.rows, d))
        return leaves


class Stream(nn.Module):
    """All leaves of one stream: its even blocks, its odd blocks and the norm after the last one.

    Attributes:
      sizes: of the whole model.
      name_of_sizes: "vlm" or "action".
    """

    sizes: Architecture
    name_of_sizes: str

    @nn.compact
    def __call__(self) -> tuple[Pair, Float[AnyArray, " d"]]:
        a, own = self.sizes, getattr(self.sizes, self.name_of_sizes)
        query_dim, kv_dim = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        kinds = []
        for kind, rows in (("even", (own.depth + 1) // 2), ("odd", own.depth // 2)):
            reads_vlm = kind == "odd" and self.name_of_sizes == "action"
            inputs = kv_dim if reads_vlm else own.width
            kinds.append(BlockStack(rows, own.width, own.mlp_dim, query_dim, kv_dim, inputs, name=kind)())
        return Pair(*kinds), self.param("norm", nn.initializers.ones_init(), (own.width,))
