"""Gemma with one or more experts: token streams of different width that attend together, block by block.

Axis legend of the einsums:
  B batch   T query tokens   S key tokens   D width   N query heads   K key/value heads   G query heads per K   H
  head dim

Leaf names follow openpi: the first expert's have no suffix, the second's end in ``_1``; all blocks are stacked on
axis 0 by one scan. Numerics (which steps run in float32) follow openpi models/gemma.py, commit 15a9616.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from clp_jax.aliases import AnyArray, Array, Leaf
from clp_jax.models.architecture import GemmaSizes
from clp_jax.models.lora import Einsum, FeedForward
from clp_jax.models.remat import rematerialised
from clp_jax.models.rows import Rows, pinned

KVCache = tuple[Float[Array, "depth b _s k h"], Float[Array, "depth b _s k h"]]
"""Keys (after RoPE) and values of every block."""

Streams = Sequence[Float[Array, "b _s _d"] | None]
"""One array of tokens per expert; None for an expert that does not run."""

_MASKED_LOGIT = -2.3819763e38
_ROPE_BASE = 10_000.0


def expert_name(name: str, expert: int) -> str:
    """openpi's leaf name of an expert: ``mlp``, ``mlp_1``, ..."""
    return name if expert == 0 else f"{name}_{expert}"


