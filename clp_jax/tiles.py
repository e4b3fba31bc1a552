"""Samples a tile of rows at a time, so that what is computed from them is never whole in memory."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Shaped

from clp_jax.aliases import Array

ROWS = 256
"""Rows of a tile that is multiplied: the fastest of 128, 256 and 512 on CPU, and a multiple of the 128 of a TPU's
matrix unit."""
PASS_ROWS = 128
"""Rows of a tile that is only read: so few stay in a CPU's cache between the operations on them."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Features of the same n samples at l layers, in tiles of t rows.

    Attributes:
      states: features [l, n, d], any float dtype.
      valid: which samples count [n]; the other rows may hold anything.
      rows: of a tile: t.
      blocks: tiles that cover all samples.
    """

    states: Float[Array, "l n d"]
    valid: Bool[Array, " n"]
    rows: int
    blocks: int

    @classmethod
    def of(cls, states: Float[Array, "l n d"], valid: Bool[Array, " n"], rows: int) -> "Tiles":
        """Tiles of about so many rows that cover the samples evenly: a multiple of 8 unless one tile holds them all."""
        n = states.shape[1]
        if n <= rows:
            return cls(states, valid, n, 1)
        rows = min(n, 8 * math.ceil(n / math.ceil(n / rows) / 8))
        return cls(states, valid, rows, math.ceil(n / rows))

    @property
    def count(self) -> Float[Array, ""]:
        """Valid samples."""
        return jnp.sum(self.valid, dtype=jnp.float32)

    def mask(self, block: Array) -> Bool[Array, " t"]:
        """Which rows of a tile count.

        The last tile begins early enough to be full and masks the rows of the tile before: the states need no padding.
        """
        start = self.start(block)
        return self.part(self.valid, block) & (start + jnp.arange(self.rows) >= block * self.rows)

    def __call__(self, block: Array) -> Float[Array, "l t d"]:
        """The rows of a tile in float32, those that do not count among them."""
        return jax.lax.dynamic_slice_in_dim(self.states, self.start(block), self.rows, axis=1).astype(jnp.float32)

    def each(self, function: Callable[[Array], Any]) -> Any:
        """The trees ``function(block)`` [..., t] of all blocks, side by side [..., n]."""

        def side_by_side(x: Float[Array, "blocks *axes t"]) -> Float[Array, "*axes n"]:
            # What the last tile has again of the one before is taken from that one.
            fresh = self.valid.shape[0] - (self.blocks - 1) * self.rows
            first = jnp.moveaxis(x[:-1], 0, -2).reshape(*x.shape[1:-1], -1)
            return jnp.concatenate([first, x[-1, ..., self.rows - fresh :]], axis=-1)

        return jax.tree.map(side_by_side, jax.lax.map(function, jnp.arange(self.blocks)))

    def part(self, values: Shaped[Array, "*axes n"], block: Array) -> Shaped[Array, "*axes t"]:
        """Of numbers that every sample has, those of a tile, whose `mask` says which count."""
        return jax.lax.dynamic_slice_in_dim(values, self.start(block), self.rows, axis=-1)

    def sum(self, term: Callable[[Array], Any]) -> Any:
        """Sum of the tree ``term(block)`` over all blocks."""
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(term, jnp.int32(0)))
        return jax.lax.fori_loop(0, self.blocks, lambda block, total: jax.tree.map(jnp.add, total, term(block)), zeros)

    def minus(self, block: Array, *means: Float[Array, "l d"]) -> Float[Array, "l t d"]:
        """The rows of a tile without these means; zeros where they do not count."""
        rows = self(block)
        for mean in means:
            rows = rows - mean[:, None, :]
        return jnp.where(self.mask(block)[None, :, None], rows, 0)

    def means(self) -> tuple[Float[Array, "l d"], Float[Array, "l d"]]:
        """The mean of each layer and that of what is left without it.

        The second takes away the rounding of the first, which matters once the mean is many times the spread. What
        both leave of constant features is at most one rounding of the mean per value.
        """

        def mean_without(*means: Float[Array, "l d"]) -> Float[Array, "l d"]:
            # By tiles: a reduction of the whole array would first write all of it in float32 on CPU.
            return self.sum(lambda block: jnp.sum(self.minus(block, *means), axis=1)) / jnp.maximum(self.count, 1)

        mean = mean_without()
        return mean, mean_without(mean)

    def start(self, block: Array) -> Array:
        """Number of the first sample of a tile."""
        return jnp.minimum(block * self.rows, self.valid.shape[0] - self.rows)
