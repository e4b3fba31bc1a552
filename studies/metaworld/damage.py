"""What each criterion expects any mask to cost, so that it can be ranked against what the mask did cost."""

from collections.abc import Callable

import numpy as np

from clp_jax.analysis import Analysis, EvidenceOptions
from clp_jax.selection import Evidence

GROUP = ("vlm", "action")
Removed = list[int]


def predictions(analysis: Analysis, loss: Callable[[Removed], float]) -> dict[str, Callable[[Removed], float]]:
    """By criterion a function from removed blocks to the damage that it predicts; only the order means anything.

    A criterion that rates blocks sums its ratings; one that rates jumps sums over the runs of removed blocks. The
    paper's rule never removes block 0, whose predecessor is the embedding; here that pair's CKA counts like any other.

    Args:
      analysis: of the base.
      loss: of the base without these blocks, on the calibration data.
    """
    evidence = analysis.evidence(GROUP, EvidenceOptions())
    gates = evidence.gates
    assert gates is not None and gates.sensitivity is not None
    assert gates.gradient is not None and gates.gauss_newton is not None
    gradient, curvature = gates.gradient, gates.gauss_newton

    def change(removed: Removed) -> float:
        off = np.isin(np.arange(evidence.depth), removed).astype(np.float64)
        return float(-gradient @ off + 0.5 * off @ curvature @ off)

    return {
        "clp": _sum_of(1.0 - evidence.adjacent("similarity")),
        "jumps": _over_runs(evidence.need("damage")),
        "gateprobe": _sum_of(gates.sensitivity),
        "gauss-newton": change,
        "greedy": loss,
        "cosine": _sum_of(1.0 - evidence.adjacent("cosine")),
        "angular": _over_runs(evidence.need("angle")),
        "mse": _sum_of(evidence.adjacent("mse")),
        "residual": _sum_of(evidence.adjacent("residual")),
        "first": _sum_of(-np.arange(evidence.depth, dtype=np.float64)),
    }


def measured(evidence: Evidence) -> dict[str, list[float | None]]:
    """Ratings per block that the page shows; None where nothing reads a block's output."""
    return {
        name: [float(x) if np.isfinite(x) else None for x in evidence.adjacent(name)]
        for name in ("similarity", "damage", "cosine", "residual")
    }


def runs(removed: Removed) -> list[tuple[int, int]]:
    """States between which a removal jumps: the first block of each run, and the block after its last.

    >>> runs([3, 4, 9])
    [(3, 5), (9, 10)]
    """
    blocks = np.array(sorted(removed))
    parts = np.split(blocks, np.flatnonzero(np.diff(blocks) > 1) + 1)
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]


def _sum_of(ratings: np.ndarray) -> Callable[[Removed], float]:
    return lambda removed: float(np.sum(ratings[list(removed)]))


def _over_runs(matrix: np.ndarray) -> Callable[[Removed], float]:
    return lambda removed: float(sum(matrix[start, end] for start, end in runs(removed)))
