"""What an analysis comes to: the plan, every criterion's choice and its loss, sizes before and after."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from clp_jax import selection
from clp_jax.analysis import Analysis, EvidenceOptions
from clp_jax.flops import forward_flops, parameter_count, sample_flops
from clp_jax.healed_cuts import HealedCut, HealedCuts
from clp_jax.models import Architecture, Gates, Lengths, family_of
from clp_jax.plan import PrunePlan
from clp_jax.progress import track_stage
from clp_jax.selection import Evidence
from clp_jax.sensitivity import make_group_loss, plan_gates
from clp_jax.similarity import VARIANTS


@dataclasses.dataclass(frozen=True)
class Size:
    """Counted, not measured: parameters, and floating-point operations per observation.

    Attributes:
      parameters: number of parameters.
      forward: operations of one training forward pass.
      sample: operations of sampling one action chunk; None of a model that samples none.
    """

    parameters: int
    forward: int
    sample: int | None


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one criterion would remove, and what that does to the loss before any fine-tuning.

    Attributes:
      criterion: its name.
      plan: the plan it gives.
      loss: zero-shot loss on the evaluation data, NaN if it was not measured.
      healed: what healing leaves of it; None if it was not healed, or removes nothing.
    """

    criterion: str
    plan: PrunePlan
    loss: float
    healed: HealedCut | None = None


@dataclasses.dataclass(frozen=True)
class Findings:
    """Everything the report shows beside the matrices.

    Attributes:
      checkpoint: where the model came from.
      plan: the chosen plan.
      choices: every criterion at the same depth, the chosen one first.
      full_loss: loss of the unpruned model on the same data.
      loss_data: "held-out" or "calibration", and how many observations, e.g. "4 held-out observations".
      before: size of the model as it is.
      after: size under the plan.
      intervals: per tower the 95 % bootstrap interval of CKA [2, l, l] under the chosen variant; absent without
        clusters.
      stability: per group ("vlm+action") how often each block is removed when episodes are resampled [depth].
      warnings: sentences for the reader.
    """

    checkpoint: str
    plan: PrunePlan
    choices: tuple[Choice, ...]
    full_loss: float
    loss_data: str
    before: Size
    after: Size
    intervals: Mapping[str, Float[np.ndarray, "2 l l"]]
    stability: Mapping[str, Float[np.ndarray, " depth"]]
    warnings: tuple[str, ...]

    @property
    def healed(self) -> HealedCut | None:
        """What healing leaves of the plan, None if it was not healed."""
        return self.choices[0].healed if self.choices else None

    def to_json(self) -> dict[str, Any]:
        """JSON values: the numbers behind the report; null where nothing was measured."""
        return {
            "checkpoint": self.checkpoint,
            "criterion": self.plan.criterion,
            "full_loss": _number(self.full_loss),
            "loss_data": self.loss_data,
            "before": dataclasses.asdict(self.before),
            "after": dataclasses.asdict(self.after),
            "choices": [
                {
                    "criterion": choice.criterion,
                    "loss": _number(choice.loss),
                    "healed_loss": None if choice.healed is None else _number(choice.healed.loss),
                    "removed": {name: list(tower.removed) for name, tower in choice.plan.towers.items()},
                }
                for choice in self.choices
            ],
            "healing": [] if self.healed is None else [repair.to_json() for repair in self.healed.repairs],
            "stability": {name: [_number(v) for v in values] for name, values in self.stability.items()},
            "warnings": list(self.warnings),
        }


def size_of(architecture: Architecture, lengths: Lengths, *, cameras: int) -> Size:
    """Parameters and operations of a model on observations of this size."""
    acts = family_of(architecture).why_no_actions(architecture) is None
    sample = sample_flops(architecture, lengths, cameras=cameras) if acts else None
    return Size(parameter_count(architecture), forward_flops(architecture, lengths, cameras=cameras), sample)


