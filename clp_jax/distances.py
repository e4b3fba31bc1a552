"""How far apart the hidden states of a token are: what CKA, blind to rotation and scale, does not see.

Axes: l states (depth + 1), n samples, d width, t rows of a tile, i and j states, k and m steps between states.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from clp_jax.aliases import Array
from clp_jax.tiles import ROWS, Tiles

_HIGHEST = jax.lax.Precision.HIGHEST  # the default rounds operands to bfloat16 (TPU) or TF32 (GPU)


class PairSums(NamedTuple):
    """Sums over valid samples of what `pair_statistics` measures between the states i and j of a token.

    Attributes:
      cosine: cos(h_i, h_j).
      angle: arccos of it, in half turns.
      residual: |h_j - h_i|^2 / |h_i|^2, not symmetric.
      squared: (h_j - h_i)^2, mean over d.
      count: valid samples.
    """

    cosine: Float[Array, "*g l l"]
    angle: Float[Array, "*g l l"]
    residual: Float[Array, "*g l l"]
    squared: Float[Array, "*g l l"]
    count: Float[Array, "*g"]


def pair_statistics(states: Float[Array, "l n d"], valid: Bool[Array, " n"], *, tile: int = ROWS) -> PairSums:
    """How far apart two states of the same token are, for all pairs of states: what CKA, blind to rotation, misses.

    Accurate for states that differ little: distances come from the steps between consecutive states, the cosine and
    the angle from the distance of the unit vectors (1 - cos is |u_j - u_i|^2 / 2). Costs about 4 n l^2 d FLOPs.

    Args:
      states: features of the same samples at l layers, any float dtype.
      valid: which samples count; the other rows may hold anything. A valid row of zeros has no direction: NaN.
      tile: rows at a time.
    """
    tiles = Tiles.of(states, valid, tile)

    def of_tile(block: Array) -> tuple[Array, ...]:
        rows, mask = tiles(block), tiles.mask(block)
        norms = jnp.sqrt(jnp.sum(rows * rows, axis=-1))
        squared, chord = _squared_distances(rows), _squared_distances(rows / norms[:, :, None])
        angle = 2 / jnp.pi * jnp.arcsin(jnp.minimum(jnp.sqrt(chord) / 2, 1))
        residual = squared / (norms * norms).T[:, :, None]
        values = (1 - chord / 2, angle, residual, squared / states.shape[2])
        return tuple(jnp.sum(jnp.where(mask[:, None, None], x, 0), axis=0) for x in values)

    return PairSums(*tiles.sum(of_tile), count=tiles.count)


def _squared_distances(points: Float[Array, "l t d"]) -> Float[Array, "t l l"]:
    """|p_j - p_i|^2 of all pairs i, j of a token's points.

    From the products of the steps between consecutive points, so that small distances between long vectors keep their
    digits; |p_i|^2 + |p_j|^2 - 2 p_i . p_j would cancel them.
    """
    layers = points.shape[0]
    steps = points[1:] - points[:-1]
    products = jnp.einsum("ktd,mtd->tkm", steps, steps, precision=_HIGHEST)
    ones = jnp.ones((layers - 1, layers), jnp.float32)
    # |p_{m+1} - p_i|^2 - |p_m - p_i|^2 = step_m . (step_m + 2 sum of step_k over i <= k < m)
    behind = jnp.einsum("ik,tkm->tim", jnp.triu(ones[:, 1:]), jnp.triu(products, 1), precision=_HIGHEST)
    growth = jnp.triu(2 * behind + jnp.diagonal(products, axis1=1, axis2=2)[:, None, :])
    above = jnp.einsum("tim,mj->tij", growth, jnp.triu(ones, 1), precision=_HIGHEST)
    above = jnp.maximum(jnp.pad(above, ((0, 0), (0, 1), (0, 0))), 0)
    return above + above.swapaxes(1, 2)
