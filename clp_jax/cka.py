"""HSIC and CKA between the layers of one tower: mathematics only, meant to run inside the jit of a forward pass.

All pairs of layers are compared on one set of n samples (tokens). With centred features X_l [n, d] and their Gram
matrices K_l = X_l X_l^T, both HSIC estimators follow from <K_i, K_j>, the diagonals of the K_l and their traces.
`gram_sums` reduces states to those [l, l] sums and never holds more than one tile of each layer's Gram matrix.

Axes: l states (depth + 1), n samples, d width, a, b and t rows of a tile, k and m steps between states, g groups.

Sources: Kornblith et al. 2019 (arXiv 1905.00414) for CKA; Song et al. 2012 (JMLR 13) for the debiased HSIC_1.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from clp_jax.aliases import Array

TILE = 256
"""Rows of a Gram tile: the fastest of 128, 256 and 512 on CPU, and a multiple of the 128 of a TPU's matrix unit."""

_HIGHEST = jax.lax.Precision.HIGHEST  # the default rounds operands to bfloat16 (TPU) or TF32 (GPU)
_EPS = float(jnp.finfo(jnp.float32).eps)


class GramSums(NamedTuple):
    """What both HSIC estimators need from one set of samples; K_l is the Gram matrix of layer l's centred features.

    Fields may carry leading axes of groups, from `jax.vmap`. Do not add the sums of different groups, whose means
    differ: add their HSIC.

    Attributes:
      inner: <K_i, K_j> over all pairs of samples, diagonal included.
      diagonal: diag(K_i) . diag(K_j).
      trace: trace of K_l: total squared deviation from the mean.
      count: valid samples.
    """

    inner: Float[Array, "*g l l"]
    diagonal: Float[Array, "*g l l"]
    trace: Float[Array, "*g l"]
    count: Float[Array, "*g"]


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


