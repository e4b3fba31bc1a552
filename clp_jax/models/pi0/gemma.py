"""Gemma with one or more experts: token streams of different width that attend together, block by block.

Axis legend of the einsums:
  B batch   T query tokens   S key tokens   D width   N query heads   K key/value heads   G query heads per K   H
  head dim

Leaf names follow openpi: the first expert's have no suffix, the second's end in ``_1``; all blocks are stacked on
axis 0 by one scan. Numerics (which steps run in float32) follow openpi models/gemma.py, commit 15a9616.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from clp_jax.aliases import AnyArray, Array, Leaf
from clp_jax.models.layers.attention import attend, rotate
from clp_jax.models.layers.gating import gated, repeated
from clp_jax.models.layers.scan import Rows, pinned, rematerialised
from clp_jax.models.pi0.architecture import GemmaSizes
from clp_jax.models.pi0.lora import Einsum, FeedForward
from clp_jax.models.towers import Capture, Write

KVCache = tuple[Float[Array, "depth b _s k h"], Float[Array, "depth b _s k h"]]
"""Keys (after RoPE) and values of every block."""

Streams = Sequence[Float[Array, "_b _s _d"] | None]
"""One array of tokens per expert; None for an expert that does not run."""

_MASKED_LOGIT = -2.3819763e38


class Captured(NamedTuple):
    """Of one expert: its states [depth + 1, b, s, d], None if it did not run, and its `TowerStates.writes`."""

    states: Leaf
    writes: Mapping[str, Write]


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
    """Grouped-query attention. Every expert has its own projections; what it sees is given as keys and values."""

    experts: tuple[GemmaSizes, ...]
    float32_queries: bool = False

    def setup(self) -> None:
        numbered = list(enumerate(self.experts))
        self.qkv: list[Any] = [
            self._einsum(i, "qkv_einsum", 3, e.num_heads) if _fused(e) else None for i, e in numbered
        ]
        self.q: list[Any] = [None if _fused(e) else self._einsum(i, "q_einsum", e.num_heads) for i, e in numbered]
        self.kv: list[Any] = [
            None if _fused(e) else self._einsum(i, "kv_einsum", 2, e.num_kv_heads) for i, e in numbered
        ]
        self.output = [self._output(i) for i in range(len(self.experts))]

    def keys_values(
        self, i: int, x: Float[Array, "b t d"], positions: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b t k h"], Float[Array, "b t k h"]]:
        """Keys after RoPE and values of expert ``i``'s tokens."""
        if self.qkv[i] is None:
            k, v = self.kv[i]("BSD,2KDH->2BSKH", x)
        else:
            k, v = self.qkv[i]("BSD,3KDH->3BSKH", x, part=slice(1, 3))
        return rotate(k, positions).astype(v.dtype), v

    def __call__(
        self,
        i: int,
        x: Float[Array, "b t d"],
        keys: Float[Array, "b s k h"],
        values: Float[Array, "b s k h"],
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t s"],
    ) -> Float[Array, "b t n h"]:
        """What the heads of expert ``i`` read from the keys and values that its tokens see."""
        if self.qkv[i] is None:
            q = self.q[i]("BTD,NDH->BTNH", x)
        else:
            (q,) = self.qkv[i]("BSD,3KDH->3BSKH", x, part=slice(0, 1))
        q = rotate(q, positions)
        # π0 rounds the rotated queries to the activation dtype, π0-FAST keeps them in float32.
        q = (q if self.float32_queries else q.astype(values.dtype)) * self.experts[i].head_dim ** -0.5
        return attend(q, keys, values, mask, masked=_MASKED_LOGIT)

    def write(self, i: int, read: Float[Array, "b t n h"]) -> Float[Array, "b t d"]:
        """What expert ``i`` adds to its stream."""
        return self.output[i]("BTNH,NHD->BTD", read)

    def _output(self, i: int) -> Einsum:
        e = self.experts[i]
        init = nn.initializers.lecun_normal(in_axis=(-3, -2), out_axis=-1)
        shape, name = (e.num_heads, e.head_dim, e.width), expert_name("attn_vec_einsum", i)
        return Einsum(shape, init, e.attn_lora_rank, e.lora_scale, name=name)

    def _einsum(self, i: int, name: str, *heads: int) -> Einsum:
        e = self.experts[i]
        init = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=tuple(range(len(heads))))
        shape = (*heads, e.width, e.head_dim)
        return Einsum(shape, init, e.attn_lora_rank, e.lora_scale, name=expert_name(name, i))


