"""What is tried: cuts of several depths by several criteria, each with several learning rates."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clp_jax.plan import PrunePlan


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to fine-tune.

    Attributes:
      depth: blocks that stay, as the user wrote it; ``full`` for the model as it is.
      plan: which blocks stay.
      criteria: that chose these blocks, empty for the model as it is.
      peak_lr: learning rate after the warm-up.
    """

    depth: str
    plan: PrunePlan
    criteria: tuple[str, ...]
    peak_lr: float

    @property
    def cut(self) -> str:
        """Name of its cut, of which there may be several at one depth.

        A name is a folder's, too.
        """
        return "-".join((self.depth, *self.criteria[:1]))

    @property
    def name(self) -> str:
        """Its own name."""
        return f"{self.cut}-{self.peak_lr:g}"

    def to_json(self) -> dict[str, Any]:
        """JSON values; `from_json` is its inverse."""
        return dataclasses.asdict(self) | {"criteria": list(self.criteria), "plan": self.plan.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Candidate":
        """The candidate of which these are the values."""
        return cls(**{**value, "criteria": tuple(value["criteria"]), "plan": PrunePlan.from_json(value["plan"])})


FULL = "full"
"""Depth of the model as it is, by which all others are judged."""


def candidates_of(
    whole: PrunePlan,
    depths: Sequence[str],
    criteria: Sequence[str],
    learning_rates: Sequence[float],
    choose: Callable[[str, str], PrunePlan],
) -> list[Candidate]:
    """All candidates: criteria that choose the same blocks are one, a depth that removes nothing is the whole model.

    Args:
      whole: the plan that removes nothing.
      depths: to try beside the whole model.
      criteria: to choose blocks by.
      learning_rates: to try with each.
      choose: the plan for a depth by a criterion.
    """

    def kept(plan: PrunePlan) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(tower.keep) for tower in plan.towers.values())

    cuts: list[tuple[str, PrunePlan, tuple[str, ...]]] = [(FULL, whole, ())]
    for depth in depths:
        found: dict[tuple[tuple[int, ...], ...], tuple[PrunePlan, list[str]]] = {}
        for criterion in criteria:
            plan = choose(depth, criterion)
            if kept(plan) != kept(whole):
                found.setdefault(kept(plan), (plan, []))[1].append(criterion)
        cuts += [(depth, plan, tuple(names)) for plan, names in found.values()]
    return [Candidate(depth, plan, names, rate) for depth, plan, names in cuts for rate in learning_rates]
