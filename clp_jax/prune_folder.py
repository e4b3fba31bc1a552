"""Remove blocks from a checkpoint that is a folder of safetensors files, by a plan."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from clp_jax.checkpoint.orbax.slicing import RewriteReport
from clp_jax.checkpoint.safetensors.folder import FolderSpec
from clp_jax.checkpoint.safetensors.slicing import slice_folder
from clp_jax.errors import InputError
from clp_jax.plan import PrunePlan
from clp_jax.provenance import extend_record


def prune_folder(
    spec: FolderSpec,
    plan: PrunePlan,
    out: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    healed: Mapping[str, Any] | None = None,
    given: Mapping[str, np.ndarray] | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> RewriteReport:
    """Write the pruned folder tensor by tensor, with ``clp.json`` in it; the model is never held in memory.

    Args:
      spec: the checkpoint to prune, perhaps pruned before: plans are then composed in ``clp.json``.
      plan: which blocks stay, in the numbers of ``spec``.
      out: local folder to create, complete or not at all.
      config: settings to record.
      calibration: what to record of the data behind the plan.
      healed: what to record of the healing.
      given: tensors, by their names in the output, that do not come from ``spec`` but are given.
      overwrite: replace ``out``.
      allow_nonfinite: accept NaN and infinity in the weights.
      progress: called with bytes written and bytes in all.

    Returns:
      Sizes, time and notes for people.

    Raises:
      InputError: the plan does not fit, the checkpoint is damaged or not finite, or ``out`` exists.
    """
    if plan.kind != spec.kind:
        raise InputError(f"the plan is for a {plan.kind} model, {spec.path} is a {spec.kind}; give a plan for its kind")
    plan.check_against(spec.depths)
    record = extend_record(
        spec.plan_record,
        plan,
        source=str(spec.path),
        source_fingerprint=spec.identity,
        config=config or {},
        calibration=calibration,
        healed=healed,
    )
    return slice_folder(
        spec,
        {name: tower.keep for name, tower in plan.towers.items()},
        out,
        given=given,
        record=record.to_json(),
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        progress=progress,
    )
