"""Gram matrices of the tokens of all layers, tile by tile, at both scales, with what U-centres them.

One product per tile gives the Gram matrices of both scales. Write r_a for 1 / RMS of token x_a and p for the mean of
the tokens weighted by r_a. The centred rms tokens, and the raw ones counted from p and divided by their RMS, are

    y_a = r_a (x_a - p) + (r_a - mean of r) p        and        z_a = r_a (x_a - p) = y_a - (r_a - mean of r) p,

so that with v_a = (y_a + z_a) / 2 and w_a = (r_a - mean of r) p the raw product is
z_a . z_b = y_a . y_b - v_a . w_b - w_a . v_b: two numbers per token turn the one matrix into the other. That direction
is safe, the other is not: RMS takes away what only makes tokens of a common direction longer or shorter. The products
that are left are no larger than raw ones (|x| |x/|x| - y/|y|| <= 2 |x - y|, Dunkl and Williams 1964), so rounding stays
rounding.

Rounding is relative to how far tokens are from where they are counted from, and a few of them may be 10^4 times as far
as the others (massive activations). So the farthest tokens have no part in p, their sums over the others are not taken
from sums that they are in, and among themselves they are multiplied at full precision, for nothing averages out there.

Axes and letters as in `clp_jax.cka`; k far tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from clp_jax.aliases import Array
from clp_jax.tiles import Tiles

_SPLIT = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3
"""Of the products of width d: 3 passes of bfloat16 matrix units where the program is compiled for such, float32 on CPU.

