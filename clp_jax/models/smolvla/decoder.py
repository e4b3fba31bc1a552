"""The two token streams of SmolVLA, the language model's and the action expert's, block by block.

Blocks alternate. In even ones the actions attend to the prefix and to themselves, with keys and values of their own; in
odd ones they attend to the prefix alone, through what the expert's projections make of the language model's keys and
values. The prefix never sees an action. A pair of blocks is one step of a scan, so that the leaves of even blocks and
those of odd ones are stacked apart; at an odd depth the last block, an even one, follows the scan.

Axis legend of the einsums:
  B batch   T query tokens   S key tokens   K key/value heads   G query heads per K   H head dim

Numerics follow lerobot 0.6.1: norms, rotation, scores and softmax in float32, the odd blocks' projections of keys and
values in float32 at any activation dtype.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from clp_jax.aliases import AnyArray, Array, Leaf
from clp_jax.models.layers import attention
from clp_jax.models.layers.attention import rotate
from clp_jax.models.layers.gating import gated, repeated
from clp_jax.models.layers.scan import Rows, checkpointed, pinned
from clp_jax.models.smolvla.architecture import Architecture
from clp_jax.models.smolvla.weights import Pair, Streams, Weights
from clp_jax.models.towers import Capture, Write

KeysValues = tuple[Float[Array, "*_n b s k h"], Float[Array, "*_n b s k h"]]
"""Keys (after their rotation) and values of one block, or of many on a leading axis."""

_MASKED = float(jnp.finfo(jnp.float32).min)


class Step(NamedTuple):
    """What one block needs, or all blocks of one kind on a leading axis.

    Attributes:
      weights: of each stream, `Weights`.
      gates: of each stream, None without.
      seen: keys and values of the prefix, in place of the VLM's stream.
    """

    weights: Streams
    gates: Streams
    seen: KeysValues | None


class Place(NamedTuple):
    """Where the tokens of a stream are and what they see.

    Attributes:
      positions: for the rotation; actions count on from the prefix.
      mask: True where a token sees a token of the prefix or, if it is an action, an action.
    """

    positions: Int[Array, "b t"]
    mask: Bool[Array, "b t s"]


def rms_norm(x: Float[Array, "b s d"], scale: Float[AnyArray, " d"], eps: float) -> Float[Array, "b s d"]:
    """RMS normalisation in float32; the scale is a plain factor, applied in the dtype of the stream."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def attend(
    q: Float[Array, "b t n h"],
    keys: Float[Array, "b s k h"],
    values: Float[Array, "b s k h"],
    mask: Bool[Array, "b t s"],
) -> Float[Array, "b t _c"]:
    """What the heads of each token read, side by side. A token that sees nobody sees all alike."""
    read = attention.attend(q.astype(keys.dtype), keys, values, mask, masked=_MASKED, scale=q.shape[3] ** -0.5)
    return read.reshape(*q.shape[:2], -1)


