"""The result of a criterion: what to remove, and how each block was rated."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, eq=False)
class Selection:
    """Which blocks a criterion removes.

    Attributes:
      keep: 0-based blocks that stay, sorted, at least one.
      removed: the other blocks, sorted.
      scores: one number per block, higher = more removable by this criterion when looked at alone; NaN = not rated.
        Units differ between criteria.
      predicted_cost: what the criterion expects the removal to cost, in the unit that ``detail["unit"]`` names; None
        for a mere ranking.
      detail: what the report draws and a plan records: plain JSON values.
    """

    keep: tuple[int, ...]
    removed: tuple[int, ...]
    scores: Float[np.ndarray, " depth"]
    predicted_cost: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        removed: Iterable[int],
        scores: Float[np.ndarray, " depth"],
        predicted_cost: float | None = None,
        **detail: Any,
    ) -> "Selection":
        """Returns the selection that removes these blocks and keeps the others.

        >>> Selection.of([2, 1], np.array([0.1, 0.9, 0.8, 0.2])).keep
        (0, 3)
        """
        gone = tuple(sorted(removed))
        keep = tuple(block for block in range(len(scores)) if block not in gone)
        return cls(keep, gone, scores, predicted_cost, detail)

    def to_json(self) -> dict[str, Any]:
        """Returns scores, cost and detail as standard JSON values for a plan; what is not finite becomes null."""
        scores = [_finite(score) for score in self.scores]
        cost = _finite(self.predicted_cost)
        return {"removed": list(self.removed), "scores": scores, "predicted_cost": cost} | self.detail


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
