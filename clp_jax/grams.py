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
from jaxtyping import Bool, Float, Int

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


class Origin(NamedTuple):
    """Where tokens are counted from.

    Attributes:
      centre: p.
      level: mean of r.
    """

    centre: Float[Array, "l d"]
    level: Float[Array, " l"]

    @classmethod
    def of(cls, tiles: Tiles, inverse: Float[Array, "l n"], counts: Bool[Array, " n"]) -> "Origin":
        """That of the samples that count here."""
        weights = jnp.where(counts, inverse, 0)
        weight = jnp.sum(weights, axis=1)
        total = tiles.sum(lambda block: jnp.sum(tiles.minus(block) * tiles.part(weights, block)[:, :, None], axis=1))
        return cls(
            total / jnp.where(weight > 0, weight, 1)[:, None],
            weight / jnp.maximum(jnp.sum(counts, dtype=jnp.float32), 1),
        )


class Scaling(NamedTuple):
    """What makes y of a state: with p, y = r x - (mean of r) p = r (x - p) + (r - mean of r) p.

    Attributes:
      inverse: r; 0 where a sample does not count.
      apart: r - mean of r; 0 where a sample does not count.
      short: which tokens are so much shorter than p that the first form is taken: in the second their large r would
        multiply something large.
    """

    inverse: Float[Array, "l n"]
    apart: Float[Array, "l n"]
    short: Bool[Array, "l n"]

    @classmethod
    def of(cls, tiles: Tiles, origin: Origin, inverse: Float[Array, "l n"]) -> "Scaling":
        """With r rid of its rounding, large beside a small spread of directions: y + (mean of r) p tells its length."""
        apart = jnp.where(inverse > 0, inverse - origin.level[:, None], 0)
        short = inverse**2 * jnp.sum(origin.centre**2, axis=1, keepdims=True) > 4 * origin.centre.shape[1]
        rough, start = cls(inverse, apart, short), (origin.level[:, None] * origin.centre)[:, None]

        def excess(block: Array) -> Float[Array, "l t"]:
            y = rough.part(tiles, block).points(tiles(block), origin)
            return jnp.mean(jnp.where(tiles.mask(block)[:, None], y * (y + 2 * start), 0), axis=2)

        more = tiles.each(excess) + (jnp.mean(start**2, axis=2) - 1)
        turn = jnp.where(jnp.abs(more) < _ROUNDING, inverse * more / 2, 0)
        return cls(inverse - turn, apart - turn, short)

    def part(self, tiles: Tiles, block: Array) -> "Scaling":
        """That of one tile."""
        return Scaling(*(tiles.part(x, block) for x in self))

    def at(self, places: Array) -> "Scaling":
        """That of some samples."""
        return Scaling(*(jnp.take(x, places, axis=1) for x in self))

    def points(self, states: Float[Array, "l n d"], origin: Origin) -> Float[Array, "l n d"]:
        """y of these samples."""
        centre, level = origin.centre[:, None, :], origin.level[:, None, None]
        inverse, apart, short = (x[:, :, None] for x in self)
        start = jnp.where(short, states, states - centre)
        return start * inverse + jnp.where(short, -level, apart) * centre


class Tokens(NamedTuple):
    """Samples of which Gram matrices are made; the letters are those on top of this module and of `clp_jax.cka`.

    Attributes:
      features: y, zero where a sample does not count.
      counts: which samples do.
      scale: 1 / r.
      apart: r - mean of r.
      along: v . p.
      centring: u, for raw and rms.
    """

    features: Float[Array, "l t d"]
    counts: Bool[Array, " t"]
    scale: Float[Array, "l t"]
    apart: Float[Array, "l t"]
    along: Float[Array, "l t"]
    centring: Float[Array, "2 l t"]

    def centred(self, other: "Tokens", *grams: Float[Array, "l t t"]) -> list[Float[Array, "l t t"]]:
        """Gram matrices of these samples with others, raw and rms, U-centred; zero where a sample does not count."""
        counts = self.counts[:, None] & other.counts[None, :]
        rows, columns = self.centring[:, :, :, None], other.centring[:, :, None, :]
        return [
            jnp.where(counts, gram - row - column, 0) for gram, row, column in zip(grams, rows, columns, strict=True)
        ]


