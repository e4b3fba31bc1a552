"""Criterion "healed": of many cuts, the one that does best once it has been healed.

Healing takes away most of what a cut breaks, and not the same share of it everywhere: runs of removed blocks that look
dear to the other criteria may heal well. What is left does not follow from the gaps one by one, so whole cuts are
healed and measured. There are too many of them; tried are the choices of the other criteria, and those of "jumps" among
cuts without long runs.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from clp_jax.errors import InputError
from clp_jax.selection.evidence import Evidence
from clp_jax.selection.feasible import check_remove
from clp_jax.selection.jumps import jumps
from clp_jax.selection.result import Selection


def healed(evidence: Evidence, *, remove: int, choices: Mapping[str, Selection]) -> Selection:
    """Removes what leaves the smallest loss after healing.

    Args:
      evidence: ``healed_loss`` is used, and ``damage`` where it is known; a loss that is not finite counts as infinite.
      remove: number of blocks to remove.
      choices: of other criteria, each of so many blocks, by name.

    Returns:
      Selection with NaN as scores, for no block was looked at alone; the loss as cost, and in the detail the cuts that
      were ``tried``, best first, as ``by`` (who proposed them), ``removed`` and ``loss``. Neither loss nor detail where
      all propose the same.

    Raises:
      InputError: no cut is proposed, or no loss is finite.

    >>> blocks = np.arange(4)
    >>> choices = {"first": Selection.of([2, 3], np.zeros(4)), "random": Selection.of([1, 3], np.zeros(4))}
    >>> spread = Evidence(4, *np.full((2, 5, 5), np.nan), healed_loss=lambda gates: float(gates @ (blocks % 2)))
    >>> healed(spread, remove=2, choices=choices).removed
    (1, 3)
    """
    check_remove(evidence, remove)
    loss: Callable[[np.ndarray], float] = evidence.need("healed_loss")
    proposed: dict[tuple[int, ...], list[str]] = {}
    for name, choice in {**choices, **_without_long_runs(evidence, remove)}.items():
        proposed.setdefault(choice.removed, []).append(name)
    if not proposed:
        raise InputError("no other criterion proposes a cut to heal; measure more")
    if len(proposed) == 1:
        return Selection.of(next(iter(proposed)), np.full(evidence.depth, np.nan))
    losses = {removed: _finite(loss(_gates(evidence.depth, removed))) for removed in proposed}
    if not np.isfinite(list(losses.values())).any():
        raise InputError("no cut has a finite loss once it is healed; check the checkpoint and the data")
    ranked = sorted(proposed, key=lambda removed: losses[removed])
    return Selection.of(
        ranked[0],
        np.full(evidence.depth, np.nan),
        losses[ranked[0]],
        unit="loss after healing",
        tried=[
            {"by": proposed[removed], "removed": list(removed), "loss": _json(losses[removed])} for removed in ranked
        ],
    )


def _without_long_runs(evidence: Evidence, remove: int) -> dict[str, Selection]:
    """What "jumps" chooses where no run of removed blocks is longer than 1, 2, ...: fewer of them than go."""
    if not evidence.has("damage"):
        return {}
    damage = evidence.need("damage")
    states = np.arange(len(damage))
    length = states[None, :] - states[:, None]
    found: dict[str, Selection] = {}
    for longest in range(evidence.period, remove, evidence.period):
        short = dataclasses.replace(evidence, damage=np.where(length <= longest, damage, np.nan))
        try:
            found[f"jumps, runs of {longest} at most"] = jumps(short, remove=remove)
        except InputError:
            continue  # so many blocks do not fit into such short runs
    return found


def _gates(depth: int, removed: tuple[int, ...]) -> np.ndarray:
    gates = np.ones(depth)
    gates[list(removed)] = 0
    return gates


def _finite(loss: float) -> float:
    return loss if np.isfinite(loss) else np.inf


def _json(loss: float) -> float | None:
    return loss if np.isfinite(loss) else None
