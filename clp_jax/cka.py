"""HSIC and CKA between the layers of one tower: mathematics only, meant to run inside the jit of a forward pass.

All pairs of layers are compared on one set of n samples (tokens), twice: on the states as they are (raw) and on
RMS-normalised ones (rms). With centred features X_l [n, d] and their Gram matrices K_l = X_l X_l^T, both HSIC
estimators follow from <K_i, K_j> off the diagonal, the diagonals of the K_l and their traces. `gram_sums` reduces
states to those [l, l] sums and never holds more than one tile of each layer's Gram matrix.

One product per tile gives the Gram matrices of both scales. Write r_a for 1 / RMS of token x_a, p for the mean of the
tokens weighted by r_a, and q for the mean token less p. The centred tokens of the two scales, the raw one divided by
its RMS, are

    y_a = r_a (x_a - p) + (r_a - mean of r) p        and        z_a = r_a (x_a - p - q) = y_a - w_a,
    w_a = (r_a - mean of r) p + r_a q,

so that with v_a = (y_a + z_a) / 2 the raw product is z_a . z_b = y_a . y_b - v_a . w_b - w_a . v_b, where each w_a is
made of two vectors: four numbers per token (`_Tokens`) turn the one matrix into the other. That direction is safe, the
other is not: RMS takes away what only makes tokens of a common direction longer or shorter. The products that are left
are no larger than raw ones (|x| |x/|x| - y/|y|| <= 2 |x - y|, Dunkl and Williams 1964), so rounding stays rounding. And
p is a safe place to count from: no token, however long, moves it far from the others.

Axes: l states (depth + 1), n samples, d width, a and b rows of two tiles of t rows, i, j, l and m layers.

Sources: Kornblith et al. 2019 (arXiv 1905.00414) for CKA; Song et al. 2012 (JMLR 13) for the debiased HSIC_1.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from clp_jax.aliases import Array
from clp_jax.tiles import ROWS, Tiles

_SPLIT = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3
"""Of the products of width d: 3 passes of bfloat16 matrix units where the program is compiled for such, float32 on CPU.

