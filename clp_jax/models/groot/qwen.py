"""Qwen3, Eagle's language model, as GR00T-N1.5 uses it: one pass over the prompt, without a cache.

Axis legend of the einsums:
  B batch   T query tokens   S key tokens   K key/value heads   G query heads per K   H head dim
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from clp_jax.aliases import AnyArray, Array
from clp_jax.models.groot.architecture import Padding, QwenSizes
from clp_jax.models.groot.lora import AdaptedDense
from clp_jax.models.groot.transformer import Captured
from clp_jax.models.layers.attention import attend, rotate
from clp_jax.models.layers.gating import gated
from clp_jax.models.layers.scan import Rows, pinned, rematerialised
from clp_jax.models.towers import Capture, Write

_MASKED_LOGIT = -2.3819763e38


class RMSNorm(nn.Module):
    """RMS normalisation over the last axis in float32, rounded to the input's dtype before the scale."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * scale.astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention whose queries and keys are normalised per head before they are rotated."""

    sizes: QwenSizes
    dtype: str
    padding: Padding

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s d"], positions: Int[Array, "b s"], mask: Bool[Array, "b s s"]
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b s h"]]:
        """What is added to the stream, and what the heads read, of which it is made."""
        size = self.sizes
        b, s, _ = x.shape

        def heads(name: str, count: int) -> Array:
            projection = AdaptedDense(count * size.head_dim, self.dtype, size.adapters, use_bias=False, name=name)
            return projection(x).reshape(b, s, count, size.head_dim)

        q = RMSNorm(size.eps, name="q_norm")(heads("q", size.num_heads))
        k = RMSNorm(size.eps, name="k_norm")(heads("k", size.num_kv_heads))
        v = heads("v", size.num_kv_heads)
        q, k = (rotate(y, positions, size.rope_theta).astype(v.dtype) for y in (q, k))
        # Where no key is seen all logits are the same, and every value, future ones included, weighs alike.
        scale, flash = size.head_dim**-0.5, self.padding == "flash"
        read = attend(q, k, v, mask, masked=_MASKED_LOGIT, scale=scale, blind_read_nothing=flash)
        read = read.reshape(b, s, -1)
        return nn.Dense(size.width, use_bias=False, dtype=self.dtype, name="o")(read), read


class FeedForward(nn.Module):
    """silu(x gate) * (x up), then down."""

    width: int
    mlp_dim: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> tuple[Float[Array, "b s d"], Float[Array, "b s f"]]:
        """What is added to the stream, and the hidden channels of which it is made."""
        gate, up, down = (
            nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)
            for name, width in (("gate", self.mlp_dim), ("up", self.mlp_dim), ("down", self.width))
        )
        hidden = nn.silu(gate(x)) * up(x)
        return down(hidden), hidden


class Block(nn.Module):
    """Pre-norm transformer block; a gate acts on the whole block."""

    sizes: QwenSizes
    dtype: str
    padding: Padding
    capture: Capture
    rows: Rows = None

    @nn.compact
    def __call__(self, x, gate, positions, mask):
        x = inputs = pinned(x, self.rows)
        normed = RMSNorm(self.sizes.eps, name="attn_norm")(x)
        update, read = Attention(self.sizes, self.dtype, self.padding, name="attn")(normed, positions, mask)
        x = x + update
        normed = RMSNorm(self.sizes.eps, name="mlp_norm")(x)
        update, hidden = FeedForward(self.sizes.width, self.sizes.mlp_dim, self.dtype, name="mlp")(normed)
        x = x + update
        if gate is not None:
            x = gated(inputs, x, gate)
        writes = {"attention": Write(read), "mlp": Write(hidden)} if self.capture == "writes" else {}
        return x, (x, writes) if self.capture else None


class Qwen(nn.Module):
    """The embedding table, the scanned blocks and the final norm."""

    sizes: QwenSizes
    vocab_size: int
    padding: Padding
    lm_head: bool
    dtype: str
    remat: str = "all"
    rows: Rows = None

    def setup(self) -> None:
        table = (self.vocab_size, self.sizes.width)
        self.embed_tokens = self.param("embed_tokens", nn.initializers.normal(0.02), table)
        if self.lm_head:
            # Nothing reads it; it is here so that a checkpoint goes through whole.
            self.param("lm_head", nn.initializers.zeros_init(), table)
        self.norm = RMSNorm(self.sizes.eps)

    def embed(self, tokens: Int[AnyArray, "b s"]) -> Float[Array, "b s d"]:
        """Token embeddings in the activation dtype."""
        return jnp.asarray(self.embed_tokens)[jnp.asarray(tokens)].astype(self.dtype)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s d"],
        valid: Bool[Array, "b s"],
        *,
        gates: Float[AnyArray, "depth _g"] | None = None,
        capture: Capture = False,
    ) -> tuple[Float[Array, "b s d"], Captured | None]:
        """Run the stack.

        Args:
          x: embeddings, images included.
          valid: False for padding, which counts in the positions but is seen by nobody.
          gates: per block, for the batch or for each observation.
          capture: also return the residual stream, and what is written into it.

        Returns:
          The normalised stream, and what was captured (None if nothing was); the states are the embeddings, the stream
          after every block but the last, and the normalised one.
        """
        s = x.shape[1]
        mask = jnp.tril(jnp.ones((s, s), bool)) & valid[:, None, :]
        stack: Any = nn.scan(
            rematerialised(Block, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=self.sizes.depth,
        )
        blocks = stack(self.sizes, self.dtype, self.padding, capture, self.rows, name="layers")
        y, captured = blocks(x, gates, jnp.broadcast_to(jnp.arange(s), valid.shape), mask)
        y = self.norm(pinned(y, self.rows))
        if captured is None:
            return y, None
        states, writes = captured
        return y, Captured(jnp.concatenate([x[None], states[:-1], y[None]]), writes)
