"""How sure are we: CKA and selections when the calibration episodes are drawn again.

Tokens of one image and frames of one episode are not independent, so whole clusters (episodes) are drawn with
replacement. CKA is a ratio of HSIC sums, so a resample is a weighted sum of the clusters' HSIC matrices: no states are
needed again.
"""

from collections.abc import Callable, Collection, Iterator

import numpy as np
from jaxtyping import Float

from clp_jax.errors import InputError

_CHUNK = 256


def cka_interval(
    hsic: Float[np.ndarray, "clusters *towers l l"], *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Float[np.ndarray, "2 *towers l l"]:
    """Returns a confidence interval of every CKA value by the percentile bootstrap over clusters.

    Args:
      hsic: HSIC estimates summed over the samples of each cluster, between all pairs of states; at least two clusters.
        Axes between (towers, for example) are resampled together: the same clusters are drawn for each.
      resamples: number of resamples.
      level: share of the resamples between the two bounds, between 0 and 1.
      seed: of the resampling.

    Returns:
      Lower and upper bound; NaN for a state that has no positive HSIC with itself in some resample.

    Raises:
      InputError: fewer than two clusters, or numbers out of range.
    """
    if not 0.0 < level < 1.0:
        raise InputError(f"the confidence level is {level}; give a number between 0 and 1, for example 0.95")
    cka = np.concatenate(list(_resampled_cka(hsic, resamples, seed)))
    # With any NaN in a column, so is its quantile: an interval from the lucky resamples alone would be too short.
    return np.quantile(cka, [(1 - level) / 2, (1 + level) / 2], axis=0)


def stability(
    hsic: Float[np.ndarray, "clusters *towers l l"],
    select: Callable[[Float[np.ndarray, "*towers l l"]], Collection[int]],
    *,
    resamples: int = 200,
    seed: int = 0,
) -> Float[np.ndarray, " depth"]:
    """Returns how often each block is removed when the clusters are drawn again.

    Args:
      hsic: as for `cka_interval`.
      select: the selection under test: CKA in (with the axes of ``hsic`` but the first), the removed blocks out.
      resamples: number of resamples, each with one call of ``select``.
      seed: of the resampling.

    Returns:
      Share of the resamples in which the block was removed, 0 to 1.

    >>> hsic = np.ones((2, 4, 4)) + np.eye(4)
    >>> stability(hsic, lambda cka: [2], resamples=10)
    array([0., 0., 1.])
    """
    times = np.zeros(hsic.shape[-1] - 1)
    for chunk in _resampled_cka(hsic, resamples, seed):
        for cka in chunk:
            times[list(select(cka))] += 1
    return times / resamples


def _resampled_cka(
    hsic: Float[np.ndarray, "clusters *towers l l"], resamples: int, seed: int
) -> Iterator[Float[np.ndarray, "chunk *towers l l"]]:
    """CKA of each resample, in chunks, so that memory does not grow with clusters times resamples."""
    clusters = len(hsic)
    if clusters < 2 or resamples < 1:
        raise InputError(f"cannot draw {resamples} resamples of {clusters} clusters; give data of two or more episodes")
    rng = np.random.default_rng(seed)
    flat = hsic.reshape(clusters, -1).astype(np.float64)
    for begin in range(0, resamples, _CHUNK):
        times_drawn = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=min(_CHUNK, resamples - begin))
        total = (times_drawn @ flat).reshape(-1, *hsic.shape[1:])
        own = np.diagonal(total, axis1=-2, axis2=-1)
        scale = np.sqrt(np.where(own > 0, own, np.nan))
        yield total / (scale[..., :, None] * scale[..., None, :])