Both operands are split in two bfloat16 parts of which the product of the small ones is left out: 2^-18 of a term, of
either sign, that averages out over the n^2 entries of a Gram matrix. Not so on its diagonal, which is taken from sums.
"""

_HIGHEST = jax.lax.Precision.HIGHEST
"""Of the products between Gram matrices, where the parts left out would all be positive; they are a hundredth."""

_BAND = 2
"""Rows of a Gram matrix's tile that are multiplied at a time, or a divisor of it. Two are as fast as more, and XLA of
jax 0.5 on CPU adds up all products of a band in one float32."""

_EPS = float(jnp.finfo(jnp.float32).eps)


class GramSums(NamedTuple):
    """What both HSIC estimators need from one set of samples; K_l is the Gram matrix of layer l's centred features.

    Fields may carry leading axes of groups, from `jax.vmap`. Do not add the sums of different groups, whose means
    differ: add their HSIC.

    Attributes:
      inner: <K_i, K_j> over all pairs of different samples.
      diagonal: diag(K_i) . diag(K_j).
      trace: trace of K_l: total squared deviation from the mean.
      count: valid samples.
    """

    inner: Float[Array, "*g l l"]
    diagonal: Float[Array, "*g l l"]
    trace: Float[Array, "*g l"]
    count: Float[Array, "*g"]


class Scales(NamedTuple):
    """Sums of the states as they are, and of states whose tokens have unit root mean square (`rms_normalise`)."""

    raw: GramSums
    rms: GramSums


class _Tokens(NamedTuple):
    """All samples in tiles, zero where they do not count; the letters are those on top of this module.

    Attributes:
      features: y.
      scale: 1 / r.
      inverse: r.
      apart: r - mean of r.
      along_centre: v . p.
      along_shift: v . q.
      raw_norms: |z / r|^2.
      rms_norms: |y|^2.
    """

    features: Float[Array, "blocks l t d"]
    scale: Float[Array, "blocks l t"]
    inverse: Float[Array, "blocks l t"]
    apart: Float[Array, "blocks l t"]
    along_centre: Float[Array, "blocks l t"]
    along_shift: Float[Array, "blocks l t"]
    raw_norms: Float[Array, "blocks l t"]
    rms_norms: Float[Array, "blocks l t"]

    def grams(self, a: Array, b: Array) -> tuple[Float[Array, "l t t"], Float[Array, "l t t"]]:
        """Tile (a, b) of the Gram matrices of all layers: raw and rms."""
        rms = jnp.einsum("lad,lbd->lab", self.features[a], self.features[b], precision=_SPLIT)
        across = _outer(self.apart[a], self.along_centre[b]) + _outer(self.along_centre[a], self.apart[b])
        across += _outer(self.inverse[a], self.along_shift[b]) + _outer(self.along_shift[a], self.inverse[b])
        return _outer(self.scale[a], self.scale[b]) * (rms - across), rms


def gram_sums(states: Float[Array, "l n d"], valid: Bool[Array, " n"], *, tile: int = ROWS) -> Scales:
    """Reduce the states of all layers to what HSIC needs, in float32, at both scales.

    Only pairs of row tiles (a, b) with a <= b are multiplied, which halves the work: about l n^2 d operations of width
    d and 2 n^2 l^2 between Gram matrices. Memory beyond ``states``: the same in float32, and a few tiles.

    Args:
      states: features of the same samples at l layers, any float dtype; at least two of them for XLA of jax 0.5 on CPU.
      valid: which samples count; the other rows may hold anything.
      tile: rows of a tile, about.

    Returns:
      Sums over the valid samples; zeros for a layer whose features are constant up to float32 rounding.

    >>> states = jax.random.normal(jax.random.key(0), (3, 40, 8))
    >>> sums = gram_sums(states, jnp.ones(40, bool))
    >>> cka(hsic(sums.raw, debiased=True)).diagonal().round(5).tolist()
    [1.0, 1.0, 1.0]
    """
    tiles = Tiles.of(states, valid, tile)
    tokens, noise = _tokens(tiles)
    diagonal, bands = jnp.eye(tiles.rows, dtype=bool), tiles.rows // math.gcd(tiles.rows, _BAND)

    def products(gram: Float[Array, "l t t"], *, own: Array) -> Float[Array, "bands l l"]:
        """In bands of some rows, so that few large entries do not swallow many small ones."""
        # Behind the barrier because XLA on CPU would lay out all that comes before for this product.
        entries = jax.lax.optimization_barrier(jnp.where(own & diagonal, 0, gram))
        banded = entries.reshape(len(entries), bands, -1)
        return jnp.where(own, 1.0, 2.0) * jnp.einsum("lbk,mbk->blm", banded, banded, precision=_HIGHEST)

    def add_pair(sums: list[tuple[Array, Array]], pair: tuple[Array, Array]) -> tuple[list[tuple[Array, Array]], None]:
        grams = tokens.grams(*pair)
        return [_kahan(*x, products(gram, own=pair[0] == pair[1])) for x, gram in zip(sums, grams, strict=True)], None

    # One loop, not two nested ones: jax 0.5.3 on CPU computes nested loops wrongly once its compilation cache is on.
    pairs = tuple(jnp.asarray(x, jnp.int32) for x in np.triu_indices(tiles.blocks))
    zeros = jnp.zeros((bands, len(states), len(states)), jnp.float32)
    sums, _ = jax.lax.scan(add_pair, [(zeros, zeros)] * 2, pairs)
    norms = tokens.raw_norms, tokens.rms_norms
    inner = [of_bands.sum(axis=0) for of_bands, _ in sums]
    return Scales(*(_sums(*scale, tiles.count) for scale in zip(inner, norms, noise, strict=True)))


def hsic(sums: GramSums, *, debiased: bool) -> Float[Array, "*g l l"]:
    """Hilbert-Schmidt independence criterion, linear kernel, of every pair of layers.

    Groups (minibatches) are combined by adding their HSIC and taking the `cka` of the total. Add the debiased one: it
    is unbiased at any n, while each biased term keeps the bias of its own n (biased CKA of independent Gaussians of
    width 512 is 0.8 at n = 128 and 0.2 at n = 2048).

    Args:
      sums: from `gram_sums`.
      debiased: HSIC_1 of Song et al. instead of HSIC_0 = <K_i, K_j> / (n - 1)^2.

    Returns:
      Symmetric matrix; NaN with fewer valid samples than the estimator needs, 4 for HSIC_1 and 2 for HSIC_0.
    """
    n = sums.count[..., None, None]
    if not debiased:
        return jnp.where(n >= 2, (sums.inner + sums.diagonal) / jnp.maximum(n - 1, 1) ** 2, jnp.nan)
    enough = n >= 4
    n = jnp.where(enough, n, 4)
    traces = sums.trace[..., :, None] * (sums.trace[..., None, :] / ((n - 1) * (n - 2)))
    # K without its diagonal has row sums -diag(K), because rows of a centred K sum to zero: no further pass over K.
    total = sums.inner - 2 / (n - 2) * sums.diagonal + traces
    return jnp.where(enough, total / (n * (n - 3)), jnp.nan)


def cka(hsic: Float[Array, "*g l l"]) -> Float[Array, "*g l l"]:
    """Centred kernel alignment: h_ij / sqrt(h_ii h_jj).

    Args:
      hsic: HSIC of every pair of layers, or its sum over groups.

    Returns:
      Similarity, nowhere clamped. The biased one lies in [0, 1] up to rounding; the debiased one scatters around 0 for
      unrelated layers. Row and column of a layer whose HSIC with itself is not positive (constant features, too few
      samples) are NaN.

    >>> cka(jnp.array([[4.0, 1.0], [1.0, 1.0]])).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    own = jnp.diagonal(hsic, axis1=-2, axis2=-1)
    norm = jnp.sqrt(jnp.where(own > 0, own, jnp.nan))  # root before product: h_ii h_jj can overflow float32
    return hsic / (norm[..., :, None] * norm[..., None, :])


