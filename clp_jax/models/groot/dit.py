"""The diffusion transformer: blocks that read the prompt and blocks that read their own tokens take turns.

The two kinds differ in the shapes of keys and values, so each has leaves of its own, stacked over its blocks, and one
scan runs over pairs. An odd number of blocks ends with a block that reads the prompt, behind the scan.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt32

from clp_jax.aliases import AnyArray, Array, Tree
from clp_jax.models.groot.architecture import DitSizes
from clp_jax.models.groot.dropout import Site, block_keys, dropped
from clp_jax.models.groot.transformer import (
    BLOCK_EPS,
    Attention,
    Captured,
    FeedForward,
    KeysValues,
    branch_ends,
    norm,
)
from clp_jax.models.layers.gating import gated
from clp_jax.models.layers.scan import Rows, checkpointed, pinned
from clp_jax.models.towers import Capture, Write

_LONGEST = 10_000.0
_OUT_EPS = 1e-6

_TOWER = 1
"""Of the random numbers, other than those of the transformer before this."""


def waves(steps: Int[AnyArray, " b"], exponents: Float[np.ndarray, " d"]) -> Float[Array, "b d"]:
    """Angles of time steps at the frequencies ``10000 ** -exponent``, in float32."""
    frequencies = (_LONGEST**-exponents).astype(np.float32)
    return jnp.asarray(steps).astype(jnp.float32)[:, None] * frequencies


class DitBlock(nn.Module):
    """Pre-norm block whose first norm is scaled and shifted by time; its gate acts on the whole block."""

    sizes: DitSizes
    dtype: str
    rows: Rows = None

    def setup(self) -> None:
        width, dtype = self.sizes.width, self.dtype
        plain = {"epsilon": BLOCK_EPS, "use_scale": False, "use_bias": False, "dtype": dtype}
        self.norm1, self.norm3 = norm(**plain), norm(**plain)
        self.modulation = nn.Dense(2 * width, dtype=dtype)
        self.attn = Attention(width, self.sizes.num_heads, dtype, self.sizes.adapters)
        self.ff = FeedForward(self.sizes, dtype)

    def keys_values(self, context: Float[Array, "b s c"], keys: Any = None) -> KeysValues:
        """What a block that reads the context sees; the context is not normalised in the block."""
        return self.attn.keys_values(context, keys)

    def __call__(
        self,
        x: Float[Array, "r t d"],
        time: Float[Array, "r d"],
        seen: KeysValues | None,
        gate: Float[AnyArray, " _g"] | None,
        mask: Bool[Array, "b s"] | None = None,
        keys: Any = None,
    ) -> tuple[Float[Array, "r t d"], dict[str, Write]]:
        """The stream after the block, and what was written into it.

        A block that sees nothing given reads its own tokens, all of them.
        """
        x = inputs = pinned(x, self.rows)
        scale, shift = jnp.split(self.modulation(nn.silu(time))[:, None], 2, axis=-1)
        normed = self.norm1(x) * (1 + scale) + shift
        read = self.attn(normed, self.attn.keys_values(normed, keys) if seen is None else seen, mask, keys)
        ends = branch_ends(self.sizes, Site.ATTENTION, Site.AGAIN)
        x = x + dropped(self.attn.write(read), keys, self.sizes.dropout, *ends)
        hidden = self.ff.hidden(self.norm3(x), keys)
        x = x + self.ff.write(hidden, keys)
        return (x if gate is None else gated(inputs, x, gate)), {"attention": Write(read), "mlp": Write(hidden)}

    def whole(
        self, x: Float[Array, "r t d"], time: Float[Array, "r d"], context: Float[Array, "b s c"] | None
    ) -> Array:
        """The block on a context, for its parameters' shapes."""
        return self(x, time, None if context is None else self.keys_values(context), None)[0]


