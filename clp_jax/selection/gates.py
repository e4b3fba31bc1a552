"""Criteria that ask the loss of the model: "gateprobe", "gauss-newton" and "greedy".

A gate alpha_l scales what block l adds to the residual stream; removing the block is alpha_l: 1 -> 0. To second order
that changes the loss by -g.1_S + 1/2 1_S^T Q 1_S for a removed set S, with g and Q at alpha = 1. The first two criteria
read derivatives, "greedy" runs the model again with gates set to 0.
"""

import numpy as np
from jaxtyping import Bool, Float

from clp_jax.errors import InputError
from clp_jax.selection.evidence import Evidence
from clp_jax.selection.feasible import all_sets, cheapest_set, check_remove, count_sets, unprotected
from clp_jax.selection.result import Selection
from clp_jax.selection.search import descend, one_more

EXACT_LIMIT = 200_000
"""Up to this many feasible sets (a fraction of a second), "gauss-newton" tries every one."""

BEAM = 100
"""Otherwise it follows this many sets at a time, see `descend`."""


def gateprobe(evidence: Evidence, *, remove: int) -> Selection:
    """Removes the blocks to which the loss is least sensitive (GateProbe, arXiv 2606.27755).

    Args:
      evidence: ``gates.sensitivity`` is used.
      remove: number of blocks to remove.

    Returns:
      Selection with minus the sensitivity as scores and the sum of sensitivities as cost.
    """
    check_remove(evidence, remove)
    sensitivity = evidence.need("sensitivity").astype(np.float64)
    removed = cheapest_set(np.where(unprotected(evidence), sensitivity, np.inf), remove, evidence.period)
    cost = float(sensitivity[list(removed)].sum())
    return Selection.of(removed, -sensitivity, cost, unit="sum of E|first-order change of the loss|")


def gauss_newton(evidence: Evidence, *, remove: int) -> Selection:
    """Removes the set with the smallest predicted change of the loss, interactions between blocks included.

    Every feasible set is tried when there are at most `EXACT_LIMIT`; otherwise blocks go one after another along the
    `BEAM` best ways, followed by swaps until none helps, and the result may not be the best.

    Args:
      evidence: ``gates.gradient`` and ``gates.gauss_newton`` are used; a block with unknown (NaN) entries stays.
      remove: number of blocks to remove.

    Returns:
      Selection with g_l - Q_ll / 2, minus the predicted change when the block goes alone, as scores; the predicted
      change of the loss as cost; in the detail ``search``, "exact" or "beam+swap".

    >>> from clp_jax.selection.evidence import GateEvidence
    >>> twins = np.array([[2.0, 1.9, 0.0], [1.9, 2.0, 0.0], [0.0, 0.0, 3.0]])  # blocks 0 and 1 stand in for each other
    >>> gates = GateEvidence(gradient=np.zeros(3), gauss_newton=twins)
    >>> evidence = Evidence(3, np.eye(4), np.eye(4), gates=gates)
    >>> gauss_newton(evidence, remove=2).removed  # not (0, 1), the two that are cheapest alone
    (0, 2)
    """
    check_remove(evidence, remove)
    gradient = evidence.need("gradient").astype(np.float64)
    hessian = evidence.need("gauss_newton").astype(np.float64)
    alone = -gradient + np.diagonal(hessian) / 2
    allowed = unprotected(evidence) & np.isfinite(alone)
    # Only rows and columns of blocks that may go are ever multiplied by anything but 0.
    gradient = np.where(allowed, gradient, 0.0)
    hessian = np.where(allowed[:, None] & allowed, hessian, 0.0)
    if not np.isfinite(hessian).all():
        raise InputError("gauss_newton is unknown between blocks whose own entry is known; measure the gates again")

    def change(sets: Bool[np.ndarray, "sets depth"]) -> Float[np.ndarray, " sets"]:
        chosen = sets.astype(np.float64)
        return -chosen @ gradient + ((chosen @ hessian) * chosen).sum(1) / 2

    if count_sets(np.ones_like(allowed), remove, evidence.period) <= EXACT_LIMIT:
        sets = all_sets(allowed, remove, evidence.period)
        if not len(sets):
            raise InputError(
                f"the gates of too many blocks are unknown to remove {remove}; remove fewer or measure again"
            )
        costs, search = change(sets), "exact"
        best, cost = sets[np.argmin(costs)], costs.min()
    else:
        best, cost = descend(change, allowed, remove, evidence.period, swap=True, beam=BEAM)
        search = "beam+swap"
    return Selection.of(
        np.flatnonzero(best).tolist(), -alone, float(cost), unit="predicted change of the loss", search=search
    )


def greedy(evidence: Evidence, *, remove: int, swap: bool = False) -> Selection:
    """Removes one block after another, each time the one whose removal leaves the smallest measured loss.

    With a period above 1, that many neighbours among the blocks still there go together. About ``remove * depth /
    period`` runs of the model, and as many again for each round of swaps.

    Args:
      evidence: ``loss`` is used; a loss that is not finite counts as infinite.
      remove: number of blocks to remove.
      swap: afterwards put single blocks back for others as long as that lowers the loss.

    Returns:
      Selection with minus the rise of the loss when the block goes first as scores (with its best neighbours if the
      period is above 1; NaN for protected blocks), the rise of the loss as cost, in the detail the loss of the full
      model (``loss_before``) and the number of ``evaluations``.
    """
    check_remove(evidence, remove)
    loss, measured = evidence.need("loss"), {}

    def measure(sets: Bool[np.ndarray, "sets depth"]) -> Float[np.ndarray, " sets"]:
        for removed in sets:
            if removed.tobytes() not in measured:
                value = float(loss(1.0 - removed))
                measured[removed.tobytes()] = value if np.isfinite(value) else np.inf
        return np.array([measured[removed.tobytes()] for removed in sets])

    nothing = np.zeros(evidence.depth, bool)
    before = float(measure(nothing[None])[0])
    if np.isinf(before):
        raise InputError("the calibration loss of the full model is not finite; check the checkpoint and the data")
    allowed = unprotected(evidence)
    first = one_more(nothing, allowed, evidence.period)
    rise = np.where(first, measure(first)[:, None] - before, np.inf).min(0, initial=np.inf)
    best, after = descend(measure, allowed, remove, evidence.period, swap=swap)
    return Selection.of(
        np.flatnonzero(best).tolist(),
        np.where(allowed & np.isfinite(rise), -rise, np.nan),
        after - before,
        unit="measured rise of the loss",
        loss_before=before,
        evaluations=len(measured),
    )
