"""Samples a tile of rows at a time, so that what is computed from them is never whole in memory."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from clp_jax.aliases import Array

ROWS = 256
"""Rows of a tile: the fastest of 128, 256 and 512 on CPU, and a multiple of the 128 of a TPU's matrix unit."""


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
        fresh = start + jnp.arange(self.rows) >= block * self.rows
        return jax.lax.dynamic_slice_in_dim(self.valid, start, self.rows) & fresh

    def __call__(self, block: Array) -> Float[Array, "l t d"]:
        """The rows of a tile in float32, those that do not count among them."""
        return jax.lax.dynamic_slice_in_dim(self.states, self.start(block), self.rows, axis=1).astype(jnp.float32)

    def map(self, function: Callable[[Array], Any]) -> Any:
        """The tree ``function(block)`` of every block, stacked."""
        return jax.lax.map(function, jnp.arange(self.blocks))

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

    def means(self, weights: Float[Array, "blocks _ t"]) -> tuple[Float[Array, "l d"], Float[Array, "l d"]]:
        """The weighted mean of each layer and that of what is left without it.

        The second takes away the rounding of the first, which matters once the mean is many times the spread. What
        both leave of constant features is at most one rounding of the mean per value.
        """
        total = jnp.sum(weights, axis=(0, 2))[:, None]
        total = jnp.where(total > 0, total, 1)

        def mean_without(*means: Float[Array, "l d"]) -> Float[Array, "l d"]:
            # By tiles: a reduction of the whole array would first write all of it in float32 on CPU.
            weighted = self.sum(lambda block: jnp.sum(self.minus(block, *means) * weights[block][:, :, None], axis=1))
            return weighted / total

        mean = mean_without()
        return mean, mean_without(mean)

    def start(self, block: Array) -> Array:
        """Number of the first sample of a tile."""
        return jnp.minimum(block * self.rows, self.valid.shape[0] - self.rows)