class AllTokens(NamedTuple):
    """All samples, of which features are made only when a tile of them is needed: they are as large as the states.

    Attributes:
      origin: where they are counted from.
      scaling: what makes features of states.
      along: v . p.
      centring: u, for raw and rms.
    """

    origin: Origin
    scaling: Scaling
    along: Float[Array, "l n"]
    centring: Float[Array, "2 l n"]

    def tile(self, tiles: Tiles, block: Array) -> Tokens:
        """The samples of a tile."""
        scaling = self.scaling.part(tiles, block)
        of_tile = [tiles.part(x, block) for x in (self.along, self.centring)]
        return _tokens(scaling.points(tiles(block), self.origin), tiles.mask(block), scaling, *of_tile)

    def at(self, places: Array, states: Float[Array, "l k d"], counts: Bool[Array, " k"]) -> Tokens:
        """Some samples, whose states these are."""
        scaling = self.scaling.at(places)
        of_places = [jnp.take(x, places, axis=-1) for x in (self.along, self.centring)]
        return _tokens(scaling.points(states, self.origin), counts, scaling, *of_places)


class Far(NamedTuple):
    """The farthest samples once more.

    Attributes:
      tokens: they.
      products: their Gram matrices, raw and rms, each multiplied by itself at full precision.
    """

    tokens: Tokens
    products: Float[Array, "2 l k k"]

    def correction(self) -> list[tuple[Float[Array, "l k k"], Float[Array, "l k k"]]]:
        """Raw and rms: the U-centred Gram matrix as it should be, and as tiles of all samples have it."""
        exact = self.tokens.centred(self.tokens, *self.products)
        return list(zip(exact, grams(self.tokens, self.tokens), strict=True))


def grams(a: Tokens, b: Tokens) -> list[Float[Array, "l t t"]]:
    """U-centred Gram matrices of all layers, raw and rms; the diagonal is left in."""
    rms = jnp.einsum("lad,lbd->lab", a.features, b.features, precision=_SPLIT)
    across = _outer(a.apart, b.along) + _outer(a.along, b.apart)
    return a.centred(b, _outer(a.scale, b.scale) * (rms - across), rms)


