"""Criterion "clp": the paper's rule (CLP, arXiv 2606.20246), removal of twin layers.

s_l is the CKA between the states before and after block l. Consecutive blocks with s_l >= tau form a run of twins; the
run's anchor stays, the rest is the pool; tau is lowered until the pool holds as many blocks as shall go; the most
similar of the pool go. s of the first block compares the embedding with block 0 and is not used: block 0 stays.

What is the anchor? The paper's text says the first block of the run. Its published lists say otherwise: π0 loses
block 1, which could only be the first of its run. They follow if the anchor is the *predecessor*, the block whose
output the run repeats, and that is the default here. The rule then is, without a period, the k largest s_l: tau decides
only which runs the report draws. With the literal anchor tau does matter.
"""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from clp_jax.errors import InputError
from clp_jax.selection.evidence import Evidence
from clp_jax.selection.feasible import cheapest_set, check_remove, count_sets, unprotected
from clp_jax.selection.result import Selection

Anchor = Literal["predecessor", "literal"]


def clp(evidence: Evidence, *, remove: int, anchor: Anchor = "predecessor") -> Selection:
    """Removes the most similar twins.

    With a period above 1, tau is lowered until the pool holds a set that obeys the period, and of those in the pool
    the one with the largest sum of s_l goes.

    Args:
      evidence: ``similarity`` is used.
      remove: number of blocks to remove.
      anchor: "predecessor", the block before a run stays; "literal", the run's first block stays.

    Returns:
      Selection with s_l as scores (NaN for block 0), no cost, and in the detail ``tau`` (None when nothing had to be
      removed), ``anchor`` and the ``runs`` at that tau, each ``{"anchor": block, "twins": [blocks]}``.

    Raises:
      InputError: even at the lowest tau the pool does not hold that many.

    >>> s = np.array([0.5, 0.99, 0.7, 0.98])
    >>> chain = np.diag(s, 1) + np.diag(s, -1) + np.eye(5)
    >>> choice = clp(Evidence(4, chain, 1 - chain), remove=2)
    >>> choice.removed, choice.detail["tau"], choice.detail["runs"]
    ((1, 3), 0.98, [{'anchor': 0, 'twins': [1]}, {'anchor': 2, 'twins': [3]}])
    """
    check_remove(evidence, remove)
    twin_similarity = _twin_similarity(evidence)
    tau, pool = None, np.zeros(evidence.depth, bool)
    thresholds = iter(np.unique(twin_similarity[np.isfinite(twin_similarity)])[::-1].tolist())
    while not count_sets(pool, remove, evidence.period):
        tau = next(thresholds, None)
        if tau is None:
            raise InputError(
                f"even the lowest threshold leaves only {int(pool.sum())} twins that may go, not {remove} "
                f"(anchor {anchor!r}, period {evidence.period}); remove fewer blocks"
            )
        pool = _pool(evidence, twin_similarity, tau, anchor)
    removed = cheapest_set(np.where(pool, -twin_similarity, np.inf), remove, evidence.period)
    runs = [] if tau is None else _runs(twin_similarity, tau, anchor)
    return Selection.of(removed, twin_similarity, tau=tau, anchor=anchor, runs=runs)


def pool_size(evidence: Evidence, threshold: float, *, anchor: Anchor = "predecessor") -> int:
    """Returns how many blocks go at a given tau: the whole pool, or as much of it as the period allows.

    ``clp(evidence, remove=pool_size(evidence, threshold))`` removes that many, all with s_l >= threshold.

    Args:
      evidence: ``similarity`` is used.
      threshold: tau, the CKA from which two neighbouring states count as twins; above 0, at most 1.
      anchor: as for `clp`.

    Raises:
      InputError: the threshold is out of range.
    """
    if not 0.0 < threshold <= 1.0:
        raise InputError(f"the CKA threshold is {threshold}; give a number above 0 and at most 1, for example 0.98")
    pool = _pool(evidence, _twin_similarity(evidence), threshold, anchor)
    sizes = range(0, evidence.depth, evidence.period)
    return max(size for size in sizes if count_sets(pool, size, evidence.period))


def _twin_similarity(evidence: Evidence) -> Float[np.ndarray, " depth"]:
    """s_l, NaN for block 0 and where it is not known."""
    similarity = evidence.adjacent("similarity")
    similarity[0] = np.nan
    return similarity


def _pool(
    evidence: Evidence, twin_similarity: Float[np.ndarray, " depth"], tau: float, anchor: Anchor
) -> Bool[np.ndarray, " depth"]:
    """The blocks that may go at this tau: twins that are no anchor and not protected."""
    twins = twin_similarity >= tau
    if anchor == "literal":
        twins = twins & np.roll(twins, 1)  # block 0 is never a twin, so nothing wraps around
    return twins & unprotected(evidence)


def _runs(twin_similarity: Float[np.ndarray, " depth"], tau: float, anchor: Anchor) -> list[dict[str, object]]:
    """The runs at this tau with their anchors, in order; a literal run of one block has no twin and is left out."""
    twins = np.flatnonzero(twin_similarity >= tau)
    runs = []
    for run in np.split(twins, np.flatnonzero(np.diff(twins) > 1) + 1):
        blocks = run.tolist()
        blocks = [blocks[0] - 1, *blocks] if anchor == "predecessor" else blocks
        if len(blocks) > 1:
            runs.append({"anchor": blocks[0], "twins": blocks[1:]})
    return runs
