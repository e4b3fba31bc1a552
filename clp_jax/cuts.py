"""Cuts of one model that share its weights, as ``finetune --depths`` trains them in turn.

They are nested: a block that a small one has is a block of all larger ones. Any of them can be cut out of the trained
model as it is (slimmable networks, arXiv 1812.08928, have the same idea for widths).
"""

from collections.abc import Mapping, Sequence

from clp_jax.aliases import Tree
from clp_jax.models import Architecture, Shape
from clp_jax.plan import PrunePlan
from clp_jax.prune import apply_plan

Cut = tuple[tuple[str, tuple[int, ...]], ...]
"""(tower, blocks that stay) pairs of the towers that lose some: a plan as a static value."""

WHOLE: Cut = ()


def cut_of(plan: PrunePlan) -> Cut:
    """The cut that a plan makes."""
    return tuple((name, tower.keep) for name, tower in plan.towers.items() if tower.removed)


def smaller(architecture: Architecture, cut: Cut) -> Architecture:
    """The architecture of a cut of a model."""
    return architecture.with_depths({name: len(blocks) for name, blocks in cut})


def rows_of(architecture: Architecture, params: Tree, cut: Cut) -> Tree:
    """The parameters of a cut of a model: rows of the whole one's, also for gradients."""
    return apply_plan(params, PrunePlan.of(architecture.kind, architecture.depths, dict(cut))) if cut else params


def name_of(cut: Cut, groups: Sequence[Sequence[str]]) -> str:
    """How logs call a cut: blocks that stay, with the tower where several are cut on their own.

    >>> name_of((("vlm", (0, 2)), ("action", (0, 2))), [("vlm", "action"), ("vision",)])
    '2'
    >>> name_of((("llm", (0, 2)), ("dit", (0, 1, 4))), [("llm",), ("dit",)])
    'llm2-dit3'
    """
    keep: Mapping[str, tuple[int, ...]] = dict(cut)
    names = [group[0] for group in groups if group[0] in keep]
    return str(len(keep[names[0]])) if len(names) == 1 else "-".join(f"{name}{len(keep[name])}" for name in names)


def names_of(cuts: Sequence[Cut], shape: Architecture | Shape) -> list[str]:
    """What requests call cuts of a model, the whole one among them: the depth of every group that any of them cuts."""
    touched = [group for group in shape.groups if any(group[0] in dict(cut) for cut in cuts)]
    whole = {group[0]: tuple(range(shape.depths[group[0]])) for group in touched}
    kept = [{tower: dict(cut).get(tower, blocks) for tower, blocks in whole.items()} for cut in cuts]
    return [name_of(tuple(blocks.items()), touched) for blocks in kept]
