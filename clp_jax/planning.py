"""From an analysis to a plan: how deep each group of towers becomes, and which of its blocks go."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from clp_jax.analysis import Analysis, EvidenceOptions
from clp_jax.errors import InputError
from clp_jax.healed_cuts import HealedCuts
from clp_jax.models import Architecture, Gates, Shape
from clp_jax.plan import PrunePlan, check_period
from clp_jax.selection import CRITERIA, Evidence, how_many, select
from clp_jax.selection.feasible import check_remove
from clp_jax.sensitivity import make_group_loss

Group = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Depth:
    """How deep the towers shall be; one of the ways per group.

    Attributes:
      keep_layers: blocks that stay: one number for a model with one group of towers, or a number per tower.
      keep_ratio: share of the blocks that stay, rounded up: for all groups, or per tower.
      threshold: remove every twin with a CKA of at least this to its predecessor.
      auto: remove up to the knee of the jump-cost curve, at most half.
      keep_optional: blocks that stay of the optional tower, the image encoder; all if None.
    """

    keep_layers: int | Mapping[str, int] | None = None
    keep_ratio: float | Mapping[str, float] | None = None
    threshold: float | None = None
    auto: bool = False
    keep_optional: int | None = None

    @property
    def is_given(self) -> bool:
        """Whether some way of asking was used for the towers that are always measured."""
        return self.auto or any(x is not None for x in (self.keep_layers, self.keep_ratio, self.threshold))


def check_depth(depth: Depth, criterion: str, architecture: Architecture | Shape) -> None:
    """Refuse what no evidence could give, before anything is read or run.

    Raises:
      InputError: no such criterion or tower, two ways of asking for a depth, or a number out of range.
    """
    if criterion not in CRITERIA:
        raise InputError(f"there is no criterion {criterion!r}; choose one of {', '.join(CRITERIA)}.")
    ways = [depth.keep_layers, depth.keep_ratio, depth.threshold, depth.auto or None]
    if sum(way is not None for way in ways) > 1:
        raise InputError("give one of --keep-layers, --keep-ratio, --threshold and --auto.")
    known = architecture.depths
    periods = {tower.name: tower.period for tower in architecture.towers}
    groups, optional = groups_of(architecture)
    for name, value in (("keep_layers", depth.keep_layers), ("keep_ratio", depth.keep_ratio)):
        for group, number in ({} if value is None else per_group(value, groups, name)).items():
            evidence = Evidence.unmeasured(known[group[0]], period=periods[group[0]])
            check_remove(evidence, how_many(evidence, **{name: number}))
    if depth.keep_optional is not None:
        if not optional:
            raise InputError("this model has no image encoder to cut; leave out --keep-vision-layers.")
        how_many(Evidence.unmeasured(known[optional[0][0]]), keep_layers=depth.keep_optional)


def groups_of(architecture: Architecture | Shape) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    """The groups that are always measured, and those on request."""
    optional = {tower.name for tower in architecture.towers if tower.optional}
    asked = tuple(group for group in architecture.groups if group[0] in optional)
    return tuple(group for group in architecture.groups if group not in asked), asked


def per_group(value: Any, groups: Sequence[Group], name: str) -> dict[Group, Any]:
    """The value of each group that has one.

    Args:
      value: one for all groups, or a mapping from the name of a tower, or of a group ("vlm+action").
      groups: there are.
      name: of the flag, for messages.

    Raises:
      InputError: an unknown tower, two values for one group, or one number of blocks for several groups.

    >>> per_group({"dit": 8}, [("llm",), ("dit",)], "keep_layers")
    {('dit',): 8}
    """
    flag = f"--{name.replace('_', '-')}"
    if not isinstance(value, Mapping):
        if len(groups) > 1 and name != "keep_ratio":
            example = ("," if name == "depths" else " ").join(f"{group[0]}=..." for group in groups)
            raise InputError(f"{flag} {value} does not say of which tower; write {flag} {example}.")
        return dict.fromkeys(groups, value)
    found: dict[Group, Any] = {}
    for tower, number in value.items():
        group = next((group for group in groups if tower in (*group, "+".join(group))), None)
        if group is None:
            raise InputError(f"{flag}: there is no tower {tower!r}; the model has {_listed(groups)}.")
        if found.get(group, number) != number:
            raise InputError(f"{flag}: towers {' and '.join(group)} keep the same blocks; give one value for both.")
        found[group] = number
    return found


def removals(analysis: Analysis, depth: Depth, options: EvidenceOptions = EvidenceOptions()) -> dict[Group, int]:
    """How many blocks go from each measured group of towers.

    Args:
      analysis: what was measured.
      depth: what is asked for; the knee of the curve where nothing is.
      options: how matrices become evidence.

    Raises:
      InputError: the depth does not fit the towers, or asks for one that was not measured.
    """
    optional = [group for group in analysis.groups if analysis.tower(group[0]).optional]
    groups = [group for group in analysis.groups if group not in optional]
    layers, ratio = (
        {} if value is None else per_group(value, groups, name)
        for name, value in (("keep_layers", depth.keep_layers), ("keep_ratio", depth.keep_ratio))
    )
    remove: dict[Group, int] = {}
    for group in groups:
        named = {"keep_layers": layers.get(group), "keep_ratio": ratio.get(group)}
        others = depth.keep_layers is None and depth.keep_ratio is None
        if not others and all(value is None for value in named.values()):
            remove[group] = 0
            continue
        automatic = depth.auto or not depth.is_given
        remove[group] = how_many(analysis.evidence(group, options), **named, threshold=depth.threshold, auto=automatic)
    for group in optional:
        keep = depth.keep_optional
        remove[group] = 0 if keep is None else how_many(analysis.evidence(group, options), keep_layers=keep)
    if depth.keep_optional is not None and not optional:
        raise InputError("--keep-vision-layers needs a measured image encoder: analyse with --vision.")
    return remove


def choose(
    analysis: Analysis,
    criterion: str,
    depth: Depth,
    options: EvidenceOptions = EvidenceOptions(),
    *,
    loss: Callable[[Gates], float] | None = None,
    healed: HealedCuts | None = None,
    inner: PrunePlan | None = None,
    seed: int = 0,
) -> PrunePlan:
    """Select with one criterion, each group of towers on its own.

    Args:
      analysis: what was measured.
      criterion: a key of ``selection.CRITERIA``.
      depth: how deep.
      options: how matrices become evidence.
      loss: of the model on calibration data as a function of its gates, for the criterion greedy.
      healed: heals cuts of the model, for the criterion healed.
      inner: a plan of a smaller model whose blocks are all to stay.
      seed: of the criterion random.

    Raises:
      InputError: the depth does not fit, or the criterion needs what was not measured.
    """
    picks = {}
    for group, count in removals(analysis, depth, options).items():
        group_loss = None if loss is None else make_group_loss(group, loss)
        healed_loss = None if healed is None else healed.loss(group)
        evidence = analysis.evidence(group, options, loss=group_loss, healed_loss=healed_loss)
        if inner is not None:
            evidence = dataclasses.replace(evidence, protected=evidence.protected.union(inner.towers[group[0]].keep))
        picks[group] = select(criterion, evidence, remove=count, seed=seed)
    return analysis.plan(picks, criterion)


def choose_nested(
    analysis: Analysis,
    criterion: str,
    depths: Sequence[Depth],
    options: EvidenceOptions = EvidenceOptions(),
    *,
    seed: int = 0,
) -> list[PrunePlan]:
    """Plans of which each keeps all blocks that the next keeps: the smallest is chosen freely, the others around it.

    Args:
      analysis: what was measured.
      criterion: a key of ``selection.CRITERIA``.
      depths: how deep, in any order.
      options: how matrices become evidence.
      seed: of the criterion random.

    Returns:
      From the deepest to the smallest.

    Raises:
      InputError: two depths are the same or do not lie in each other, or what `choose` raises.
    """

    def removed(depth: Depth) -> tuple[int, ...]:
        return tuple(removals(analysis, depth, options).values())

    plans: list[PrunePlan] = []
    before: tuple[int, ...] | None = None
    for depth in sorted(depths, key=removed, reverse=True):
        count = removed(depth)
        if before is not None and (count == before or any(n > m for n, m in zip(count, before, strict=True))):
            raise InputError("of two depths one must keep more blocks of a tower and no fewer of any other.")
        plans.append(choose(analysis, criterion, depth, options, inner=plans[-1] if plans else None, seed=seed))
        before = count
    return plans[::-1]


def plan_of_blocks(architecture: Architecture | Shape, keep: Sequence[int] | Mapping[str, Sequence[int]]) -> PrunePlan:
    """The plan of a person who says which blocks stay.

    Args:
      architecture: of the model.
      keep: blocks of the model's one group of towers, or blocks per tower; towers not named stay whole.

    Raises:
      InputError: no such tower, or blocks that the model cannot be without.
    """
    groups, optional = groups_of(architecture)
    chosen = per_group(keep, groups if not isinstance(keep, Mapping) else (*groups, *optional), "keep")
    by_tower = {name: list(blocks) for group, blocks in chosen.items() for name in group}
    plan = PrunePlan.of(architecture.kind, architecture.depths, by_tower, coupled=architecture.coupled)
    check_plan(plan, architecture)
    return plan


def check_plan(plan: PrunePlan, architecture: Architecture | Shape) -> None:
    """Raise unless a plan, perhaps edited, fits a model.

    Raises:
      InputError: another kind of model, other depths, towers of one group that keep different blocks, a protected
        block that goes, or blocks at places where the model has another kind.
    """
    if plan.kind != architecture.kind:
        raise InputError(f"the plan is for a {plan.kind} model, the checkpoint is a {architecture.kind}.")
    plan.check_against(architecture.depths)
    for group in architecture.coupled:
        kept = {plan.removed(name) for name in group}
        if len(kept) > 1:
            raise InputError(
                f"towers {' and '.join(group)} share one stack and must keep the same blocks; the plan removes "
                f"{' and '.join(str(list(blocks)) for blocks in sorted(kept))}."
            )
    for tower in architecture.towers:
        gone = sorted(tower.protected.intersection(plan.removed(tower.name)))
        if gone:
            raise InputError(f"block {gone[0]} of tower {tower.name!r} must stay; put it back into the plan.")
        if tower.name in plan.towers:
            check_period(plan.towers[tower.name].keep, tower.period, tower.name, depth=tower.depth)


def _listed(groups: Collection[Group]) -> str:
    return ", ".join(name for group in groups for name in group)
