"""``--depths``: nested cuts of one checkpoint that a fine-tuning trains in turn, and what must be true of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from clp_jax.checkpoint import Spec
from clp_jax.commands.measuring import analysis_of, numbers
from clp_jax.cuts import cut_of, name_of, names_of
from clp_jax.errors import InputError
from clp_jax.models import Architecture, Shape
from clp_jax.plan import PrunePlan
from clp_jax.planning import Depth, check_depth, check_plan, choose_nested, groups_of, per_group

_CRITERION = "jumps"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthsFlags:
    """One training for several depths."""

    depths: tuple[str, ...] = ()
    """Depths to train in turn, a step each, beside the whole model: blocks that stay, e.g. 12 9, or where towers are
    cut on their own llm=8,dit=12 llm=6,dit=8. clp prune then cuts any of them out of a saved step. Needs --analysis."""
    analysis: str | None = None
    """Folder of clp analyse on this checkpoint, by which --depths chooses blocks: every cut lies in the next larger."""


def open_cuts(config: Any, spec: Spec, architecture: Architecture) -> list[PrunePlan]:
    """The cuts of ``--depths``, from the deepest to the smallest, without the whole model; none without the flag.

    Args:
      config: the command's flags.
      spec: the checkpoint that is trained.
      architecture: of the model that is trained.

    Raises:
      InputError: only one of the flags, a teacher beside them, depths that are not nested, or another checkpoint's
        analysis.
    """
    if bool(config.depths) != (config.analysis is not None):
        raise InputError("--depths and --analysis go together: give both, or neither.")
    if not config.depths:
        return []
    if config.teacher is not None:
        raise InputError("--depths and --teacher cannot be had together; leave one out.")
    depths = depths_of(config.depths)
    for depth in depths:
        per_group(depth.keep_layers, groups_of(architecture)[0], "depths")  # the flag that messages are to name
        check_depth(depth, _CRITERION, architecture)
    plans = choose_nested(analysis_of(config.analysis, spec), _CRITERION, depths)
    smaller = [plan for plan in plans if not plan.is_identity]
    if not smaller:
        raise InputError(f"--depths {' '.join(config.depths)} is the whole model alone; name a smaller depth, too.")
    return smaller


def depths_of(words: Sequence[str]) -> list[Depth]:
    """The words of ``--depths``.

    Raises:
      InputError: one cannot be read.
    """
    return [Depth(keep_layers=numbers((word,), int, "--depths", "12 9, or llm=8,dit=12")) for word in words]


def trained_cut(
    known: Sequence[PrunePlan], depth: Depth, shape: Architecture | Shape, *, flag: str, otherwise: str
) -> PrunePlan:
    """The cut of a depth among those that a run trained.

    Args:
      known: of `cuts_of`.
      depth: that is asked for; a group of towers that it does not name stays whole.
      shape: of the trained model.
      flag: that the depth comes from, for messages: "keep_layers" or "depths".
      otherwise: what else can be done where it was not trained.

    Raises:
      InputError: no cut of this depth was trained, or it names no tower, or a cut does not fit the model.
    """
    for plan in known:
        check_plan(plan, shape)
    groups, optional = groups_of(shape)
    asked = per_group(depth.keep_layers, groups, flag)
    if depth.keep_optional is not None:
        asked |= dict.fromkeys(optional, depth.keep_optional)
    whole = {group: shape.depths[group[0]] for group in shape.groups}
    for plan in known:
        if {group: depth - len(plan.removed(group[0])) for group, depth in whole.items()} == whole | asked:
            return plan
    trained = " and ".join(names_of([cut_of(plan) for plan in known], shape))
    raise InputError(
        f"the run of this checkpoint trained no cut of this depth, only {trained}: take one of these, or {otherwise}."
    )


def describe(plan: PrunePlan, architecture: Architecture) -> str:
    """A cut's name in the logs, and the blocks that stay."""
    cut = dict(cut_of(plan))
    kept = [
        f"{'+'.join(group)} {' '.join(map(str, cut[group[0]]))}" for group in architecture.groups if group[0] in cut
    ]
    return f"Trained in turn, at {name_of(cut_of(plan), architecture.groups)} blocks: {'; '.join(kept)}"
