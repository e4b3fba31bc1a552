"""What the report shows about one group of towers that are pruned together, gathered from analysis and findings."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from clp_jax import selection
from clp_jax.analysis import Analysis, EvidenceOptions
from clp_jax.errors import InputError
from clp_jax.findings import Findings
from clp_jax.selection import Evidence, GateEvidence
from clp_jax.similarity import VARIANTS, TowerSimilarity


@dataclasses.dataclass(frozen=True, eq=False)
class GroupView:
    """One group of towers, its blocks numbered from 0 and its states 0..depth.

    Attributes:
      name: "vlm+action".
      towers: similarity per tower.
      options: which variant of CKA the selection read.
      removed: blocks that the plan removes.
      evidence: what is known about the towers jointly.
      variants: the joint evidence under each of `VARIANTS`.
      chosen: JSON record of the criterion that made the plan: its scores and details; empty for a plan made by hand.
      twins: the same of the paper's rule, which has ``tau`` and ``runs``; empty if it was not among the criteria.
      intervals: interval of CKA per tower, where there is one.
      stability: how often the paper's rule removes each block when episodes are resampled; None if unknown.
    """

    name: str
    towers: dict[str, TowerSimilarity]
    options: EvidenceOptions
    removed: tuple[int, ...]
    evidence: Evidence
    variants: tuple[Evidence, ...]
    chosen: dict[str, Any]
    twins: dict[str, Any]
    intervals: dict[str, Float[np.ndarray, "2 l l"]]
    stability: Float[np.ndarray, " depth"] | None

    @property
    def depth(self) -> int:
        """Blocks of each tower of the group."""
        return self.evidence.depth

    @property
    def gates(self) -> GateEvidence:
        """Derivatives of the loss; all None if they were not measured."""
        return self.evidence.gates or GateEvidence()

    def known(self, tower: str) -> Evidence:
        """One tower's own values under the options, NaN where nothing reads a state."""
        return self.towers[tower].evidence(self.options.states, self.options.estimator)

    def blocks(self, tower: str, name: str) -> Float[np.ndarray, " depth"]:
        """Each block's own entry of one of a tower's matrices: "similarity", "cosine" or "residual"."""
        return own(getattr(self.known(tower), name))

    def interval(self, tower: str) -> Float[np.ndarray, "2 depth"]:
        """Interval of the CKA of each block's input and output; NaN where there is none."""
        if tower not in self.intervals:
            return np.full((2, self.depth), np.nan)
        interval = np.diagonal(self.intervals[tower].astype(np.float64), offset=1, axis1=1, axis2=2)
        return np.where(np.isfinite(self.blocks(tower, "similarity")), interval, np.nan)

    def scores(self) -> Float[np.ndarray, " depth"]:
        """How the chosen criterion rates each block, higher = more removable; NaN where it does not."""
        scores = self.chosen.get("scores") or [None] * self.depth
        return np.array([np.nan if score is None else score for score in scores], np.float64)

    def jump_costs(self) -> Float[np.ndarray, " sizes"] | None:
        """Cost of the cheapest jumps by number of removed blocks, 0..depth-1; None if no damage is known."""
        if not self.evidence.has("damage"):
            return None
        return selection.jump_table(self.evidence, up_to=self.depth - 1).costs

    def plan_cost(self) -> float:
        """The sum of damages of the plan's own jumps, to compare with `jump_costs`; NaN if one is unknown."""
        last = [block for block in self.removed if block + 1 not in self.removed]
        first = [block for block in self.removed if block - 1 not in self.removed]
        return float(sum(self.evidence.damage[start, end + 1] for start, end in zip(first, last, strict=True)))

    def clp_under(self, variant: int) -> tuple[int, ...] | None:
        """What the paper's rule removes, as many blocks, under another variant of CKA; None if it cannot."""
        try:
            return selection.clp(self.variants[variant], remove=len(self.removed)).removed
        except InputError:
            return None


def own(matrix: Float[np.ndarray, "l l"]) -> Float[np.ndarray, " depth"]:
    """Each block's own entry [l, l + 1]."""
    return np.diagonal(matrix, offset=1).astype(np.float64)


def group_views(analysis: Analysis, findings: Findings, options: EvidenceOptions) -> tuple[GroupView, ...]:
    """One view per group of measured towers, the language stack first."""
    clp = next((choice.plan for choice in findings.choices if choice.criterion == "clp"), None)
    views = []
    for group in analysis.groups:
        name = "+".join(group)
        views.append(
            GroupView(
                name=name,
                towers={tower: analysis.towers[tower] for tower in group},
                options=options,
                removed=findings.plan.removed(group[0]),
                evidence=analysis.evidence(group, options),
                variants=tuple(analysis.evidence(group, EvidenceOptions(*pair, options.couple)) for pair in VARIANTS),
                chosen=findings.plan.scores.get(name, {}),
                twins=clp.scores.get(name, {}) if clp else {},
                intervals={tower: findings.intervals[tower] for tower in group if tower in findings.intervals},
                stability=findings.stability.get(name),
            )
        )
    return tuple(views)