def compare_criteria(
    analysis: Analysis,
    remove: Mapping[tuple[str, ...], int],
    *,
    chosen: str,
    criteria: Sequence[str],
    options: EvidenceOptions,
    architecture: Architecture,
    calibration_loss: Callable[[Gates], float] | None,
    evaluation_loss: Callable[[Gates], float] | None,
    healed: HealedCuts | None = None,
    seed: int = 0,
) -> tuple[Choice, ...]:
    """Select with every criterion, the same number of blocks each, and measure the loss of every choice.

    Args:
      analysis: from ``analyse``.
      remove: blocks to remove per group of towers.
      chosen: the criterion whose plan will be used; comes first.
      criteria: the others; those for which the evidence is lacking are left out.
      options: how matrices become evidence.
      architecture: of the analysed model.
      calibration_loss: what the criterion greedy minimises.
      evaluation_loss: what the choices are compared by; None leaves NaN.
      healed: heals every choice, and more cuts for the criterion healed; None heals none.
      seed: for the criterion random.
    """
    evidences: dict[tuple[str, ...], Evidence] = {}
    for group in remove:
        loss = None if calibration_loss is None else make_group_loss(group, calibration_loss)
        healed_loss = None if healed is None else healed.loss(group)
        evidences[group] = analysis.evidence(group, options, loss=loss, healed_loss=healed_loss)
    possible = [name for name in criteria if all(name in selection.available(e) for e in evidences.values())]
    choices = []
    for name in track_stage(list(dict.fromkeys([chosen, *possible])), "comparing", unit="criteria"):
        picks = {g: selection.select(name, e, remove=remove[g], seed=seed) for g, e in evidences.items()}
        plan = analysis.plan(picks, name)
        loss = float("nan") if evaluation_loss is None else evaluation_loss(plan_gates(architecture, plan))
        choices.append(Choice(name, plan, loss, None if healed is None or plan.is_identity else healed.of(plan)))
    return tuple(choices)


def intervals(analysis: Analysis, options: EvidenceOptions) -> dict[str, np.ndarray]:
    """95 % bootstrap intervals of CKA per tower; towers with a single cluster of episodes have none."""
    variant = VARIANTS.index((options.states, options.estimator))
    return {
        name: selection.cka_interval(tower.clusters[:, variant])
        for name, tower in analysis.towers.items()
        if len(tower.clusters) > 1
    }


def clp_stability(
    analysis: Analysis, remove: Mapping[tuple[str, ...], int], options: EvidenceOptions
) -> dict[str, np.ndarray]:
    """How often the paper's rule removes each block of a group when its episodes are resampled.

    All towers of a group are resampled together: the same episodes are drawn for each.
    """
    variant = VARIANTS.index((options.states, options.estimator))
    found: dict[str, np.ndarray] = {}
    for group, count in remove.items():
        towers = [analysis.towers[name] for name in group]
        if count == 0 or min(len(tower.clusters) for tower in towers) < 2:
            continue
        found["+".join(group)] = _resampled_choice(
            [t.clusters[:, variant] for t in towers], analysis, group, count, options
        )
    return found


def _resampled_choice(
    clusters: list[np.ndarray], analysis: Analysis, group: tuple[str, ...], count: int, options: EvidenceOptions
) -> np.ndarray:
    parts = {name: analysis.towers[name].evidence(options.states, options.estimator) for name in group}
    read = {name: np.isfinite(part.similarity) for name, part in parts.items()}

    def removed(cka: np.ndarray) -> tuple[int, ...]:
        resampled = {
            name: dataclasses.replace(part, similarity=np.where(read[name], cka[i], np.nan))
            for i, (name, part) in enumerate(parts.items())
        }
        evidence = selection.combine(resampled, how=options.couple if len(group) > 1 else "mean")
        return selection.clp(evidence, remove=count).removed

    return selection.stability(np.stack(clusters, axis=1), removed)


def warnings_of(analysis: Analysis, options: EvidenceOptions) -> tuple[str, ...]:
    """What the reader should know before trusting the matrices."""
    found = []
    for name, tower in analysis.towers.items():
        if tower.massive_states and options.states == "raw":
            found.append(
                f"Massive channels in tower {name}: in states {tower.massive_states} one channel holds over half of "
                "the variance, so raw CKA mostly compares that channel. Prefer --states rms."
            )
    if analysis.meta["clusters"] < 4:
        found.append(
            f"Only {analysis.meta['episodes']} episodes: bootstrap intervals over them say little. Give more episodes."
        )
    return tuple(found)


def _number(value: float) -> float | None:
    """A JSON number, null for what is not finite."""
    return float(value) if np.isfinite(value) else None