class Decoder(NamedTuple):
    """What the blocks need besides their leaves and tokens.

    Attributes:
      sizes: of the whole model.
      places: of each stream, a `Place`; None for one that does not run.
      rows: how a batch is split over devices.
      capture: also give the streams after every block, and what is written into them.
    """

    sizes: Architecture
    places: Streams
    rows: Rows = None
    capture: Capture = False

    def run(
        self, weights: Streams, tokens: Streams, gates: Streams, cache: Pair | None = None
    ) -> tuple[Streams, Pair, tuple[Streams, Streams] | None]:
        """Run all blocks.

        Args:
          weights: leaves of each stream's blocks, a `Pair` of `Weights` each.
          tokens: of each stream [b, s, d] in the activation dtype. An action stream may have a multiple of the rows of
            the prefix: each row of the prefix then serves several neighbouring ones.
          gates: [depth, b or 1] of each stream, None without.
          cache: what `run` gave for the prefix, in place of the stream of the VLM.

        Returns:
          The streams after the last block; what the actions see of the prefix in each block, even and odd ones stacked
          apart; the states [depth + 1, b, s, d] of each stream and its `TowerStates.writes` (None if not captured). The
          VLM's stream is None unless it is captured: what follows its keys and values in the last block reaches nothing
          and is not computed.
        """
        pairs, last = divmod(self.sizes.vlm.depth, 2)
        blocks = _kinds(weights, gates, cache)
        steps = Pair(_at(slice(pairs), blocks.even), blocks.odd)
        read = None if last or self.capture or tokens.vlm is None else jnp.arange(1, pairs + 1) < pairs
        streams, (seen, captured) = jax.lax.scan(checkpointed(self._pair, self.sizes.remat), tokens, (steps, read))
        ends = None
        if last:
            run_last = checkpointed(functools.partial(self._block, read=bool(self.capture)), self.sizes.remat)
            streams, extra, writes = run_last(streams, _at(pairs, blocks.even))
            ends = streams, writes
            seen = Pair(jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), seen.even, extra), seen.odd)
        if not self.capture:
            return Streams(None, streams.action), seen, None
        blocks = jax.tree.map(lambda even, odd: jnp.stack([even, odd], 1).reshape(-1, *even.shape[1:]), *captured)
        if ends is not None:
            blocks = jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), blocks, ends)
        states, writes = blocks
        return streams, seen, (jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), tokens, states), writes)

    def _pair(self, streams: Streams, pair: tuple[Pair, Leaf]) -> tuple[Streams, tuple[Pair, Pair | None]]:
        steps, read = pair
        even, seen_in_even, even_writes = self._block(streams, steps.even)
        odd, seen_in_odd, odd_writes = self._block(even, steps.odd, odd=True, read=True if read is None else read)
        captured = Pair((even, even_writes), (odd, odd_writes)) if self.capture else None
        return odd, (Pair(seen_in_even, seen_in_odd), captured)

    def _block(
        self, streams: Streams, step: Step, *, odd: bool = False, read: Leaf = True
    ) -> tuple[Streams, KeysValues, Streams]:
        """One block over both streams.

        Gives the streams after it, what the actions see of the prefix, and what was written into each stream if that is
        captured.
        """
        streams = pinned(streams, self.rows)
        vlm, action, seen = streams.vlm, streams.action, step.seen
        writes = Streams({}, {})
        if vlm is not None:
            normed = rms_norm(vlm, step.weights.vlm["input_layernorm"], self.sizes.rms_eps)
            own = self._keys_values(step.weights.vlm, normed, self.places.vlm.positions)
            seen = self._projected(step.weights.action, own) if odd else own
            vlm, found = self._read(read, step.weights.vlm, vlm, normed, *own, step.gates.vlm)
            writes.vlm.update(found)
        if action is not None:
            action, found = self._act(step.weights.action, action, seen, step.gates.action, odd=odd)
            writes.action.update(found)
        return Streams(vlm, action), seen, writes

    def _keys_values(self, w: Weights, normed: Array, positions: Array) -> KeysValues:
        """Keys after their rotation, and values."""
        keys, values = self._heads(w["k_proj"], normed), self._heads(w["v_proj"], normed)
        return rotate(keys, positions).astype(keys.dtype), values

    def _projected(self, w: Weights, seen: KeysValues) -> KeysValues:
        """What the expert's odd blocks make of the VLM's keys and values: float32, not rotated again."""
        keys, values = (x.reshape(*x.shape[:2], -1).astype(jnp.float32) for x in seen)
        return self._heads(w["k_proj"], keys), self._heads(w["v_proj"], values)

    def _heads(self, kernel: AnyArray, x: Array) -> Array:
        y = x @ kernel.astype(x.dtype)
        return y.reshape(*y.shape[:2], -1, self.sizes.head_dim)

    def _read(self, read: Leaf, *block: Leaf) -> tuple[Array, dict[str, Write]]:
        """The VLM stream after a block, or as it was where nothing reads it any more."""
        if isinstance(read, bool):
            return self._read_prefix(*block) if read else (block[1], {})
        # What a branch keeps for the backward pass crosses its border and cannot be fused away.
        return jax.lax.cond(read, checkpointed(self._read_prefix, self.sizes.remat), lambda _, x, *__: (x, {}), *block)

    def _read_prefix(
        self, w: Weights, x: Array, normed: Array, keys: Array, values: Array, gate: Leaf
    ) -> tuple[Array, dict[str, Write]]:
        q = self._heads(w["q_proj"], normed)
        q = rotate(q, self.places.vlm.positions).astype(q.dtype)
        return self._finished(w, x, attend(q, keys, values, self.places.vlm.mask), gate)

    def _act(self, w: Weights, x: Array, seen: KeysValues, gate: Leaf, *, odd: bool) -> tuple[Array, dict[str, Write]]:
        """The actions after a block."""
        normed = rms_norm(x, w["input_layernorm"], self.sizes.rms_eps)
        keys, values = (repeated(part, x.shape[0]) for part in seen)
        positions, mask = self.places.action
        q = self._heads(w["q_proj"], normed)
        if odd:
            positions, mask = positions - positions[:, :1], mask[:, :, : keys.shape[1]]
        else:
            own = self._keys_values(w, normed, positions)
            keys, values = (jnp.concatenate(parts, axis=1) for parts in zip((keys, values), own, strict=True))
        q = rotate(q, positions).astype(q.dtype)
        return self._finished(w, x, attend(q, keys, values, mask), gate)

    def _finished(self, w: Weights, x: Array, attended: Array, gate: Leaf) -> tuple[Array, dict[str, Write]]:
        """The residual sums of attention and feed-forward, under the block's gate, and what was added if captured."""
        dtype = x.dtype
        attended = attended.astype(dtype)
        y = x + attended @ w["o_proj"].astype(dtype)
        normed = rms_norm(y, w["post_attention_layernorm"], self.sizes.rms_eps)
        hidden = jax.nn.silu(normed @ w["gate_proj"].astype(dtype)) * (normed @ w["up_proj"].astype(dtype))
        y = y + hidden @ w["down_proj"].astype(dtype)
        writes = {"attention": Write(attended), "mlp": Write(hidden)} if self.capture == "writes" else {}
        return (y if gate is None else gated(x, y, gate)), writes


def _kinds(weights: Streams, gates: Streams, cache: Pair | None) -> Pair:
    """What all even blocks need, and what all odd ones do."""
    split = Streams(*(None if g is None else Pair(jnp.asarray(g)[0::2], jnp.asarray(g)[1::2]) for g in gates))
    return Pair(*(Step(_of(kind, weights), _of(kind, split), cache and cache[kind]) for kind in (0, 1)))


def _of(kind: int, streams: Streams) -> Streams:
    return Streams(*(None if pair is None else pair[kind] for pair in streams))


def _at(index: Any, tree: Step) -> Step:
    return jax.tree.map(lambda x: x[index], tree)
