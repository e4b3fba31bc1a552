"""A folder in NVIDIA's own layout for Isaac-GR00T and lerobot 0.4: weights, config, statistics, and a check of them.

What stands in its files is in the family's ``NVIDIA``.
"""

import dataclasses
import importlib.util
import shutil
from pathlib import Path

from etils import epath

from clp_jax.checkpoint import write_beside
from clp_jax.export import tensors
from clp_jax.export.pytorch import TEMPLATES, write_reference
from clp_jax.export.result import Check, Options, check_tolerance, export_record, run_check, write_json
from clp_jax.export.weights import Weights
from clp_jax.models import family_of
from clp_jax.models.layers.lerobot import Wanted


def write(weights: Weights, folder: Path, options: Options) -> None:
    """Writes everything but the comparison into a folder that is being staged."""
    upstream, spec = family_of(weights.architecture).NVIDIA, weights.spec
    wanted = Wanted(
        source=epath.Path(weights.source_folder),
        folder=spec.folder,
        assets=spec.assets,
        asset_id=options.asset_id,
        lengths=options.lengths,
        num_steps=options.num_steps,
        dtype=weights.dtype,
    )
    files = upstream.folder_files(weights.architecture, wanted)
    tensors.write_tensors(_tied(weights), folder, shard_bytes=tensors.SHARD_BYTES)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_beside(epath.Path(folder), assets=None, record=spec.plan_record)
    shutil.copyfile(TEMPLATES / upstream.LOADER, folder / upstream.LOADER)


def check(weights: Weights, folder: Path, options: Options) -> Check:
    """Maps the files back to the JAX tree, bit for bit, and runs upstream's model if its code is there."""
    upstream = family_of(weights.architecture).NVIDIA
    count = tensors.check_tensors(_tied(weights), folder)
    missing = None if options.run else "not asked for (--check bits)"
    if options.run:
        write_reference(weights, folder, options)
        write_json(folder / "export.json", export_record(weights, "groot", options, None))
        missing = _missing(upstream.LOADER, upstream.INSTALL)
    difference, missing = run_check(folder / upstream.LOADER, missing=missing)
    check_tolerance(difference)
    what = "action chunks of lerobot 0.4's GR00TN15 and of the JAX model, float32 on CPU"
    return Check(count, difference, what, missing)


def _tied(weights: Weights) -> Weights:
    return dataclasses.replace(weights, tied=family_of(weights.architecture).NVIDIA.TIED)


def _missing(loader: str, install: str) -> str | None:
    """What the comparison needs and this Python lacks."""
    lacking = [name for name in ("torch", "lerobot") if importlib.util.find_spec(name) is None]
    if not lacking:
        return None
    return (
        f"needs {' and '.join(lacking)}, not installed here: run `python {loader}` of the export where lerobot 0.4 is "
        f"(pip install '{install}')"
    )
