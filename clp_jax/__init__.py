"""CKA-guided layer pruning of openpi-style JAX checkpoints of π0, π0.5 and π0-FAST.

The steps are plain functions; see the README for the ten lines that join them.
"""

from typing import TYPE_CHECKING

from clp_jax.lazy import importer
from clp_jax.version import __version__

if TYPE_CHECKING:
    from clp_jax.analysis import Analysis, EvidenceOptions, analyse, loss_of
    from clp_jax.checkpoint import read_params, read_spec, rewrite, write_params
    from clp_jax.data import CalibrationData, load_npz
    from clp_jax.errors import InputError
    from clp_jax.loading import LoadedModel, load_model
    from clp_jax.models import Gates
    from clp_jax.plan import PrunePlan, TowerPlan
    from clp_jax.planning import Depth, choose, plan_of_blocks
    from clp_jax.prune import apply_plan, prune_checkpoint
    from clp_jax.sampling import sample
    from clp_jax.selection import select
    from clp_jax.sensitivity import plan_gates
    from clp_jax.similarity import Sampling

_HOME = {
    "Analysis": "analysis",
    "EvidenceOptions": "analysis",
    "analyse": "analysis",
    "loss_of": "analysis",
    "read_params": "checkpoint",
    "read_spec": "checkpoint",
    "rewrite": "checkpoint",
    "write_params": "checkpoint",
    "CalibrationData": "data",
    "load_npz": "data",
    "InputError": "errors",
    "LoadedModel": "loading",
    "load_model": "loading",
    "Gates": "models",
    "PrunePlan": "plan",
    "TowerPlan": "plan",
    "apply_plan": "prune",
    "prune_checkpoint": "prune",
    "Depth": "planning",
    "choose": "planning",
    "plan_of_blocks": "planning",
    "sample": "sampling",
    "select": "selection",
    "plan_gates": "sensitivity",
    "Sampling": "similarity",
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604 - names of the table above

__getattr__ = importer(__name__, _HOME)
