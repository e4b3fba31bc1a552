"""Remove blocks: slice the layer axis of a tower's stacked parameters, in memory or from checkpoint to checkpoint.

A tower is a set of leaves whose axis 0 is the layer. Everything else stays the same object, so a plan that removes
nothing changes nothing.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from clp_jax.aliases import Tree
from clp_jax.checkpoint import CheckpointSpec, FolderSpec, RewriteReport, Spec, fingerprint, rewrite
from clp_jax.checkpoint.safetensors.leaves import tensors_from
from clp_jax.errors import InputError
from clp_jax.models import Architecture, Stack, family_of_tree, rows_kept, stack_of
from clp_jax.plan import PrunePlan
from clp_jax.provenance import extend_record
from clp_jax.prune_folder import prune_folder
from clp_jax.trees import flatten, unflatten


class Changes(NamedTuple):
    """What a pruned checkpoint gets besides the rows that stay.

    Attributes:
      architecture: of the pruned model.
      leaves: new values of whole leaves by path, in the dtypes and shapes that the plan leaves.
      record: for ``clp.json``.
    """

    architecture: Architecture
    leaves: Mapping[str, np.ndarray]
    record: Mapping[str, Any]


def depth_of(tree: Tree, tower: str) -> int:
    """Blocks of a tower, read from the leading axes of its leaves.

    Raises:
      InputError: the tree has no such tower, or its leaves disagree.
    """
    stacks = family_of_tree(tree).STACKS
    rows = {path: leaf.shape[0] for path, leaf in flatten(tree).items() if _tower_of(stacks, path) == tower}
    if not rows:
        raise InputError(f"the model has no tower {tower!r}.")
    places = {path: stack_of(stacks, path) for path in rows}
    kinds = {(stack.first, stack.step) for stack in places.values() if stack is not None}
    most = max(stack.blocks(rows[path])[-1] + 1 for path, stack in places.items() if stack is not None and rows[path])
    expected = {first: len(range(first, most, step)) for first, step in kinds}
    odd = [path for path, stack in places.items() if stack is not None and rows[path] != expected[stack.first]]
    if odd:
        shown = ", ".join(f"{path} has {rows[path]}" for path in sorted(odd, key=lambda path: rows[path])[:3])
        raise InputError(f"the leaves of tower {tower!r} disagree about its depth of {most}: {shown}.")
    return most


def kept_rows(stacks: Sequence[Stack], plan: PrunePlan, path: str, rows: int) -> tuple[int, ...] | None:
    """The rows of axis 0 that a leaf keeps under the plan; None for a leaf that stays as it is.

    >>> from clp_jax.models.towers import Stack
    >>> plan = PrunePlan.of("toy", {"dit": 4}, {"dit": [0, 3]})
    >>> kept_rows([Stack("odd/.*", "dit", first=1, step=2)], plan, "odd/kernel", 2)
    (1,)
    """
    stack = stack_of(stacks, path)
    if stack is None or not plan.removed(stack.tower):
        return None
    return rows_kept(stack.blocks(rows), plan.towers[stack.tower].keep)


def _tower_of(stacks: Sequence[Stack], path: str) -> str | None:
    stack = stack_of(stacks, path)
    return None if stack is None else stack.tower


def take_layers(leaf, keep: Sequence[int]):
    """Rows ``keep`` of axis 0, for an array of either library or a ``jax.ShapeDtypeStruct``."""
    if not hasattr(leaf, "__getitem__"):
        return type(leaf)((len(keep), *leaf.shape[1:]), leaf.dtype)
    return leaf[np.asarray(keep)]


def apply_plan(tree: Tree, plan: PrunePlan) -> dict:
    """The pruned parameter tree.

    Args:
      tree: parameters below ``params``, arrays or ``jax.ShapeDtypeStruct``.
      plan: which blocks stay; must fit the tree's depths.

    Returns:
      A new tree; leaves that the plan does not touch are the same objects.

    Raises:
      InputError: the plan was made for other depths.
    """
    plan.check_against({tower: depth_of(tree, tower) for tower in plan.towers})

    stacks = family_of_tree(tree).STACKS

    def pruned(path: str, leaf):
        keep = kept_rows(stacks, plan, path, leaf.shape[0] if leaf.shape else 0)
        return leaf if keep is None else take_layers(leaf, keep)

    return unflatten({path: pruned(path, leaf) for path, leaf in flatten(tree).items()})


def prune_checkpoint(
    spec: Spec,
    plan: PrunePlan,
    out: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    changes: Changes | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> RewriteReport:
    """Write the pruned checkpoint part by part, with ``clp.json`` in it; the model is never held in memory.

    Args:
      spec: the checkpoint to prune, perhaps pruned before: plans are then composed in ``clp.json``.
      plan: which blocks stay, in the numbers of ``spec``.
      out: step folder to create, or a folder of safetensors like the source; complete or not at all.
      config: settings to record.
      calibration: what to record of the data behind the plan.
      changes: leaves that do not come from ``spec`` but are given, from ``healing.heal``.
      overwrite: replace ``out``.
      progress: called with bytes written and bytes in all.

    Raises:
      InputError: the plan does not fit, the checkpoint is damaged or not finite, or ``out`` exists.
    """
    if isinstance(spec, FolderSpec):
        given = {} if changes is None else tensors_from(spec, changes.architecture, changes.leaves)
        healed = None if changes is None else changes.record
        settings = {"config": config, "calibration": calibration, "healed": healed}
        return prune_folder(spec, plan, out, **settings, given=given, overwrite=overwrite, progress=progress)
    plan.check_against({tower: depth_of(spec.tree, tower) for tower in plan.towers})
    record = extend_record(
        spec.plan_record,
        plan,
        source=str(spec.path),
        source_fingerprint=fingerprint(spec),
        config=config or {},
        calibration=calibration,
        healed=None if changes is None else changes.record,
    )
    family = family_of_tree(spec.tree)
    stacks = family.STACKS
    shapes = {path: leaf.shape for path, leaf in flatten(spec.tree).items()}
    return rewrite(
        spec,
        out,
        take=lambda path: kept_rows(stacks, plan, path, shapes[path][0] if shapes[path] else 0),
        given={} if changes is None else changes.leaves,
        record=record.to_json(),
        policy_files=_policy_files(spec, plan),
        overwrite=overwrite,
        progress=progress,
    )


def _policy_files(spec: CheckpointSpec, plan: PrunePlan) -> dict[str, bytes]:
    """What a run keeps of its policy folder, with the depths after the cut."""
    if spec.folder is None:
        return {}
    left = {tower: len(cut.keep) for tower, cut in plan.towers.items()}
    files = family_of_tree(spec.tree).side_files(spec.folder, depths=left)
    return {"config.json": files["config.json"]} if "config.json" in files else {}