def all_and_far(
    states: Float[Array, "l n d"], valid: Bool[Array, " n"], rows: int
) -> tuple[AllTokens, Far, Float[Array, "2 l n"], Float[Array, "2 l"]]:
    """What the Gram matrices of all layers are made of, at both scales.

    Args:
      states: features of the same samples at l layers, any float dtype.
      valid: which samples count; the other rows may hold anything.
      rows: that are read at a time, about.

    Returns:
      All samples; the farthest ones; the squared distances of all from their mean, raw and rms; and how much of the sum
      of those may be rounding.
    """
    tiles = Tiles.of(states, valid, rows)
    count = jnp.maximum(tiles.count, 1)
    inverse = _inverse(tiles)
    places, chosen = _farthest(tiles, inverse)
    past = jnp.where(chosen, places, len(valid))
    near = valid.at[past].set(False, mode="drop")
    origin = Origin.of(tiles, inverse, near)
    scaling = Scaling.of(tiles, origin, inverse)

    def points(block: Array) -> tuple[Float[Array, "l t d"], Float[Array, "l t d"]]:
        y = scaling.part(tiles, block).points(tiles(block), origin)
        return tiles.minus(block, origin.centre), jnp.where(tiles.mask(block)[:, None], y, 0)

    far_states = jnp.take(states, places, axis=1).astype(jnp.float32)
    far_points = jnp.stack([far_states - origin.centre[:, None], scaling.at(places).points(far_states, origin)])
    far_points = jnp.where(chosen[:, None], far_points, 0)

    def of_near_ones(block: Array) -> Float[Array, "2 l d"]:
        counts = tiles.part(near, block)[:, None]
        return jnp.stack([jnp.sum(jnp.where(counts, x, 0), axis=1) for x in points(block)])

    of_near = tiles.sum(of_near_ones)
    total = of_near + jnp.sum(far_points, axis=2)

    def along_width(block: Array) -> tuple[Float[Array, "2 l t"], Float[Array, "2 l t"], Float[Array, "l t"]]:
        both = points(block)
        squares = jnp.stack([jnp.sum(x**2, axis=2) for x in both])
        with_total = jnp.stack([jnp.sum(x * y[:, None], axis=2) for x, y in zip(both, total, strict=True)])
        return squares, with_total, jnp.sum(both[1] * origin.centre[:, None], axis=2)

    squares, with_total, of_centre = tiles.each(along_width)
    along = of_centre - scaling.apart * jnp.sum(origin.centre**2, axis=1, keepdims=True) / 2
    mean = total / count
    norms = squares - 2 / count * with_total + jnp.sum(mean**2, axis=2, keepdims=True)
    norms = jnp.where(valid, jnp.maximum(norms, 0), 0)
    # Of a far token this sum is not to be taken from one that it is in.
    row_sums = with_total - squares
    products = jnp.einsum("slad,slbd->slab", far_points, far_points, precision=HIGHEST)
    among_far = jnp.sum(jnp.where(jnp.eye(len(places), dtype=bool), 0, products), axis=3)
    far_rows = jnp.einsum("sld,slkd->slk", of_near, far_points, precision=HIGHEST) + among_far
    row_sums = row_sums.at[:, :, past].set(far_rows, mode="drop")
    n = jnp.maximum(tiles.count, 3)  # no estimator takes fewer
    centring = (row_sums - jnp.sum(row_sums, axis=2, keepdims=True) / (2 * (n - 1))) / (n - 2)
    tokens = AllTokens(origin, scaling, along, centring)
    # What is lost where features are counted from their mean, and twice what r and the length of r x lose.
    lost = jnp.stack([jnp.sum((origin.centre + mean[0]) ** 2, axis=1), jnp.full(len(states), 4.0 * states.shape[2])])
    return tokens, Far(tokens.at(places, far_states, chosen), products), norms, EPS**2 * count * lost


def _tokens(
    features: Float[Array, "l t d"],
    counts: Bool[Array, " t"],
    scaling: Scaling,
    along: Float[Array, "l t"],
    centring: Float[Array, "2 l t"],
) -> Tokens:
    scale = 1 / jnp.where(scaling.inverse > 0, scaling.inverse, 1)
    return Tokens(jnp.where(counts[:, None], features, 0), counts, scale, scaling.apart, along, centring)


def _inverse(tiles: Tiles) -> Float[Array, "l n"]:
    """r: 1 / RMS of each sample; 1 for zeros, and 0 where a sample does not count."""
    square = tiles.each(lambda block: jnp.mean(tiles(block) ** 2, axis=2))
    return jnp.where(tiles.valid, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def _farthest(tiles: Tiles, inverse: Float[Array, "l n"]) -> tuple[Int[Array, " k"], Bool[Array, " k"]]:
    """The samples with the largest shares of the squared distances in any layer and scale, a quarter of all at most.

    Distances are from the plain means of x and of r x: p would be near the shortest tokens.

    Returns:
      Their numbers, and which of these count.
    """

    def samples(block: Array) -> tuple[Float[Array, "l t d"], Float[Array, "l t d"]]:
        rows = tiles.minus(block)
        return rows, rows * tiles.part(inverse, block)[:, :, None]

    total = tiles.sum(lambda block: jnp.stack([jnp.sum(x, axis=1) for x in samples(block)]))
    means = (total / jnp.maximum(tiles.count, 1))[:, :, None]
    distances = tiles.each(
        lambda block: jnp.stack(
            [jnp.sum((x - mean) ** 2, axis=2) for x, mean in zip(samples(block), means, strict=True)]
        )
    )
    distances = jnp.where(tiles.valid, distances, 0)
    share = jnp.max(jnp.where(distances > 0, distances / jnp.sum(distances, axis=2, keepdims=True), 0), axis=(0, 1))
    n = len(share)
    places = jnp.argsort(-share)[: min(_FAR, max(n // 4, 1))]
    return places, jnp.arange(len(places)) < tiles.count // 4


def _outer(x: Array, y: Array) -> Array:
    return x[:, :, None] * y[:, None, :]
