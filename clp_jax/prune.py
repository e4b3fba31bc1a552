"""Remove blocks: slice the layer axis of a tower's stacked parameters, in memory or from checkpoint to checkpoint.

A tower is a set of leaves whose axis 0 is the layer. Everything else stays the same object, so a plan that removes
nothing changes nothing.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clp_jax.aliases import Tree
from clp_jax.checkpoint import CheckpointSpec, RewriteReport, fingerprint, rewrite
from clp_jax.errors import InputError
from clp_jax.plan import PrunePlan
from clp_jax.record import extend_record
from clp_jax.trees import flatten, unflatten

TOWER_LEAVES: Mapping[str, str] = {
    "vision": r"PaliGemma/img/Transformer/encoderblock/.*",
    "action": r"PaliGemma/llm/layers/(?:[^/]+/)*[^/]+_1(?:/.*)?",
    "vlm": r"PaliGemma/llm/layers/.*",
}
"""Per tower the full-match pattern of its stacked leaves, in openpi's names; the first match wins.

The second expert's modules end in ``_1``: ``attn/q_einsum_1/w``, ``mlp_1/linear``, ``pre_ffw_norm_1/Dense_0/kernel``.
"""


def tower_of(path: str) -> str | None:
    """The tower whose stack holds this leaf, or None for a leaf without a layer axis.

    >>> tower_of("PaliGemma/llm/layers/attn/q_einsum_1/w"), tower_of("PaliGemma/llm/layers/mlp/linear")
    ('action', 'vlm')
    >>> tower_of("PaliGemma/img/Transformer/encoderblock/LayerNorm_1/scale")
    'vision'
    >>> tower_of("PaliGemma/llm/final_norm_1/scale") is None
    True
    """
    return next((tower for tower, pattern in TOWER_LEAVES.items() if re.fullmatch(pattern, path)), None)


def depth_of(tree: Tree, tower: str) -> int:
    """Blocks of a tower, read from the leading axis of its leaves.

    Raises:
      InputError: the tree has no such tower, or its leaves disagree.
    """
    depths = {path: leaf.shape[0] for path, leaf in flatten(tree).items() if tower_of(path) == tower}
    if not depths:
        raise InputError(f"the model has no tower {tower!r}.")
    if len(set(depths.values())) > 1:
        odd = ", ".join(f"{path} has {depth}" for path, depth in sorted(depths.items(), key=lambda item: item[1])[:3])
        raise InputError(f"the leaves of tower {tower!r} disagree about its depth: {odd}.")
    return next(iter(depths.values()))


def kept_indices(plan: PrunePlan, path: str) -> tuple[int, ...] | None:
    """The rows of axis 0 that a leaf keeps under the plan; None for a leaf that stays as it is."""
    tower = tower_of(path)
    if tower is None or not plan.removed(tower):
        return None
    return plan.towers[tower].keep


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

    def pruned(path: str, leaf):
        keep = kept_indices(plan, path)
        return leaf if keep is None else take_layers(leaf, keep)

    return unflatten({path: pruned(path, leaf) for path, leaf in flatten(tree).items()})


def prune_checkpoint(
    spec: CheckpointSpec,
    plan: PrunePlan,
    out: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> RewriteReport:
    """Write the pruned checkpoint leaf by leaf, with ``clp.json`` beside it; the model is never held in memory.

    Args:
      spec: the checkpoint to prune, perhaps pruned before: plans are then composed in ``clp.json``.
      plan: which blocks stay, in the numbers of ``spec``.
      out: step folder to create, complete or not at all.
      config: settings to record.
      calibration: what to record of the data behind the plan.
      overwrite: replace ``out``.
      progress: called with bytes written and bytes in all.

    Raises:
      InputError: the plan does not fit, the checkpoint is damaged or not finite, or ``out`` exists.
    """
    plan.check_against({tower: depth_of(spec.tree, tower) for tower in plan.towers})
    record = extend_record(
        spec.plan_record,
        plan,
        source=str(spec.path),
        source_fingerprint=fingerprint(spec),
        config=config or {},
        calibration=calibration,
    )
    return rewrite(
        spec,
        out,
        take=lambda path: kept_indices(plan, path),
        record=record.to_json(),
        overwrite=overwrite,
        progress=progress,
    )