def gram_sums(states: Float[Array, "l n d"], valid: Bool[Array, " n"], *, tile: int = TILE) -> GramSums:
    """Reduce the states of all layers to what HSIC needs, in float32.

    Only pairs of row tiles (a, b) with a <= b are multiplied, which halves the work. Tiles are upcast and centred as
    they are read: memory beyond ``states`` is a few times l * tile * max(d, tile), whatever n is.

    Args:
      states: features of the same samples at l layers, any float dtype.
      valid: which samples count; the other rows may hold anything.
      tile: rows of a tile, about.

    Returns:
      Sums over the valid samples; zeros for a layer whose features are constant up to float32 rounding.

    >>> states = jax.random.normal(jax.random.key(0), (3, 40, 8))
    >>> sums = gram_sums(states, jnp.ones(40, bool))
    >>> cka(hsic(sums, debiased=True)).diagonal().round(5).tolist()
    [1.0, 1.0, 1.0]
    """
    layers, n, _ = states.shape
    tile, blocks = _tiling(n, tile)
    centred, is_signal = _centring(states, valid, tile, blocks)

    def diagonal_and_trace(block: Array) -> tuple[Array, Array]:
        norms = jnp.sum(centred(block) ** 2, axis=-1)
        return jnp.einsum("la,ma->lm", norms, norms, precision=_HIGHEST), jnp.sum(norms, axis=-1)

    def add_pair(carry: tuple[Array, Array], pair: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        total, lost = carry  # compensated (Kahan) summation: large n has thousands of pairs
        gram = jnp.einsum("lad,lbd->lab", centred(pair[0]), centred(pair[1]), precision=_HIGHEST)
        # One contracted axis: for two XLA transposes a copy of the tile.
        flat = gram.reshape(layers, -1)
        inner = jnp.einsum("lk,mk->lm", flat, flat, precision=_HIGHEST)
        term = jnp.where(pair[0] == pair[1], 1.0, 2.0) * inner - lost
        return (total + term, ((total + term) - total) - term), None

    # One loop, not two nested ones: jax 0.5.3 on CPU computes nested loops wrongly once its compilation cache is on.
    pairs = tuple(jnp.asarray(x, jnp.int32) for x in np.triu_indices(blocks))
    zeros = jnp.zeros((layers, layers), jnp.float32)
    (inner, _), _ = jax.lax.scan(add_pair, (zeros, zeros), pairs)
    diagonal, trace = _sum_over_tiles(diagonal_and_trace, blocks)
    signal = is_signal(trace)
    both = signal[:, None] & signal[None, :]
    return GramSums(
        inner=jnp.where(both, inner, 0),
        diagonal=jnp.where(both, diagonal, 0),
        trace=jnp.where(signal, trace, 0),
        count=_count(valid),
    )


def gram_flops(layers: int, n: int, d: int, *, tile: int = TILE) -> int:
    """Floating-point operations of `gram_sums` on one set of n samples.

    There are blocks (blocks + 1) / 2 pairs of tiles; with t rows each costs 2 t^2 d per layer (products), 2 t^2 l^2
    (inner products) and 4 t d per layer (centring). Per token that is about l n (d + l): linear in n.

    >>> round(gram_flops(18, 2048, 512) / (18 * 2048**2 * 512), 2)  # 1.125 for whole tiles on the diagonal
    1.18
    """
    tile, blocks = _tiling(n, tile)
    pairs = blocks * (blocks + 1) // 2
    means_and_norms = 7 * layers * n * d + 2 * n * layers * layers
    return pairs * (2 * tile * tile * layers * (d + layers) + 4 * layers * tile * d) + means_and_norms


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
        return jnp.where(n >= 2, sums.inner / jnp.maximum(n - 1, 1) ** 2, jnp.nan)
    enough = n >= 4
    n = jnp.where(enough, n, 4)
    traces = sums.trace[..., :, None] * (sums.trace[..., None, :] / ((n - 1) * (n - 2)))
    # K without its diagonal has row sums -diag(K), because rows of a centred K sum to zero: no further pass over K.
    total = sums.inner - n / (n - 2) * sums.diagonal + traces
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


def channel_share(states: Float[Array, "l n d"], valid: Bool[Array, " n"], *, tile: int = TILE) -> Float[Array, " l"]:
    """Share of each layer's variance that its single largest channel holds: a detector of massive activations.

    Returns:
      Between 1/d (evenly spread) and 1; NaN for constant features.
    """
    tile, blocks = _tiling(states.shape[1], tile)
    centred, is_signal = _centring(states, valid, tile, blocks)
    variance = _sum_over_tiles(lambda block: jnp.sum(centred(block) ** 2, axis=1), blocks)
    total = variance.sum(axis=-1)
    return jnp.where(is_signal(total), variance.max(axis=-1) / total, jnp.nan)


def pair_statistics(states: Float[Array, "l n d"], valid: Bool[Array, " n"], *, tile: int = TILE) -> PairSums:
    """How far apart two states of the same token are, for all pairs of states: what CKA, blind to rotation, misses.

    Accurate for states that differ little: distances come from the steps between consecutive states, the cosine and
    the angle from the distance of the unit vectors (1 - cos is |u_j - u_i|^2 / 2). Costs about 4 n l^2 d FLOPs.

    Args:
      states: features of the same samples at l layers, any float dtype.
      valid: which samples count; the other rows may hold anything. A valid row of zeros has no direction: NaN.
      tile: rows at a time.
    """
    tile, blocks = _tiling(states.shape[1], tile)

    def of_tile(block: Array) -> tuple[Array, ...]:
        rows, mask = _tile(states, valid, block, tile)
        rows = rows.astype(jnp.float32)
        norms = jnp.sqrt(jnp.sum(rows * rows, axis=-1))
        squared, chord = _squared_distances(rows), _squared_distances(rows / norms[:, :, None])
        angle = 2 / jnp.pi * jnp.arcsin(jnp.minimum(jnp.sqrt(chord) / 2, 1))
        residual = squared / (norms * norms).T[:, :, None]
        values = (1 - chord / 2, angle, residual, squared / states.shape[2])
        return tuple(jnp.sum(jnp.where(mask[:, None, None], x, 0), axis=0) for x in values)

    return PairSums(*_sum_over_tiles(of_tile, blocks), count=_count(valid))


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


def _centring(
    states: Array, valid: Array, tile: int, blocks: int
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Two functions: the centred float32 rows [l, t, d] of a tile, and which total squared deviations [l] are signal.

    The mean of the residual takes away the rounding of the first mean, which matters once the mean is many times the
    spread. What both leave of constant features is at most one rounding of the mean per value: no signal.
    """
    count = jnp.maximum(_count(valid), 1)

    def minus(block: Array, *means: Array) -> Array:
        rows, mask = _tile(states, valid, block, tile)
        rows = rows.astype(jnp.float32)
        for mean in means:
            rows = rows - mean[:, None, :]
        return jnp.where(mask[None, :, None], rows, 0)

    # By tiles: a reduction of the whole array would first write all of it in float32 on CPU.
    mean = _sum_over_tiles(lambda block: jnp.sum(minus(block), axis=1), blocks) / count
    residual = _sum_over_tiles(lambda block: jnp.sum(minus(block, mean), axis=1), blocks) / count
    rounding = count * jnp.sum((_EPS * mean) ** 2, axis=-1)
    return lambda block: minus(block, mean, residual), lambda deviation: deviation > rounding


def _sum_over_tiles(term: Callable[[Array], Any], blocks: int) -> Any:
    """Sum of the tree ``term(block)`` over all blocks."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(term, jnp.int32(0)))
    return jax.lax.fori_loop(0, blocks, lambda block, total: jax.tree.map(jnp.add, total, term(block)), zeros)


def _count(valid: Array) -> Array:
    return jnp.sum(valid, dtype=jnp.float32)


def _tiling(n: int, tile: int) -> tuple[int, int]:
    """Rows of a tile and number of tiles that cover n rows evenly: in multiples of 8 unless one tile holds them all."""
    if n <= tile:
        return n, 1
    rows = min(n, 8 * math.ceil(n / math.ceil(n / tile) / 8))
    return rows, math.ceil(n / rows)


def _tile(states: Array, valid: Array, block: Array | int, tile: int) -> tuple[Array, Array]:
    """Rows of one tile [l, t, d] and which of them count [t].

    The last tile begins early enough to be full and masks the rows of the tile before: the states need no padding.
    """
    start = jnp.minimum(block * tile, valid.shape[0] - tile)
    rows = jax.lax.dynamic_slice_in_dim(states, start, tile, axis=1)
    mask = jax.lax.dynamic_slice_in_dim(valid, start, tile) & (start + jnp.arange(tile) >= block * tile)
    return rows, mask