def rms_normalise(states: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Scale every token to unit root mean square, float32: what the next block reads, up to its learned scale.

    Without it a few massive channels of a few tokens can hold nearly all variance and make all layers look alike.
    A token that is all zero stays so.
    """
    states = states.astype(jnp.float32)
    mean_square = jnp.mean(states * states, axis=-1, keepdims=True)
    return states * jax.lax.rsqrt(jnp.where(mean_square > 0, mean_square, 1))


def channel_share(states: Float[Array, "l n d"], valid: Bool[Array, " n"], *, tile: int = ROWS) -> Float[Array, " l"]:
    """Share of each layer's variance that its single largest channel holds: a detector of massive activations.

    Returns:
      Between 1/d (evenly spread) and 1; NaN for constant features.
    """
    tiles = Tiles.of(states, valid, tile)
    means = _means(tiles, tiles.map(tiles.mask)[:, None, :].astype(jnp.float32))
    variance = tiles.sum(lambda block: jnp.sum(_minus(tiles, block, *means) ** 2, axis=1))
    total = variance.sum(axis=-1)
    noise = tiles.count * jnp.sum((_EPS * means[0]) ** 2, axis=-1)
    return jnp.where(total > noise, variance.max(axis=-1) / total, jnp.nan)


def _tokens(tiles: Tiles) -> tuple[_Tokens, tuple[Float[Array, " l"], Float[Array, " l"]]]:
    """What the Gram matrices are made of, and how much of the squared deviation of each scale may be rounding."""
    count = jnp.maximum(tiles.count, 1)
    mask = tiles.map(tiles.mask)[:, None, :]
    square = tiles.map(lambda block: jnp.mean(tiles(block) ** 2, axis=-1))
    inverse = jnp.where(mask, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
    centres = _means(tiles, inverse)
    centre = centres[0] + centres[1]
    shift = tiles.sum(lambda block: jnp.sum(_minus(tiles, block, *centres), axis=1)) / count
    apart = inverse
    for _ in range(2):  # the second time takes away the rounding of the first mean
        apart = jnp.where(mask, apart - jnp.sum(apart, axis=(0, 2), keepdims=True) / count, 0)
    ways = jnp.stack([centre, shift])
    of_ways = jnp.einsum("wld,vld->wvl", ways, ways, precision=_HIGHEST)

    def of_tile(block: Array) -> tuple[Array, ...]:
        rows = _minus(tiles, block, *centres)
        features = rows * inverse[block][:, :, None] + _outer(apart[block], centre)
        # Of v, that is, of y and half of w.
        along = jnp.einsum("wld,ltd->wlt", ways, features, precision=_HIGHEST)
        along = along - (of_ways[:, 0, :, None] * apart[block] + of_ways[:, 1, :, None] * inverse[block]) / 2
        raw = jnp.where(mask[block][:, :, None], rows - shift[:, None, :], 0)
        return features, *along, jnp.sum(raw**2, axis=-1), jnp.sum(features**2, axis=-1)

    features, along_centre, along_shift, raw_norms, rms_norms = tiles.map(of_tile)
    scale = jnp.where(mask, 1 / jnp.where(mask, inverse, 1), 0)
    size = jnp.sum((centre + shift) ** 2, axis=-1)
    rounding = _EPS**2 * jnp.sum(inverse**2 * (raw_norms + size[:, None]), axis=(0, 2))
    tokens = _Tokens(features, scale, inverse, apart, along_centre, along_shift, raw_norms, rms_norms)
    return tokens, (_EPS**2 * count * size, rounding)


def _sums(inner: Array, norms: Float[Array, "blocks l t"], noise: Float[Array, " l"], count: Array) -> GramSums:
    """The sums of one scale, with zeros for layers whose total squared deviation is rounding."""
    trace = jnp.sum(norms, axis=(0, 2))
    signal = trace > noise
    both = signal[:, None] & signal[None, :]
    diagonal = jnp.einsum("blt,bmt->blm", norms, norms, precision=_HIGHEST).sum(axis=0)
    return GramSums(
        inner=jnp.where(both, inner, 0),
        diagonal=jnp.where(both, diagonal, 0),
        trace=jnp.where(signal, trace, 0),
        count=count,
    )


def _means(tiles: Tiles, weights: Float[Array, "blocks _ t"]) -> tuple[Float[Array, "l d"], Float[Array, "l d"]]:
    """The weighted mean of each layer and that of what is left without it.

    The second takes away the rounding of the first, which matters once the mean is many times the spread. What both
    leave of constant features is at most one rounding of the mean per value.
    """
    total = jnp.sum(weights, axis=(0, 2))[:, None]
    total = jnp.where(total > 0, total, 1)

    def mean_without(*means: Float[Array, "l d"]) -> Float[Array, "l d"]:
        # By tiles: a reduction of the whole array would first write all of it in float32 on CPU.
        weighted = tiles.sum(lambda block: jnp.sum(_minus(tiles, block, *means) * weights[block][:, :, None], axis=1))
        return weighted / total

    mean = mean_without()
    return mean, mean_without(mean)


def _minus(tiles: Tiles, block: Array, *means: Float[Array, "l d"]) -> Float[Array, "l t d"]:
    """The rows of a tile without these means; zeros where they do not count."""
    rows = tiles(block)
    for mean in means:
        rows = rows - mean[:, None, :]
    return jnp.where(tiles.mask(block)[None, :, None], rows, 0)


def _kahan(total: Array, lost: Array, term: Array) -> tuple[Array, Array]:
    """Compensated summation, for large n has thousands of pairs of tiles: the new total, and what it is too much."""
    term = term - lost
    return total + term, ((total + term) - total) - term


def _outer(x: Float[Array, "l a"], y: Float[Array, "l b"]) -> Float[Array, "l a b"]:
    return x[:, :, None] * y[:, None, :]
