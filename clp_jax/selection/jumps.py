"""Criterion "jumps": the cheapest way through the states, exactly, by a dynamic programme.

Removing the run of blocks i..j-1 feeds state i to the reader of state j, which costs damage[i, j]. A removal is a set
of such jumps with at least one kept block between any two, and costs their sum. The programme finds the cheapest
removal of every size at once in O(depth^2 * size) steps. A sum is an assumption (damages may compound or heal); the
criteria of `gates.py` ask the loss instead.

The last state is read by the final norm and the head, which look at directions, just as a block does: a jump to it is
priced like any other. Yet no block comes after it to absorb the change, so protecting the last block is a fair choice.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from clp_jax.errors import InputError
from clp_jax.selection.evidence import Evidence
from clp_jax.selection.feasible import check_remove
from clp_jax.selection.result import Selection


def jumps(evidence: Evidence, *, remove: int) -> Selection:
    """Removes the blocks with the smallest sum of damages over the jumps.

    Args:
      evidence: ``damage`` is used; a jump of unknown (NaN) damage is not made.
      remove: number of blocks to remove.

    Returns:
      Selection with minus the damage of removing the block alone as scores, the sum of damages as cost, and in the
      detail the ``jumps`` as [state, state, damage] and ``costs``: the cheapest cost of every size up to this one (null
      where none is possible).

    Raises:
      InputError: no removal of that size has known damages.

    >>> damage = 0.1 * np.abs(np.subtract.outer(np.arange(4.0), np.arange(4.0))) ** 2
    >>> choice = jumps(Evidence(3, 1 - damage, damage), remove=2)
    >>> choice.removed, round(choice.predicted_cost, 3)
    ((0, 2), 0.2)
    """
    check_remove(evidence, remove)
    table = jump_table(evidence, up_to=remove)
    damage = evidence.need("damage")
    made = table.jumps(remove)
    return Selection.of(
        [block for start, end in made for block in range(start, end)],
        -evidence.adjacent("damage"),
        float(table.costs[remove]),
        unit="sum of 1 - CKA",
        jumps=[[start, end, float(damage[start, end])] for start, end in made],
        costs=[float(cost) if np.isfinite(cost) else None for cost in table.costs],
    )


@dataclass(frozen=True, eq=False)
class JumpTable:
    """The cheapest removals of all sizes.

    Attributes:
      costs: smallest sum of damages by number of removed blocks; inf where no removal of that size is possible.
      kept: smallest cost of standing at a state after a kept block (or at the start).
      jumped: smallest cost of standing at a state after a jump.
      start: state at which that jump began.
    """

    costs: Float[np.ndarray, " sizes"]
    kept: Float[np.ndarray, "l sizes"]
    jumped: Float[np.ndarray, "l sizes"]
    start: Int[np.ndarray, "l sizes"]

    def jumps(self, remove: int) -> list[tuple[int, int]]:
        """Returns the jumps (from state, to state) of the cheapest removal of that size, first to last.

        Raises:
          InputError: no removal of that size is possible.
        """
        if not np.isfinite(self.costs[remove]):
            raise InputError(
                f"no set of {remove} blocks has known damages throughout; remove fewer or measure all states"
            )
        made: list[tuple[int, int]] = []
        state = len(self.kept) - 1
        while state:
            if self.jumped[state, remove] < self.kept[state, remove]:
                start = int(self.start[state, remove])
                made.append((start, state))
                remove -= state - start
                state = start
            # A jump only begins at the input or after a kept block.
            state = max(state - 1, 0)
        return made[::-1]


def jump_table(evidence: Evidence, *, up_to: int) -> JumpTable:
    """Returns the cheapest removals of 0 to ``up_to`` blocks, which must leave one.

    Of removals that cost the same it takes the one whose last jump ends first, then begins last.
    """
    damage, states, period = evidence.need("damage"), evidence.depth + 1, evidence.period
    kept, jumped = np.full((2, states, up_to + 1), np.inf)
    start = np.zeros((states, up_to + 1), int)
    kept[0, 0] = 0.0
    for end in range(1, states):
        kept[end] = np.minimum(kept[end - 1], jumped[end - 1])
        for length in range(1, min(end, up_to) + 1):
            begin = end - length
            if begin in evidence.protected:
                break
            if length % period or not np.isfinite(damage[begin, end]):
                continue
            cost = kept[begin, : up_to + 1 - length] + damage[begin, end]
            better = cost < jumped[end, length:]
            jumped[end, length:][better] = cost[better]
            start[end, length:][better] = begin
    return JumpTable(np.minimum(kept[-1], jumped[-1]), kept, jumped, start)


def knee(costs: Float[np.ndarray, " sizes"], *, limit: int | None = None) -> int:
    """Returns the number of blocks after which removing more becomes disproportionately dear.

    It is the size whose cost lies furthest below the straight line from the first to the last size, at most the limit;
    0 if none lies below it. The whole curve is looked at, because a bend just behind the limit says that all up to the
    limit is cheap. A curve that bends evenly has its knee near its middle: look at it before trusting the number.

    Args:
      costs: cost by number of removed blocks, starting at 0; sizes that are not finite are passed over.
      limit: largest size to return; by default half of the depth, where ``costs`` covers 0 to depth - 1.

    >>> knee(np.array([0.0, 0.01, 0.02, 0.03, 5.0, 10.0, 15.0, 20.0]))
    3
    """
    limit = len(costs) // 2 if limit is None else limit
    sizes = np.flatnonzero(np.isfinite(costs))
    if len(sizes) < 3:
        return 0
    rise = costs[sizes] - costs[sizes[0]]
    below = rise[-1] * sizes / sizes[-1] - rise
    best = int(np.argmax(below))
    # A straight line has no knee: differences at the level of rounding are not below it.
    if below[best] <= 1e-9 * abs(rise[-1]):
        return 0
    return int(sizes[sizes <= min(sizes[best], limit)][-1])