class Dit(nn.Module):
    """Time embedding, blocks, and the output's norm and projections.

    Parameters ``cross`` and ``self`` hold blocks 0, 2, ... and 1, 3, ...
    """

    sizes: DitSizes
    context_width: int
    dtype: str
    remat: str = "all"
    rows: Rows = None

    def setup(self) -> None:
        width, dtype = self.sizes.width, self.dtype
        self.time_1, self.time_2 = nn.Dense(width, dtype=dtype), nn.Dense(width, dtype=dtype)
        depth = self.sizes.depth
        self.cross = self.param("cross", self._init_blocks, (depth + 1) // 2, self.context_width)
        self.own = self.param("self", self._init_blocks, depth // 2, None)
        self.out_norm = norm(epsilon=_OUT_EPS, use_scale=False, use_bias=False, dtype=dtype)
        self.proj_out_1, self.proj_out_2 = (
            nn.Dense(2 * width, dtype=dtype),
            nn.Dense(self.sizes.output_width, dtype=dtype),
        )

    def keys_values(self, context: Float[Array, "b s c"]) -> KeysValues:
        """Keys and values of the context in every block that reads it, which depend on neither actions nor time."""
        block = self._block()
        return jax.lax.map(lambda row: _apply(block, row, context, method="keys_values"), self.cross)

    def embed_time(self, steps: Int[AnyArray, " r"]) -> Float[Array, "r d"]:
        """Embedding of a rounded time."""
        half = self.sizes.time_channels // 2
        angles = waves(steps, np.arange(half) / (half - 1))
        table = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return self.time_2(nn.silu(self.time_1(table.astype(self.dtype))))

    def __call__(
        self,
        x: Float[Array, "r t d"],
        steps: Int[AnyArray, " r"],
        context: Float[Array, "b s c"] | KeysValues,
        mask: Bool[Array, "b s"] | None = None,
        seeds: UInt32[AnyArray, " b"] | None = None,
        *,
        gates: Float[AnyArray, "depth _g"] | None = None,
        capture: Capture = False,
    ) -> tuple[Float[Array, "r t o"], Captured | None]:
        """Run the blocks.

        Args:
          x: state, future and action tokens, one or several rows per row of the context.
          steps: rounded times.
          context: the prompt's features, or what `keys_values` made of them.
          mask: True for tokens of the context that are read; all are if None.
          seeds: of what training leaves out, one per row of the context; nothing if None.
          gates: per block, for the batch, for each observation or for each row.
          capture: also return the residual stream, and what is written into it.

        Returns:
          Tokens for the decoder, and what was captured (None if nothing was).
        """
        time = self.embed_time(steps)
        keys = block_keys(seeds, _TOWER, self.sizes.depth, x.shape[0])
        y, captured = self._blocks(x, time, context, mask, gates, keys, capture=capture)
        shift, scale = jnp.split(self.proj_out_1(nn.silu(time))[:, None], 2, axis=-1)
        out = self.proj_out_2(self.out_norm(y) * (1 + scale) + shift)
        if captured is None:
            return out, None
        states, writes = captured
        return out, Captured(jnp.concatenate([x[None], states]), writes)

    def _blocks(self, x, time, context, mask, gates, keys, *, capture):
        """The stream after the last block; after each [depth, r, t, d] and what was written into it, if captured."""
        block, pairs = self._block(), self.sizes.depth // 2
        given = context if isinstance(context, tuple) else None
        draws = 1 if isinstance(context, tuple) else x.shape[0] // context.shape[0]

        def pair(x, row):
            cross, own, gates, keys, seen = row
            keys = (None, None) if keys is None else keys
            if seen is None:  # draws of one observation see one context, with the first one's masks
                of_context = None if keys[0] is None else keys[0][::draws]
                seen = _apply(block, cross, context, of_context, method="keys_values")
            between, writes = _apply(block, cross, x, time, seen, None if gates is None else gates[0], mask, keys[0])
            first = (between, writes if capture == "writes" else {})
            if own is None:
                return between, jax.tree.map(lambda x: x[None], first) if capture else None
            after, writes = _apply(block, own, between, time, None, None if gates is None else gates[1], None, keys[1])
            second = (after, writes if capture == "writes" else {})
            return after, jax.tree.map(lambda *both: jnp.stack(both), first, second) if capture else None

        pair = checkpointed(pair, self.remat)
        every_second = None if gates is None else jnp.asarray(gates)[: 2 * pairs].reshape(pairs, 2, -1)
        of_pairs = None if keys is None else keys[: 2 * pairs].reshape(pairs, 2, -1)
        rows = (_rows(self.cross, slice(pairs)), self.own, every_second, of_pairs, _rows(given, slice(pairs)))
        y, captured = jax.lax.scan(pair, x, rows)
        captured = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), captured)
        if self.sizes.depth % 2:
            last = (
                _rows(self.cross, pairs),
                None,
                None if gates is None else jnp.asarray(gates)[-1:],
                None if keys is None else keys[-1:],
                _rows(given, pairs),
            )
            y, end = pair(y, last)
            captured = jax.tree.map(lambda *both: jnp.concatenate(both), captured, end)
        return y, captured

    def _block(self) -> DitBlock:
        return DitBlock(self.sizes, self.dtype, self.rows, parent=None)

    def _init_blocks(self, rng: Array, count: int, context_width: int | None) -> Tree:
        x, time = jnp.zeros((1, 1, self.sizes.width)), jnp.zeros((1, self.sizes.width))
        context = None if context_width is None else jnp.zeros((1, 1, context_width))
        block = DitBlock(self.sizes, self.dtype, parent=None)
        keys = jax.random.split(rng, count)
        return jax.vmap(lambda key: block.init(key, x, time, context, method="whole")["params"])(keys)


def _apply(block: DitBlock, params: Tree, *inputs: Any, method: str | None = None) -> Any:
    return block.apply({"params": params}, *inputs, method=method)


def _rows(tree: Any, index: slice | int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)