class RMSNorm(nn.Module):
    """RMS normalisation; with a condition, adaptive: scale, shift and a gate for the residual come from it (adaRMS)."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s d"], condition: Float[Array, "b d"] | None
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b 1 d"] | None]:
        dtype = x.dtype
        x = x.astype(jnp.float32)
        # `1 + scale` below is rounded to the dtype of the scale before it is multiplied in float32, as upstream has it.
        normed = x * jnp.reciprocal(jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6))
        if condition is None:
            scale = self.param("scale", nn.initializers.zeros_init(), (x.shape[-1],))
            return (normed * (1 + scale).astype(jnp.float32)).astype(dtype), None
        modulation = nn.Dense(3 * x.shape[-1], kernel_init=nn.initializers.zeros, dtype=dtype)(condition)
        scale, shift, gate = jnp.split(modulation[:, None, :], 3, axis=-1)
        normed = normed * (1 + scale).astype(jnp.float32) + shift.astype(jnp.float32)
        return normed.astype(dtype), gate


class Attention(nn.Module):
    """Grouped-query attention over the concatenated tokens of all experts; each has its own projections."""

    experts: tuple[GemmaSizes, ...]
    float32_queries: bool = False

    @nn.compact
    def __call__(
        self,
        xs: Streams,
        kv_cache: tuple[Array, Array] | None,
        cache_index: Int[Array, ""] | None,
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t s"],
    ) -> tuple[list[Array | None], tuple[Array, Array]]:
        projections = [self._project(i, x) for i, x in enumerate(xs) if x is not None]
        q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*projections, strict=True))
        dtype, sizes = v.dtype, self.experts[0]
        q, k = rotate(q, positions), rotate(k, positions).astype(dtype)
        # π0 rounds the rotated queries to the activation dtype, π0-FAST keeps them in float32.
        q = (q if self.float32_queries else q.astype(dtype)) * sizes.head_dim**-0.5
        if kv_cache is not None:
            k, v = (_extend(old, new, cache_index) for old, new in zip(kv_cache, (k, v), strict=True))

        b, t, n, h = q.shape
        q = q.reshape(b, t, sizes.num_kv_heads, n // sizes.num_kv_heads, h)
        logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k.astype(q.dtype), preferred_element_type=jnp.float32)
        logits = jnp.where(mask[:, None, None, :, :], logits, _MASKED_LOGIT)
        weights = jax.nn.softmax(logits, axis=-1).astype(dtype)
        encoded = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(b, t, n, h)

        outputs: list[Array | None] = []
        start = 0
        for i, x in enumerate(xs):
            if x is None:
                outputs.append(None)
                continue
            outputs.append(self._output(i)("BTNH,NHD->BTD", encoded[:, start : start + x.shape[1]]))
            start += x.shape[1]
        return outputs, (k, v)

    def _project(self, i: int, x: Array) -> tuple[Array, Array, Array]:
        e = self.experts[i]
        if e.num_kv_heads == e.num_heads:
            q, k, v = self._einsum(i, "qkv_einsum", (3, e.num_heads, e.width, e.head_dim), (0, 1))("BSD,3KDH->3BSKH", x)
            return q, k, v
        q = self._einsum(i, "q_einsum", (e.num_heads, e.width, e.head_dim), (0,))("BTD,NDH->BTNH", x)
        k, v = self._einsum(i, "kv_einsum", (2, e.num_kv_heads, e.width, e.head_dim), (0, 1))("BSD,2KDH->2BSKH", x)
        return q, k, v

    def _output(self, i: int) -> Einsum:
        e = self.experts[i]
        init = nn.initializers.lecun_normal(in_axis=(-3, -2), out_axis=-1)
        shape, name = (e.num_heads, e.head_dim, e.width), expert_name("attn_vec_einsum", i)
        return Einsum(shape, init, e.attn_lora_rank, e.lora_scale, name=name)

    def _einsum(self, i: int, name: str, shape: tuple[int, ...], batch_axis: tuple[int, ...]) -> Einsum:
        e = self.experts[i]
        init = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=batch_axis)
        return Einsum(shape, init, e.attn_lora_rank, e.lora_scale, name=expert_name(name, i))


class Block(nn.Module):
    """Pre-norm transformer block over all experts: shared attention, then a feed-forward each.

    Its scan carry is the streams; per block it takes the KV cache and the gates and gives the new KV cache and, if
    ``capture``, the streams after it. A gate g per expert and observation replaces the block's output y by
    ``(1 - g) x + g y``: 1 keeps the block, 0 removes it exactly, and the derivative is the block's whole update.
    """

    experts: tuple[GemmaSizes, ...]
    capture: bool
    float32_queries: bool = False
    rows: Rows = None

    @nn.compact
    def __call__(self, xs, kv_cache, gates, cache_index, positions, mask, conditions):
        xs = inputs = pinned(xs, self.rows)
        normed, residual_gates = self._norm("pre_attention_norm", xs, conditions)
        attention = Attention(self.experts, self.float32_queries, name="attn")
        updates, kv_cache = attention(normed, kv_cache, cache_index, positions, mask)
        xs = _add(xs, updates, residual_gates)

        normed, residual_gates = self._norm("pre_ffw_norm", xs, conditions)
        updates = [None if x is None else self._feed_forward(i)(x) for i, x in enumerate(normed)]
        xs = _add(xs, updates, residual_gates)
        if gates is not None:
            xs = [_gated(x, y, gates[i]) for i, (x, y) in enumerate(zip(inputs, xs, strict=True))]
        return xs, (kv_cache, xs if self.capture else None)

    def _norm(self, name: str, xs, conditions):
        pairs = [
            (None, None) if x is None else RMSNorm(name=expert_name(name, i))(x, conditions[i])
            for i, x in enumerate(xs)
        ]
        return [normed for normed, _ in pairs], [gate for _, gate in pairs]

    def _feed_forward(self, i: int) -> FeedForward:
        e = self.experts[i]
        return FeedForward(e.width, e.mlp_dim, e.ffn_lora_rank, name=expert_name("mlp", i))


class Embedder(nn.Module):
    """The token table, shared by embedding and (π0-FAST) the logits."""

    vocab_size: int
    width: int

    def setup(self) -> None:
        self.input_embedding = self.param("input_embedding", nn.initializers.normal(), (self.vocab_size, self.width))

    def encode(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        x = jnp.asarray(self.input_embedding)[tokens]
        return x * jnp.sqrt(self.width).astype(x.dtype)

    def decode(self, x: Float[Array, "b s d"]) -> Float[Array, "b s v"]:
        dtype = jnp.promote_types(x.dtype, self.input_embedding.dtype)
        return jnp.dot(x.astype(dtype), self.input_embedding.T.astype(dtype))


class Gemma(nn.Module):
    """The stack: embedder, scanned blocks, one final norm per expert."""

    experts: tuple[GemmaSizes, ...]
    vocab_size: int
    dtype: str
    remat: str = "all"
    float32_queries: bool = False
    rows: Rows = None

    def setup(self) -> None:
        self.embedder = Embedder(self.vocab_size, self.experts[0].width)
        self.final_norms = [RMSNorm(name=expert_name("final_norm", i)) for i in range(len(self.experts))]

    def embed(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        """Token embeddings times sqrt(width), in the activation dtype."""
        return self.embedder.encode(tokens).astype(self.dtype)

    def decode(self, x: Float[Array, "b s d"]) -> Float[Array, "b s v"]:
        """Logits over the vocabulary."""
        return self.embedder.decode(x)

    @nn.compact
    def __call__(
        self,
        xs: Streams,
        *,
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t s"],
        conditions: Sequence[Float[Array, "b _d"] | None] | None = None,
        kv_cache: KVCache | None = None,
        cache_index: Int[Array, ""] | None = None,
        gates: Float[AnyArray, "depth e #b"] | None = None,
        capture: bool = False,
    ) -> tuple[list[Leaf], KVCache, list[Leaf] | None]:
        """Run the stack.

        Args:
          xs: tokens per expert.
          positions: RoPE positions of the running tokens.
          mask: True where a query (t) sees a key (s); s counts cached keys too.
          conditions: adaRMS condition per expert, or None.
          kv_cache: keys and values to attend to beside the new ones.
          cache_index: write the new keys into the cache at this slot (fixed-size decoding); None appends them.
          gates: per block, expert and observation, 1 keeps and 0 removes; None runs without the extra multiply.
          capture: also return the residual streams.

        Returns:
          Normalised outputs per expert, the KV cache, and per expert the states [depth + 1, b, s, d] (None if not
          captured).
        """
        xs = pinned([None if x is None else x.astype(self.dtype) for x in xs], self.rows)
        conditions = conditions or [None] * len(self.experts)
        stack = nn.scan(
            rematerialised(Block, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.experts[0].depth,
        )(self.experts, capture, self.float32_queries, self.rows, name="layers")
        ys, (kv_cache, states) = stack(xs, kv_cache, gates, cache_index, positions, mask, conditions)
        ys = pinned(ys, self.rows)
        outputs = [
            None if y is None else norm(y, condition)[0]
            for norm, y, condition in zip(self.final_norms, ys, conditions, strict=True)
        ]
        if capture:
            states = [
                None if x is None else jnp.concatenate([x[None], after]) for x, after in zip(xs, states, strict=True)
            ]
        return outputs, kv_cache, states


def rotate(x: Float[Array, "b t n h"], positions: Int[Array, "b t"]) -> Float[Array, "b t n h"]:
    """Rotary position embedding over split halves, in float32."""
    half = x.shape[-1] // 2
    wavelength = _ROPE_BASE ** ((2.0 / x.shape[-1]) * jnp.arange(half, dtype=jnp.float32))
    angle = positions[..., None].astype(jnp.float32) / wavelength[None, None, :]
    sin, cos = jnp.sin(angle)[:, :, None, :], jnp.cos(angle)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _extend(old: Array, new: Array, index: Array | None) -> Array:
    if index is None:
        return jnp.concatenate([old, new], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=1)


def _add(xs, updates, gates):
    """Residual sums; adaRMS multiplies the update by its gate."""
    return [
        None if x is None else x + (update if gate is None else update * gate)
        for x, update, gate in zip(xs, updates, gates, strict=True)
    ]


def _gated(x: Array | None, y: Array | None, gate: Array) -> Array | None:
    """(1 - g) x + g y, exact at 0 and 1 in any dtype."""
    if x is None or y is None:
        return None
    gate = gate[:, None, None].astype(x.dtype)
    return (1 - gate) * x + gate * y
