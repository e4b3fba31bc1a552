"""Attention and feed-forward of the action head's transformers, and the one that refines the language model's output.

Axis legend of the einsums:
  B batch   T query tokens   S key tokens   N heads   H head dim

Upstream has no mask here: padding tokens of the prompt are read like any other. A mask leaves them out, as if an
observation had been alone, where nothing is padded.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from clp_jax.aliases import AnyArray, Array
from clp_jax.models.groot.architecture import AttentionSizes
from clp_jax.models.layers.gating import gated, repeated
from clp_jax.models.layers.scan import Rows, pinned, rematerialised

KeysValues = tuple[Float[Array, "*_l _c _s n h"], Float[Array, "*_l _c _s n h"]]
"""What queries read."""

BLOCK_EPS = 1e-5
"""Of the layer norms in blocks and before them."""

norm = partial(nn.LayerNorm, use_fast_variance=False)
"""Layer norm whose variance is that of the centred values, as PyTorch computes it."""


class Attention(nn.Module):
    """Attention of all tokens to all; keys and values come from the same tokens or from others.

    Other tokens may have fewer rows than the queries: each row then serves several neighbouring rows of queries.
    """

    width: int
    num_heads: int
    dtype: str

    def setup(self) -> None:
        self.q, self.k, self.v, self.out = (nn.Dense(self.width, dtype=self.dtype) for _ in range(4))

    def keys_values(self, x: Float[Array, "b s d"]) -> KeysValues:
        """Keys and values of tokens."""
        return self._heads(self.k(x)), self._heads(self.v(x))

    def __call__(
        self, x: Float[Array, "b s d"], seen: KeysValues, mask: Bool[Array, "_c t"] | None = None
    ) -> Float[Array, "b s d"]:
        """What tokens read.

        Args:
          x: the tokens that read.
          seen: what they read.
          mask: True for keys that are read; all are if None.
        """
        q = self._heads(self.q(x))
        keys, values = (repeated(y, x.shape[0]) for y in seen)
        scale = (self.width // self.num_heads) ** -0.5
        logits = jnp.einsum("BTNH,BSNH->BNTS", q, keys, preferred_element_type=jnp.float32) * scale
        if mask is not None:
            read = repeated(mask, x.shape[0])[:, None, None, :]
            logits = jnp.where(read, logits, jnp.finfo(logits.dtype).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
        return self.out(jnp.einsum("BNTS,BSNH->BTNH", weights, values).reshape(*x.shape[:2], -1))

    def _heads(self, x: Float[Array, "b s d"]) -> Float[Array, "b s n h"]:
        return x.reshape(*x.shape[:2], self.num_heads, -1)


class FeedForward(nn.Module):
    """Two dense layers with tanh-gelu between."""

    width: int
    mlp_dim: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        hidden = nn.gelu(nn.Dense(self.mlp_dim, dtype=self.dtype, name="up")(x))
        return nn.Dense(self.width, dtype=self.dtype, name="down")(hidden)


class Block(nn.Module):
    """Pre-norm self-attention block; a gate acts on the whole block."""

    sizes: AttentionSizes
    dtype: str
    capture: bool
    rows: Rows = None

    @nn.compact
    def __call__(self, x, gate, mask):
        x = inputs = pinned(x, self.rows)
        attention = Attention(self.sizes.width, self.sizes.num_heads, self.dtype, name="attn")
        normed = norm(epsilon=BLOCK_EPS, dtype=self.dtype, name="norm1")(x)
        x = x + attention(normed, attention.keys_values(normed), mask)
        normed = norm(epsilon=BLOCK_EPS, dtype=self.dtype, name="norm3")(x)
        x = x + FeedForward(self.sizes.width, self.sizes.mlp_dim, self.dtype, name="ff")(normed)
        if gate is not None:
            x = gated(inputs, x, gate)
        return x, x if self.capture else None


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
        *,
        gates: Float[AnyArray, "depth _g"] | None = None,
        capture: bool = False,
    ) -> tuple[Float[Array, "b s d"], Float[Array, "l b s d"] | None]:
        """The last state, and all states [depth + 1, b, s, d] (None if not captured)."""
        stack: Any = nn.scan(
            rematerialised(Block, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=self.sizes.depth,
        )
        y, states = stack(self.sizes, self.dtype, capture, self.rows, name="blocks")(x, gates, mask)
        return y, jnp.concatenate([x[None], states]) if capture else None
