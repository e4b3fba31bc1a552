"""Attention and feed-forward of the action head's transformers, and the one that refines the language model's output.

Axis legend of the einsums:
  B batch   T query tokens   S key tokens   N heads   H head dim

Upstream has no mask here: padding tokens of the prompt are read like any other. A mask leaves them out, as if an
observation had been alone, where nothing is padded.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, UInt32

from clp_jax.aliases import AnyArray, Array
from clp_jax.models.groot.architecture import Adapters, AttentionSizes
from clp_jax.models.groot.dropout import Site, block_keys, dropped
from clp_jax.models.groot.lora import AdaptedDense
from clp_jax.models.layers.gating import gated, repeated
from clp_jax.models.layers.scan import Rows, pinned, rematerialised
from clp_jax.models.towers import Capture, Write

KeysValues = tuple[Float[Array, "*_l _c _s n h"], Float[Array, "*_l _c _s n h"]]
"""What queries read."""


class Captured(NamedTuple):
    """Of one tower: its states [depth + 1, b, s, d] and its `TowerStates.writes`."""

    states: Float[Array, "l b s d"]
    writes: Mapping[str, Write]


BLOCK_EPS = 1e-5
"""Of the layer norms in blocks and before them."""

_TOWER = 0
"""Of the random numbers, other than the diffusion transformer's."""

norm = partial(nn.LayerNorm, use_fast_variance=False)
"""Layer norm whose variance is that of the centred values, as PyTorch computes it."""


class Attention(nn.Module):
    """Attention of all tokens to all; keys and values come from the same tokens or from others.

    Other tokens may have fewer rows than the queries: each row then serves several neighbouring rows of queries.
    """

    width: int
    num_heads: int
    dtype: str
    adapters: Adapters | None = None

    def setup(self) -> None:
        self.q, self.k, self.v = (AdaptedDense(self.width, self.dtype, self.adapters) for _ in range(3))
        self.out = nn.Dense(self.width, dtype=self.dtype)

    def keys_values(self, x: Float[Array, "b s d"], keys: Any = None) -> KeysValues:
        """Keys and values of tokens; ``keys`` are those of the adapters' dropout [b], None for none."""
        return self._heads(self.k(x, keys, Site.KEY)), self._heads(self.v(x, keys, Site.VALUE))

    def __call__(
        self, x: Float[Array, "b s d"], seen: KeysValues, mask: Bool[Array, "_c t"] | None = None, keys: Any = None
    ) -> Float[Array, "b s d"]:
        """What the heads read for the tokens.

        Args:
          x: the tokens that read.
          seen: what they read.
          mask: True for keys that are read; all are if None.
          keys: of the adapters' dropout [b]; nothing is left out if None.
        """
        q = self._heads(self.q(x, keys, Site.QUERY))
        read_keys, values = (repeated(y, x.shape[0]) for y in seen)
        scale = (self.width // self.num_heads) ** -0.5
        logits = jnp.einsum("BTNH,BSNH->BNTS", q, read_keys, preferred_element_type=jnp.float32) * scale
        if mask is not None:
            read = repeated(mask, x.shape[0])[:, None, None, :]
            logits = jnp.where(read, logits, jnp.finfo(logits.dtype).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
        return jnp.einsum("BNTS,BSNH->BTNH", weights, values).reshape(*x.shape[:2], -1)

    def write(self, read: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """What is added to the stream."""
        return self.out(read)

    def _heads(self, x: Float[Array, "b s d"]) -> Float[Array, "b s n h"]:
        return x.reshape(*x.shape[:2], self.num_heads, -1)


def branch_ends(sizes: Any, *sites: Site) -> tuple[Site, ...]:
    """Where the end of a branch leaves out values: the last of the sites only with a final dropout."""
    return sites if sizes.final_dropout else sites[:-1]


class FeedForward(nn.Module):
    """Two dense layers with tanh-gelu between."""

    sizes: Any
    dtype: str

    def setup(self) -> None:
        self.up = nn.Dense(self.sizes.mlp_dim, dtype=self.dtype)
        self.down = nn.Dense(self.sizes.width, dtype=self.dtype)

    def hidden(self, x: Float[Array, "b s d"], keys: Any) -> Float[Array, "b s f"]:
        """What the second layer reads."""
        return dropped(nn.gelu(self.up(x)), keys, self.sizes.dropout, Site.HIDDEN)

    def write(self, hidden: Float[Array, "b s f"], keys: Any) -> Float[Array, "b s d"]:
        """What is added to the stream."""
        return dropped(self.down(hidden), keys, self.sizes.dropout, *branch_ends(self.sizes, Site.FEED_FORWARD))


class Block(nn.Module):
    """Pre-norm self-attention block; a gate acts on the whole block."""

    sizes: AttentionSizes
    dtype: str
    capture: Capture
    rows: Rows = None

    @nn.compact
    def __call__(self, x, gate, mask, keys):
        x = inputs = pinned(x, self.rows)
        attention = Attention(self.sizes.width, self.sizes.num_heads, self.dtype, self.sizes.adapters, name="attn")
        normed = norm(epsilon=BLOCK_EPS, dtype=self.dtype, name="norm1")(x)
        read = attention(normed, attention.keys_values(normed, keys), mask, keys)
        ends = branch_ends(self.sizes, Site.ATTENTION, Site.AGAIN)
        x = x + dropped(attention.write(read), keys, self.sizes.dropout, *ends)
        feed_forward = FeedForward(self.sizes, self.dtype, name="ff")
        hidden = feed_forward.hidden(norm(epsilon=BLOCK_EPS, dtype=self.dtype, name="norm3")(x), keys)
        x = x + feed_forward.write(hidden, keys)
        if gate is not None:
            x = gated(inputs, x, gate)
        writes = {"attention": Write(read), "mlp": Write(hidden)} if self.capture == "writes" else {}
        return x, (x, writes) if self.capture else None


class SelfAttentionTransformer(nn.Module):
    """The scanned blocks, without a norm after them."""

    sizes: AttentionSizes
    dtype: str
    remat: str = "all"
    rows: Rows = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s d"],
        mask: Bool[Array, "b s"] | None = None,
        seeds: UInt32[AnyArray, " b"] | None = None,
        *,
        gates: Float[AnyArray, "depth _g"] | None = None,
        capture: Capture = False,
    ) -> tuple[Float[Array, "b s d"], Captured | None]:
        """The last state; all states and what was written into the stream (None if not captured)."""
        stack: Any = nn.scan(
            rematerialised(Block, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, 0),
            length=self.sizes.depth,
        )
        keys = block_keys(seeds, _TOWER, self.sizes.depth, x.shape[0])
        y, captured = stack(self.sizes, self.dtype, capture, self.rows, name="blocks")(x, gates, mask, keys)
        if captured is None:
            return y, None
        states, writes = captured
        return y, Captured(jnp.concatenate([x[None], states]), writes)