class Block(nn.Module):
    """Pre-norm transformer block over all experts: shared attention, then a feed-forward each.

    A stream sees the cache, itself and the streams before it. An earlier one may have fewer rows: each row then serves
    several neighbouring rows of the later stream.

    The scan carry is the streams; per block it takes the KV cache, the gates and whether the first stream is ``read``
    afterwards, and gives the new KV cache and, if ``capture``, the streams after it and what was written into them. A
    gate g per expert and observation replaces the block's output y by ``(1 - g) x + g y``: 1 keeps the block, 0 removes
    it exactly, and the derivative is the block's whole update. A first stream that is not read ends with its keys and
    values: the rest of its block, which could reach nothing, does not run.
    """

    experts: tuple[GemmaSizes, ...]
    capture: Capture
    remat: str = "all"
    float32_queries: bool = False
    rows: Rows = None

    def setup(self) -> None:
        numbered = list(enumerate(self.experts))
        self.attn = Attention(self.experts, self.float32_queries)
        self.attention_norms = [RMSNorm(name=expert_name("pre_attention_norm", i)) for i, _ in numbered]
        self.ffw_norms = [RMSNorm(name=expert_name("pre_ffw_norm", i)) for i, _ in numbered]
        self.mlps = [FeedForward(e.width, e.mlp_dim, e.ffn_lora_rank, name=expert_name("mlp", i)) for i, e in numbered]

    def __call__(self, xs, kv_cache, gates, read, cache_index, positions, masks, conditions):
        after, writes, seen = [], [], kv_cache
        for i, x in enumerate(pinned(xs, self.rows)):
            if x is None:
                after.append(None)
                writes.append(None)
                continue
            normed, residual_gate = self.attention_norms[i](x, conditions[i])
            seen = _extended(seen, self.attn.keys_values(i, normed, positions[i]), cache_index)
            gate = None if gates is None else gates[i]
            inputs = x, normed, residual_gate, seen, positions[i], masks[i], conditions[i], gate
            if i or read is None or self.is_initializing():
                y, written = self.finish(i, *inputs)
                after.append(y)
                writes.append(written)
            else:
                # What a branch keeps for the backward pass crosses its border and cannot be fused away.
                finish = rematerialised(_finish_first, self.remat)
                after.append(nn.cond(read, finish, _leave_first, self, *inputs))
        return after, (seen, after if self.capture else None, writes if self.capture == "writes" else None)

    def finish(self, i: int, x, normed, residual_gate, seen, positions, mask, condition, gate):
        """Stream ``i`` after the block, all that follows its keys and values, and what was written into it."""
        keys, values = seen
        read = self.attn(i, normed, keys, values, positions, mask)
        writes = {"attention": Write(read.reshape(*read.shape[:2], -1), residual_gate)}
        y = _add(x, self.attn.write(i, read), residual_gate)
        normed, residual_gate = self.ffw_norms[i](y, condition)
        hidden = self.mlps[i].hidden(normed)
        writes["mlp"] = Write(hidden, residual_gate)
        y = _add(y, self.mlps[i].write(hidden), residual_gate)
        return (y if gate is None else gated(x, y, gate)), writes


def _finish_first(block: Block, *inputs) -> Array:
    return block.finish(0, *inputs)[0]


def _leave_first(_: Block, x: Array, *__) -> Array:
    return x


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
    skip_dead: bool = False
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
        positions: Sequence[Int[Array, "_b _t"] | None],
        masks: Sequence[Bool[Array, "_b _t _s"] | None],
        conditions: Sequence[Float[Array, "_b _d"] | None] | None = None,
        kv_cache: KVCache | None = None,
        cache_index: Int[Array, ""] | None = None,
        gates: Float[AnyArray, "depth e #b"] | None = None,
        capture: Capture = False,
    ) -> tuple[list[Leaf], KVCache, list[Captured] | None]:
        """Run the stack.

        Args:
          xs: tokens per expert. A later expert may have a multiple of the rows of an earlier one, see `Block`.
          positions: RoPE positions of each expert's tokens.
          masks: per expert, True where a query (t) sees a key (s). The keys are the cached ones, then those of the
            running experts up to this one.
          conditions: adaRMS condition per expert, or None.
          kv_cache: keys and values that all experts see before the new ones.
          cache_index: write the new keys into the cache at this slot (fixed-size decoding); None appends them.
          gates: per block, expert and observation, 1 keeps and 0 removes; None runs without the extra multiply.
          capture: also return the residual streams, and what is written into them.

        Returns:
          Normalised outputs per expert; the keys and values that the last running expert saw; and per expert the states
          [depth + 1, b, s, d] and the writes (None if not captured). With ``skip_dead`` the first expert has no output,
          unless states are captured: what follows its keys and values in the last block is not computed.
        """
        xs = pinned([None if x is None else x.astype(self.dtype) for x in xs], self.rows)
        conditions = conditions or [None] * len(self.experts)
        depth = self.experts[0].depth
        read = jnp.arange(1, depth + 1) < depth if self.skip_dead and not capture else None
        stack = nn.scan(
            rematerialised(Block, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=depth,
        )(self.experts, capture, self.remat, self.float32_queries, self.rows, name="layers")
        ys, (kv_cache, states, writes) = stack(xs, kv_cache, gates, read, cache_index, positions, masks, conditions)
        if read is not None and not self.is_initializing():
            ys = [None, *ys[1:]]
        ys = pinned(ys, self.rows)
        outputs = [
            None if y is None else norm(y, condition)[0]
            for norm, y, condition in zip(self.final_norms, ys, conditions, strict=True)
        ]
        if not capture:
            return outputs, kv_cache, None
        streams = [
            None if x is None else jnp.concatenate([x[None], after]) for x, after in zip(xs, states, strict=True)
        ]
        found = [{} if written is None else written for written in writes or [None] * len(xs)]
        return outputs, kv_cache, [Captured(*pair) for pair in zip(streams, found, strict=True)]


def _fused(sizes: GemmaSizes) -> bool:
    return sizes.num_kv_heads == sizes.num_heads


def _extended(seen: tuple[Array, Array] | None, new: tuple[Array, Array], index: Array | None) -> tuple[Array, Array]:
    """Keys and values seen so far and the new ones, appended or written at ``index``."""
    if seen is None:
        return new
    keys, values = (repeated(old, new[0].shape[0]) for old in seen)
    if index is None:
        return jnp.concatenate([keys, new[0]], axis=1), jnp.concatenate([values, new[1]], axis=1)
    update = jax.lax.dynamic_update_slice_in_dim
    return update(keys, new[0], index, axis=1), update(values, new[1], index, axis=1)


def _add(x: Array, update: Array, gate: Array | None) -> Array:
    """Residual sum; adaRMS multiplies the update by its gate."""
    return x + (update if gate is None else update * gate)