Both operands are split in two bfloat16 parts of which the product of the small ones is left out: 2^-18 of a term, of
either sign, that averages out over the n^2 entries of a Gram matrix. Not so on its diagonal, which is taken from sums.
"""

HIGHEST = jax.lax.Precision.HIGHEST
"""Of the products between Gram matrices, where the parts left out would all be positive; they are a hundredth."""

EPS = float(jnp.finfo(jnp.float32).eps)

_FAR = 64
"""The most tokens that are treated as far; more of them are so many pairs that rounding averages out."""

_ROUNDING = 1e-3
"""How far from 1 the square of a length may be that is 1 but for rounding; zeros have none."""


class Tokens(NamedTuple):
    """Samples in tiles, zero where they do not count; the letters are those on top of this module and of `clp_jax.cka`.

    Attributes:
      features: y.
      counts: which samples do.
      scale: 1 / r.
      apart: r - mean of r.
      along: v . p.
      centring: u, for raw and rms.
    """

    features: Float[Array, "blocks l t d"]
    counts: Bool[Array, "blocks 1 t"]
    scale: Float[Array, "blocks l t"]
    apart: Float[Array, "blocks l t"]
    along: Float[Array, "blocks l t"]
    centring: Float[Array, "blocks 2 l t"]

    def at(self, block: Array, row: Array) -> "Tokens":
        """The samples at these places in one tile; zeros for places past the end."""

        def taken(x: Array, between: int) -> Array:
            found = x.at[block, *[slice(None)] * between, row].get(mode="fill", fill_value=0)
            return jnp.moveaxis(found, 0, between)[None]

        return Tokens(*(taken(x, 2 if name == "centring" else 1) for name, x in self._asdict().items()))

    def grams(self, a: Array, b: Array) -> list[Float[Array, "l t t"]]:
        """Tile (a, b) of the U-centred Gram matrices of all layers, raw and rms; the diagonal is left in."""
        rms = jnp.einsum("lad,lbd->lab", self.features[a], self.features[b], precision=_SPLIT)
        across = _outer(self.apart[a], self.along[b]) + _outer(self.along[a], self.apart[b])
        return self.centred(a, b, _outer(self.scale[a], self.scale[b]) * (rms - across), rms)

    def centred(self, a: Array, b: Array, *grams: Float[Array, "l t t"]) -> list[Float[Array, "l t t"]]:
        """Tile (a, b) of Gram matrices, raw and rms, U-centred; zero where a sample does not count."""
        counts = _outer(self.counts[a], self.counts[b])
        rows, columns = self.centring[a][:, :, :, None], self.centring[b][:, :, None, :]
        return [
            jnp.where(counts, gram - row - column, 0) for gram, row, column in zip(grams, rows, columns, strict=True)
        ]


class Far(NamedTuple):
    """The farthest samples once more, in one tile.

    Attributes:
      tokens: they.
      products: their Gram matrices, raw and rms, each multiplied by itself at full precision.
    """

    tokens: Tokens
    products: Float[Array, "2 l k k"]

    def correction(self) -> list[tuple[Float[Array, "l k k"], Float[Array, "l k k"]]]:
        """Raw and rms: the U-centred Gram matrix as it should be, and as tiles of all samples have it."""
        only = jnp.int32(0), jnp.int32(0)
        return list(zip(self.tokens.centred(*only, *self.products), self.tokens.grams(*only), strict=True))


class _Origin(NamedTuple):
    """Where tokens are counted from: p, and the mean of r."""

    centre: Float[Array, "l d"]
    level: Float[Array, " l"]

    @classmethod
    def of(cls, tiles: Tiles, inverse: Float[Array, "blocks l t"], counts: Bool[Array, "blocks 1 t"]) -> "_Origin":
        """That of the samples that count here."""
        weights = jnp.where(counts, inverse, 0)
        weight = jnp.sum(weights, axis=(0, 2))
        total = tiles.sum(lambda block: jnp.sum(tiles.minus(block) * weights[block][:, :, None], axis=1))
        return cls(
            total / jnp.where(weight > 0, weight, 1)[:, None],
            weight / jnp.maximum(jnp.sum(counts, dtype=jnp.float32), 1),
        )

    def points(self, tiles: Tiles, block: Array, inverse: Float[Array, "l t"]) -> tuple[Array, Array, Array, Array]:
        """The samples of a tile counted from here.

        Returns:
          x - p and y [l, t, d]; r rid of its rounding, and that less the mean of r [l, t].
        """
        centre, level = self.centre[:, None, :], self.level[:, None]
        rows, apart = tiles.minus(block, self.centre), jnp.where(inverse > 0, inverse - level, 0)
        # y = r x - (mean of r) p too: there the large r of tokens much shorter than p multiplies nothing large.
        short = inverse**2 * jnp.sum(self.centre**2, axis=-1, keepdims=True) > 4 * rows.shape[-1]
        origin, start = level[:, :, None] * centre, jnp.where(short[:, :, None], tiles.minus(block), rows)

        def scaled(inverse: Array, apart: Array) -> Array:
            return start * inverse[:, :, None] + jnp.where(short, -level, apart)[:, :, None] * centre

        # r has its rounding, which is large beside a small spread of directions: y + origin tells its length better.
        y = scaled(inverse, apart)
        excess = jnp.mean(y * (y + 2 * origin), axis=-1) + (jnp.mean(origin**2, axis=-1) - 1)
        turn = jnp.where(jnp.abs(excess) < _ROUNDING, inverse * excess / 2, 0)
        inverse, apart = inverse - turn, apart - turn
        return rows, scaled(inverse, apart), inverse, apart


def all_and_far(tiles: Tiles) -> tuple[Tokens, Far, Float[Array, "blocks 2 l t"], Float[Array, "2 l"]]:
    """What the Gram matrices of all layers are made of, at both scales.

    Returns:
      All samples in tiles; the farthest ones once more in a tile of their own; the squared distances of all from their
      mean, raw and rms; and how much of the sum of those may be rounding.
    """
    count = jnp.maximum(tiles.count, 1)
    inverse, counts = _inverse(tiles), tiles.map(tiles.mask)[:, None, :]
    places, is_far, far_tiles = _farthest(tiles, inverse)
    near = counts & ~is_far[:, None, :]
    origin = _Origin.of(tiles, inverse, near)
    tokens, squares = tiles.map(lambda block: _tokens(tiles, block, inverse[block], origin))

    def points(block: Array) -> tuple[Float[Array, "l t d"], Float[Array, "l t d"]]:
        return tiles.minus(block, origin.centre), tokens.features[block]

    far_points = jnp.stack([far_tiles.minus(jnp.int32(0), origin.centre), tokens.at(*places).features[0]])
    of_near = tiles.sum(
        lambda block: jnp.stack([jnp.sum(jnp.where(near[block][:, :, None], x, 0), axis=1) for x in points(block)])
    )
    total = of_near + jnp.sum(far_points, axis=2)
    with_total = tiles.map(
        lambda block: _along_width(*(x * y[:, None] for x, y in zip(points(block), total, strict=True)))
    )
    mean = total / count
    norms = squares - 2 / count * with_total + jnp.sum(mean**2, axis=-1, keepdims=True)
    norms = jnp.where(counts[:, None], jnp.maximum(norms, 0), 0)
    # Of a far token this sum is not to be taken from one that it is in.
    rows = with_total - squares
    products = jnp.einsum("slad,slbd->slab", far_points, far_points, precision=HIGHEST)
    among_far = jnp.sum(jnp.where(jnp.eye(products.shape[-1], dtype=bool), 0, products), axis=-1)
    far_rows = jnp.einsum("sld,slkd->slk", of_near, far_points, precision=HIGHEST) + among_far
    rows = rows.at[places[0], :, :, places[1]].set(jnp.moveaxis(far_rows, -1, 0), mode="drop")
    n = jnp.maximum(tiles.count, 3)  # no estimator takes fewer
    centring = (rows - jnp.sum(rows, axis=(0, 3), keepdims=True) / (2 * (n - 1))) / (n - 2)
    tokens = tokens._replace(centring=centring)
    # What is lost where features are counted from their mean, and twice what r and the length of r x lose.
    lost = jnp.stack([jnp.sum((origin.centre + mean[0]) ** 2, axis=-1), jnp.full(len(mean[0]), 4.0 * mean.shape[-1])])
    return tokens, Far(tokens.at(*places), products), norms, EPS**2 * count * lost


def _tokens(
    tiles: Tiles, block: Array, inverse: Float[Array, "l t"], origin: _Origin
) -> tuple[Tokens, Float[Array, "2 l t"]]:
    """One tile, not yet U-centred, and the squared lengths of its points, raw and rms."""
    rows, y, inverse, apart = origin.points(tiles, block, inverse)
    mask, centre = tiles.mask(block), origin.centre[:, None, :]
    along = jnp.sum(centre * (y - centre * apart[:, :, None] / 2), axis=-1)
    scale, squares = jnp.where(mask, 1 / jnp.where(mask, inverse, 1), 0), _along_width(rows**2, y**2)
    return Tokens(y, mask[None, :], scale, apart, along, jnp.zeros_like(squares)), squares


def _along_width(raw: Float[Array, "l t d"], rms: Float[Array, "l t d"]) -> Float[Array, "2 l t"]:
    return jnp.stack([jnp.sum(raw, axis=-1), jnp.sum(rms, axis=-1)])


def _inverse(tiles: Tiles) -> Float[Array, "blocks l t"]:
    """r: 1 / RMS of each sample; 1 for zeros, and 0 where a sample does not count."""
    square = tiles.map(lambda block: jnp.mean(tiles(block) ** 2, axis=-1))
    inverse = jax.lax.rsqrt(jnp.where(square > 0, square, 1))
    return jnp.where(tiles.map(tiles.mask)[:, None, :], inverse, 0)


def _farthest(
    tiles: Tiles, inverse: Float[Array, "blocks l t"]
) -> tuple[tuple[Array, Array], Bool[Array, "blocks t"], Tiles]:
    """The samples with the largest shares of the squared distances in any layer and scale, a quarter of all at most.

    Distances are from the plain means of x and of r x: p would be near the shortest tokens.

    Returns:
      Tile and row of each of them, past the end for those that do not count; whether a sample is one; the samples.
    """

    def samples(block: Array) -> tuple[Float[Array, "l t d"], Float[Array, "l t d"]]:
        rows = tiles.minus(block)
        return rows, rows * inverse[block][:, :, None]

    total = tiles.sum(lambda block: jnp.stack([jnp.sum(x, axis=1) for x in samples(block)]))
    means = (total / jnp.maximum(tiles.count, 1))[:, :, None]
    distances = tiles.map(
        lambda block: jnp.where(
            tiles.mask(block),
            _along_width(*((x - mean) ** 2 for x, mean in zip(samples(block), means, strict=True))),
            0,
        )
    )
    total = jnp.sum(distances, axis=(0, 3), keepdims=True)
    share = jnp.max(jnp.where(distances > 0, distances / total, 0), axis=(1, 2))
    n = tiles.states.shape[1]
    order = jnp.argsort(-share.ravel())[: min(_FAR, max(n // 4, 1))]
    chosen = jnp.arange(len(order)) < tiles.count // 4
    block, row = jnp.divmod(order, tiles.rows)
    places = jnp.where(chosen, block, tiles.blocks), row
    is_far = jnp.zeros(share.shape, bool).at[places].set(True, mode="drop")
    states = jnp.take(tiles.states, tiles.start(block) + row, axis=1)
    return places, is_far, Tiles(states, chosen, len(order), 1)


def _outer(x: Array, y: Array) -> Array:
    return x[:, :, None] * y[:, None, :]
