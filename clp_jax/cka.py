"""HSIC and CKA between the layers of one tower: mathematics only, meant to run inside the jit of a forward pass.

All pairs of layers are compared on one set of n samples (tokens), twice: on the states as they are (raw) and on
RMS-normalised ones (rms). With the features X_l [n, d] of layer l, counted from any centre, K_l = X_l X_l^T is its Gram
matrix. Away from the diagonal, K_ab - u_a - u_b is its U-centred matrix if

    u_a = (row_a - total / (2 (n - 1))) / (n - 2),   row_a = sum of K_ab over b other than a,   total = sum of row_a,

whose rows add up to zero without the diagonal. The inner product of two such matrices is the debiased HSIC, up to a
factor of n, and the biased one follows from it and from the diagonals. So nothing large cancels: one token thousands of
times as long as the others has a large entry on the diagonal, which is not in that product. `gram_sums` reduces states
to those [l, l] sums and never holds more than one tile of each layer's Gram matrix (`clp_jax.grams`).

Axes: l states (depth + 1), n samples, d width, a and b rows of two tiles of t rows, i, j, l and m layers.

Sources: Kornblith et al. 2019 (arXiv 1905.00414) for CKA; Song et al. 2012 (JMLR 13) for the debiased HSIC_1; Székely
and Rizzo 2014 (arXiv 1310.2926) for U-centring.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from clp_jax.aliases import Array
from clp_jax.grams import EPS, HIGHEST, all_and_far, grams
from clp_jax.tiles import PASS_ROWS, ROWS, Tiles


class GramSums(NamedTuple):
    """What both HSIC estimators need from one set of samples; K_l is the Gram matrix of layer l's features.

    Fields may carry leading axes of groups, from `jax.vmap`. Do not add the sums of different groups, whose means
    differ: add their HSIC.

    Attributes:
      inner: <K_i, K_j>, U-centred, over all pairs of different samples.
      diagonal: diag(K_i) . diag(K_j) of features less their mean.
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


def gram_sums(states: Float[Array, "l n d"], valid: Bool[Array, " n"], *, tile: int = ROWS) -> Scales:
    """Reduce the states of all layers to what HSIC needs, in float32, at both scales.

    Only pairs of row tiles (a, b) with a <= b are multiplied, which halves the work: about l n^2 d operations of width
    d and 2 n^2 l^2 between Gram matrices. Memory beyond ``states``: a few tiles.

    Args:
      states: features of the same samples at l layers, any float dtype; at least two of them for XLA of jax 0.5 on CPU.
      valid: which samples count; the other rows may hold anything.
      tile: rows of a tile, about.

    Returns:
      Sums over the valid samples; zeros for a layer whose features are constant up to float32 rounding.

    >>> states = jax.random.normal(jax.random.key(0), (3, 40, 8))
    >>> sums = jax.jit(gram_sums)(states, jnp.ones(40, bool))
    >>> cka(hsic(sums.raw, debiased=True)).diagonal().round(5).tolist()
    [1.0, 1.0, 1.0]
    """
    tiles = Tiles.of(states, valid, tile)
    tokens, far, norms, noise = all_and_far(states, valid, min(tile, PASS_ROWS))

    def add_pair(sums: list[tuple[Array, Array]], pair: tuple[Array, Array]) -> tuple[list[tuple[Array, Array]], None]:
        a, b = (tokens.tile(tiles, block) for block in pair)
        terms = [_products(gram, own=pair[0] == pair[1]) for gram in grams(a, b)]
        return [_kahan(*x, term) for x, term in zip(sums, terms, strict=True)], None

    # One loop, not two nested ones: jax 0.5.3 on CPU computes nested loops wrongly once its compilation cache is on.
    pairs = tuple(jnp.asarray(x, jnp.int32) for x in np.triu_indices(tiles.blocks))
    zeros = jnp.zeros((tiles.rows, len(states), len(states)), jnp.float32)
    sums, _ = jax.lax.scan(add_pair, [(zeros, zeros)] * 2, pairs)
    scales = []
    for i, (exact, split) in enumerate(far.correction()):
        more = _products(exact, own=True) - _products(split, own=True)
        inner = jnp.sum(sums[i][0], axis=0) + jnp.sum(more, axis=0)
        scales.append(_sums(inner, norms[i], noise[i], tiles.count))
    return Scales(*scales)


