"""What exports for somebody else's code share: a script beside the weights compares with the JAX model's actions."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath

from clp_jax.export import reference
from clp_jax.export.result import Options, check_tolerance, export_record, run_check, write_json
from clp_jax.export.weights import Weights
from clp_jax.models.layers.lerobot import Wanted

TEMPLATES = Path(__file__).resolve().parent / "templates"


def wanted_of(weights: Weights, options: Options) -> Wanted:
    """What a family needs to know to write the files beside the weights."""
    spec = weights.spec
    return Wanted(
        source=epath.Path(weights.source_folder),
        folder=spec.folder,
        assets=spec.assets,
        asset_id=options.asset_id,
        lengths=options.lengths,
        num_steps=options.num_steps,
        robot=None if options.conventions is None else options.conventions.robot,
        dtype=weights.dtype,
    )


def compare(
    weights: Weights, folder: Path, options: Options, *, target: str, script: str, modules: Sequence[str], where: str
) -> tuple[float | None, str | None]:
    """Runs upstream's model on recorded inputs, if it was asked for and its code is there.

    Args:
      weights: that were written.
      folder: of the export.
      options: of the export.
      target: of the export.
      script: in the folder, which compares.
      modules: that it imports.
      where: the script can be run if they are not here, to follow "of the export".

    Returns:
      The largest difference of an action, or what was missing for one.

    Raises:
      InputError: the script failed, or the actions differ by more than they may.
    """
    missing = "not asked for (--check bits)"
    if options.run:
        write_reference(weights, folder, options)
        write_json(folder / "export.json", export_record(weights, target, options, None))
        lacking = [name for name in modules if importlib.util.find_spec(name) is None]
        needs = f"needs {' and '.join(lacking)}, not installed here: run `python {script}` of the export {where}"
        missing = needs if lacking else None
    difference, missing = run_check(folder / script, missing=missing)
    check_tolerance(difference)
    return difference, missing


def write_reference(weights: Weights, folder: Path, options: Options) -> None:
    """Writes ``check.npz``: inputs and the JAX model's actions."""
    inputs = reference.example_inputs(weights.architecture, options.lengths)
    actions = reference.run_model(weights.architecture, weights.read(), inputs, num_steps=options.num_steps)
    np.savez(folder / reference.CHECK_FILE, **inputs, actions=actions)
