"""How many blocks to remove, from the four ways of asking for a depth."""

import math

from clp_jax.errors import InputError
from clp_jax.selection.evidence import Evidence
from clp_jax.selection.jumps import jump_table, knee
from clp_jax.selection.twins import pool_size


def how_many(
    evidence: Evidence,
    *,
    keep_layers: int | None = None,
    keep_ratio: float | None = None,
    threshold: float | None = None,
    auto: bool = False,
) -> int:
    """Returns the number of blocks to remove; exactly one way of asking must be used.

    Args:
      evidence: of the group of towers; ``similarity`` is needed for ``threshold``, ``damage`` for ``auto``.
      keep_layers: number of blocks that stay, 1 to depth.
      keep_ratio: share of the blocks that stay, above 0, at most 1. The number kept is rounded up, and up again until
        the number removed is a multiple of the period: never more goes than was asked for.
      threshold: CKA from which neighbouring states are twins, above 0, at most 1: all blocks go that criterion "clp"
        has in its pool at this threshold.
      auto: the knee of the cost curve of criterion "jumps", at most half of the blocks.

    Raises:
      InputError: none or several ways are used, a number is out of range, or the curve has no knee.

    >>> how_many(Evidence.unmeasured(27), keep_ratio=0.5)  # 14 of 27 stay
    13
    """
    ways = {"keep_layers": keep_layers, "keep_ratio": keep_ratio, "threshold": threshold, "auto": auto or None}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        named = " and ".join(given) if given else "none"
        raise InputError(f"say how deep the tower shall be in one way, {', '.join(ways)}; given: {named}")
    depth = evidence.depth
    if keep_layers is not None:
        if not 1 <= keep_layers <= depth:
            raise InputError(f"cannot keep {keep_layers} of {depth} blocks; give 1 to {depth}")
        return depth - keep_layers
    if keep_ratio is not None:
        if not 0.0 < keep_ratio <= 1.0:
            raise InputError(f"the share of blocks to keep is {keep_ratio}; give a number above 0 and at most 1")
        # 0.28 of 25 is 7.000000000000001 in floating point and means 7.
        remove = depth - math.ceil(keep_ratio * depth - 1e-9)
        return min(remove, depth - 1) // evidence.period * evidence.period
    if threshold is not None:
        return pool_size(evidence, threshold)
    remove = knee(jump_table(evidence, up_to=depth - 1).costs)
    if not remove:
        raise InputError(
            "the cost of removing blocks rises without a knee, so no depth suggests itself; say how many are to stay"
        )
    return remove
