"""Baselines that any clever criterion should beat: "cosine", "angular", "mse", "residual", "first" and "random".

"Keep the first K blocks" and "drop the deepest" are one and the same; it is called "first" here, after what stays. The
variant that also keeps the last block is "first" with that block protected.
"""

import numpy as np
from jaxtyping import Float

from clp_jax.errors import InputError
from clp_jax.selection.evidence import Evidence
from clp_jax.selection.feasible import cheapest_set, check_remove, random_set, unprotected
from clp_jax.selection.result import Selection


def cosine(evidence: Evidence, *, remove: int) -> Selection:
    """Removes the blocks with the largest cosine between input and output (block influence of ShortGPT, 2403.03853)."""
    return _highest(evidence, evidence.adjacent("cosine"), remove)


def mse(evidence: Evidence, *, remove: int) -> Selection:
    """Removes the blocks whose output differs least from their input in mean square; favours streams that are small."""
    return _highest(evidence, -evidence.adjacent("mse"), remove)


def residual(evidence: Evidence, *, remove: int) -> Selection:
    """Removes the blocks whose contribution is smallest relative to their input."""
    return _highest(evidence, -evidence.adjacent("residual"), remove)


def first(evidence: Evidence, *, remove: int) -> Selection:
    """Keeps the first blocks and removes the deepest; needs no calibration.

    >>> first(Evidence.unmeasured(4), remove=2).keep
    (0, 1)
    """
    return _highest(evidence, np.arange(evidence.depth, dtype=np.float64), remove)


def random(evidence: Evidence, *, remove: int, seed: int = 0) -> Selection:
    """Removes a set drawn uniformly from all that the period and the protection allow; needs no calibration.

    The scores are 1 for what was drawn and 0 for the rest.
    """
    check_remove(evidence, remove)
    removed = random_set(np.random.default_rng(seed), unprotected(evidence), remove, evidence.period)
    return Selection.of(removed, np.isin(np.arange(evidence.depth), removed).astype(np.float64), seed=seed)


def angular(evidence: Evidence, *, remove: int) -> Selection:
    """Removes the one run of blocks with the smallest angle between its first and last state (Gromov, 2403.17887).

    Args:
      evidence: ``angle`` is used; a run whose angle is unknown (NaN) or that holds a protected block stays.
      remove: length of the run.

    Returns:
      Selection with minus the angle over each block alone as scores and the angle over the run as cost. Of runs with
      the same angle the first goes.

    Raises:
      InputError: no such run is known and unprotected.
    """
    check_remove(evidence, remove)
    angle = evidence.need("angle")
    # runs[i] is the angle from state i to state i + remove.
    runs = np.diagonal(angle, offset=remove).astype(np.float64)
    blocked = [any(block in evidence.protected for block in range(i, i + remove)) for i in range(len(runs))]
    runs = np.where(np.isfinite(runs) & ~np.array(blocked), runs, np.inf)
    begin = int(np.argmin(runs))
    if remove and np.isinf(runs[begin]):
        raise InputError(f"no run of {remove} blocks is unprotected with a known angle; remove fewer blocks")
    cost = float(runs[begin]) if remove else 0.0
    return Selection.of(range(begin, begin + remove), -evidence.adjacent("angle"), cost, unit="angle in half turns")


def _highest(evidence: Evidence, scores: Float[np.ndarray, " depth"], remove: int) -> Selection:
    check_remove(evidence, remove)
    cost = np.where(unprotected(evidence), -scores, np.inf)
    return Selection.of(cheapest_set(cost, remove, evidence.period), scores)
