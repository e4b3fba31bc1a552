"""Search among removal sets when there are too many, or each is too dear, to try them all."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from clp_jax.errors import InputError

Objective = Callable[[Bool[np.ndarray, "sets depth"]], Float[np.ndarray, " sets"]]
"""Cost of each set of removed blocks (rows, True = removed)."""


def descend(
    objective: Objective,
    allowed: Bool[np.ndarray, " depth"],
    remove: int,
    period: int,
    *,
    swap: bool,
    beam: int = 1,
) -> tuple[Bool[np.ndarray, " depth"], float]:
    """Removes ``period`` blocks at a time, always the best next ones, then optionally swaps while that helps.

    Args:
      objective: cost of each of many sets at once.
      allowed: blocks that may go.
      remove: number of blocks, a multiple of the period.
      period: the blocks of a step are neighbours among those still there, so that all runs obey the period.
      swap: put one step's blocks back and take others as long as the cost falls.
      beam: number of sets that are followed from step to step; 1 is the greedy way.

    Returns:
      The removed set as a mask, and its cost. Of sets that cost the same, the one with the earlier blocks.

    Raises:
      InputError: nothing is left that may go.
    """
    sets = np.zeros((1, len(allowed)), bool)
    for _ in range(remove // period):
        options = np.concatenate([one_more(removed, allowed, period) for removed in sets])
        if not len(options):
            raise InputError(f"only {int(sets[0].sum())} of {remove} blocks may go; remove fewer or protect fewer")
        options = np.unique(options, axis=0)[::-1]  # ways that met, once; sets with earlier blocks first
        sets = options[np.argsort(objective(options), kind="stable")[:beam]]
    removed, cost = sets[0], float(objective(sets[:1])[0])
    while swap and remove:
        tiles = np.flatnonzero(removed).reshape(-1, period)
        options = np.concatenate([one_more(_put_back(removed, tile), allowed, period) for tile in tiles])
        costs = objective(options)
        if not costs.min() < cost:
            break
        removed, cost = options[np.argmin(costs)], float(costs.min())
    return removed, cost


def one_more(
    removed: Bool[np.ndarray, " depth"], allowed: Bool[np.ndarray, " depth"], period: int
) -> Bool[np.ndarray, "sets depth"]:
    """Returns the sets with ``period`` further blocks, neighbours among those still there and all of them allowed.

    >>> one_more(np.array([False, True, False, False]), np.ones(4, bool), 2).astype(int).tolist()
    [[1, 1, 1, 0], [0, 1, 1, 1]]
    """
    kept = np.flatnonzero(~removed)
    if len(kept) < period:
        return np.zeros((0, len(removed)), bool)
    windows = np.lib.stride_tricks.sliding_window_view(kept, period)
    windows = windows[allowed[windows].all(1)]
    options = np.repeat(removed[None], len(windows), axis=0)
    np.put_along_axis(options, windows, values=True, axis=1)
    return options


def _put_back(removed: Bool[np.ndarray, " depth"], tile: Int[np.ndarray, " period"]) -> Bool[np.ndarray, " depth"]:
    result = removed.copy()
    result[tile] = False
    return result