def hsic(sums: GramSums, *, debiased: bool) -> Float[Array, "*g l l"]:
    """Hilbert-Schmidt independence criterion, linear kernel, of every pair of layers.

    Groups (minibatches) are combined by adding their HSIC and taking the `cka` of the total. Add the debiased one: it
    is unbiased at any n, while each biased term keeps the bias of its own n (biased CKA of independent Gaussians of
    width 512 is 0.8 at n = 128 and 0.2 at n = 2048).

    Args:
      sums: from `gram_sums`.
      debiased: HSIC_1 of Song et al. instead of HSIC_0 = <K_i, K_j> / (n - 1)^2 of centred features, with the diagonal.

    Returns:
      Symmetric matrix; NaN with fewer valid samples than the estimator needs, 4 for HSIC_1 and 3 for HSIC_0.
    """
    n = sums.count[..., None, None]
    enough = n >= (4 if debiased else 3)
    n = jnp.where(enough, n, 4)
    if debiased:
        return jnp.where(enough, sums.inner / (n * (n - 3)), jnp.nan)
    # The rows of a Gram matrix of centred features add up to its diagonal once that is left out, so u follows from it.
    traces = sums.trace[..., :, None] * (sums.trace[..., None, :] / ((n - 1) * (n - 2)))
    return jnp.where(enough, (sums.inner + n / (n - 2) * sums.diagonal - traces) / (n - 1) ** 2, jnp.nan)


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
    means = tiles.means()
    variance = tiles.sum(lambda block: jnp.sum(tiles.minus(block, *means) ** 2, axis=1))
    total = variance.sum(axis=-1)
    noise = tiles.count * jnp.sum((EPS * means[0]) ** 2, axis=-1)
    return jnp.where(total > noise, variance.max(axis=-1) / total, jnp.nan)


def _products(gram: Float[Array, "l t t"], *, own: Array | bool) -> Float[Array, "t l l"]:
    """Row by row, so that few large entries do not swallow many small ones; own is a tile's with itself.

    XLA of jax 0.5 on CPU adds up all that is in one product in one float32.
    """
    # Behind the barrier because XLA on CPU would lay out all that comes before for this product.
    entries = jnp.where(own & jnp.eye(gram.shape[-1], dtype=bool), 0, gram)
    entries = jax.lax.optimization_barrier(jnp.swapaxes(entries, 0, 1))
    return jnp.where(own, 1.0, 2.0) * jnp.einsum("alb,amb->alm", entries, entries, precision=HIGHEST)


def _sums(inner: Array, norms: Float[Array, "l n"], noise: Float[Array, " l"], count: Array) -> GramSums:
    """The sums of one scale, with zeros for layers whose total squared deviation is rounding."""
    trace = jnp.sum(norms, axis=1)
    signal = trace > noise
    both = signal[:, None] & signal[None, :]
    # Row by row for the same reason as in `_products`.
    rows = jnp.pad(norms, ((0, 0), (0, -norms.shape[1] % ROWS))).reshape(len(norms), -1, ROWS)
    diagonal = jnp.einsum("lbt,mbt->tlm", rows, rows, precision=HIGHEST).sum(axis=0)
    return GramSums(
        inner=jnp.where(both, inner, 0),
        diagonal=jnp.where(both, diagonal, 0),
        trace=jnp.where(signal, trace, 0),
        count=count,
    )


def _kahan(total: Array, lost: Array, term: Array) -> tuple[Array, Array]:
    """Compensated summation, for large n has thousands of pairs of tiles: the new total, and what it is too much."""
    term = term - lost
    return total + term, ((total + term) - total) - term
