"""The sets of blocks that may be removed: how many, which are protected, and the period.

In a tower that alternates kinds of blocks (cross and self attention in GR00T's DiT) a block's kind follows from its new
index, so every maximal run of removed blocks must have a length divisible by the period. Such a set is a tiling of its
runs with tiles of ``period`` blocks, and this is one-to-one: a feasible set is a sequence of kept blocks and tiles.
Counting, drawing, listing and optimising below all walk over that sequence.
"""

from itertools import combinations
from math import comb

import numpy as np
from jaxtyping import Bool, Float

from clp_jax.errors import InputError
from clp_jax.selection.evidence import Evidence


def check_remove(evidence: Evidence, remove: int) -> None:
    """Checks that ``remove`` blocks can go at all.

    Raises:
      InputError: the number is out of range, no multiple of the period, or more than the protection leaves.
    """
    depth, period = evidence.depth, evidence.period
    if not 0 <= remove < depth:
        raise InputError(f"cannot remove {remove} of {depth} blocks; give 0 to {depth - 1}, at least one block stays")
    if remove % period:
        raise InputError(
            f"blocks of this tower alternate with period {period} and go in multiples of it; remove "
            f"{remove - remove % period} or {remove - remove % period + period} instead of {remove}"
        )
    if not count_sets(unprotected(evidence), remove, period):
        raise InputError(f"{len(evidence.protected)} protected blocks leave no room to remove {remove}; remove fewer")


def unprotected(evidence: Evidence) -> Bool[np.ndarray, " depth"]:
    """Returns which blocks are not protected."""
    return ~np.isin(np.arange(evidence.depth), list(evidence.protected))


def count_sets(allowed: Bool[np.ndarray, " depth"], remove: int, period: int = 1) -> int:
    """Returns how many sets of ``remove`` allowed blocks obey the period.

    >>> count_sets(np.ones(4, bool), 2), count_sets(np.ones(4, bool), 2, period=2)
    (6, 3)
    """
    return 0 if remove % period else _ways(allowed, remove, period)[0][remove // period]


def random_set(
    rng: np.random.Generator, allowed: Bool[np.ndarray, " depth"], remove: int, period: int = 1
) -> tuple[int, ...]:
    """Draws one feasible set, every one with the same probability; there must be one."""
    ways = _ways(allowed, remove, period)
    removed: list[int] = []
    block, tiles = 0, remove // period
    while tiles:
        kept = ways[block + 1][tiles]
        if rng.random() * ways[block][tiles] >= kept:
            removed += range(block, block + period)
            block, tiles = block + period, tiles - 1
        else:
            block += 1
    return tuple(removed)


def all_sets(allowed: Bool[np.ndarray, " depth"], remove: int, period: int = 1) -> Bool[np.ndarray, "sets depth"]:
    """Returns every feasible set as a row that is True where a block is removed, in lexicographic order of the blocks.

    >>> all_sets(np.ones(3, bool), 2, period=2).astype(int).tolist()
    [[1, 1, 0], [0, 1, 1]]
    """
    depth, tiles = len(allowed), remove // period
    places = comb(depth - remove + tiles, tiles)
    flat = (place for chosen in combinations(range(depth - remove + tiles), tiles) for place in chosen)
    chosen = np.fromiter(flat, int, places * tiles).reshape(places, tiles)
    first = chosen + (period - 1) * np.arange(tiles)
    blocks = (first[..., None] + np.arange(period)).reshape(places, remove)
    masks = np.zeros((places, depth), bool)
    np.put_along_axis(masks, blocks, values=True, axis=1)
    return masks[~(masks & ~allowed).any(axis=1)]


def cheapest_set(cost: Float[np.ndarray, " depth"], remove: int, period: int = 1) -> tuple[int, ...]:
    """Returns the feasible set with the smallest sum of costs; of blocks that cost the same, the earlier goes.

    Args:
      cost: cost of removing each block; a block whose cost is not finite stays.
      remove: number of blocks to remove.
      period: every maximal run has a length divisible by it.

    Raises:
      InputError: no set is feasible.

    >>> cheapest_set(np.array([3.0, 0.0, 2.0, 2.0, 0.0]), 2), cheapest_set(np.array([3.0, 0.0, 2.0, 2.0, 0.0]), 2, 2)
    ((1, 4), (1, 2))
    """
    if not count_sets(np.isfinite(cost), remove, period):
        raise InputError(
            f"the {int(np.isfinite(cost).sum())} rated, unprotected blocks hold no {remove} that may go; remove fewer"
        )
    if period == 1:
        return tuple(sorted(np.argsort(cost, kind="stable")[:remove].tolist()))
    depth, tiles = len(cost), remove // period
    cost = np.where(np.isfinite(cost), cost, np.inf)
    # best[b, t]: smallest sum when t tiles are taken from blocks b and later.
    best = np.full((depth + period, tiles + 1), np.inf)
    best[depth, 0] = 0.0
    for block in reversed(range(depth)):
        best[block] = best[block + 1]
        taken = best[block + period, :-1] + cost[block : block + period].sum()
        best[block, 1:] = np.minimum(best[block, 1:], taken)
    removed: list[int] = []
    block = 0
    while tiles:
        taken = best[block + period, tiles - 1] + cost[block : block + period].sum()
        if taken <= best[block, tiles]:
            removed += range(block, block + period)
            block, tiles = block + period, tiles - 1
        else:
            block += 1
    return tuple(removed)


def _ways(allowed: Bool[np.ndarray, " depth"], remove: int, period: int) -> list[list[int]]:
    """ways[b][t]: number of ways to take t tiles from blocks b and later."""
    depth, tiles = len(allowed), remove // period
    ways = [[0] * (tiles + 1) for _ in range(depth + period)]
    ways[depth][0] = 1
    for block in reversed(range(depth)):
        tile = block + period <= depth and bool(allowed[block : block + period].all())
        for t in range(tiles + 1):
            ways[block][t] = ways[block + 1][t] + (ways[block + period][t - 1] if tile and t else 0)
    return ways
