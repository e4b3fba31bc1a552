"""A policy folder for lerobot 0.6: weights, config, processors with their statistics, and the file that loads it.

What differs between families, above all how lerobot learns of another depth, is in each family's ``LEROBOT``.
"""

import importlib.util
import shutil
from pathlib import Path

import jax
import numpy as np
from etils import epath

from clp_jax.checkpoint import write_beside
from clp_jax.checkpoint.safetensors.tensorfile import TensorWriter, read_tensors
from clp_jax.export.pytorch import TEMPLATES, write_reference
from clp_jax.export.result import Check, Options, check_tolerance, export_record, run_check, write_json
from clp_jax.export.tensors import check_tensors, write_tensors
from clp_jax.export.weights import Weights
from clp_jax.models import family_of
from clp_jax.models.layers.lerobot import Wanted


def write(weights: Weights, folder: Path, options: Options) -> None:
    """Writes everything but the comparison into a folder that is being staged."""
    policy, spec = family_of(weights.architecture).LEROBOT, weights.spec
    wanted = Wanted(
        source=epath.Path(weights.source_folder),
        folder=spec.folder,
        assets=spec.assets,
        asset_id=options.asset_id,
        lengths=options.lengths,
        num_steps=options.num_steps,
        dtype=weights.dtype,
    )
    files = policy.policy_files(weights.architecture, wanted)
    unused = policy.unused_tensors(weights.architecture, weights.leaves)
    write_tensors(weights, folder, zeros=unused, prefix=policy.PREFIX)
    for name, content in files.contents.items():
        write_json(folder / name, content)
    for name, statistics in files.tensors.items():
        _write_statistics(folder / name, statistics)
    for name, source in files.copies.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(source.read_bytes())
    write_beside(epath.Path(folder), assets=None, record=spec.plan_record)
    shutil.copyfile(TEMPLATES / policy.LOADER, folder / policy.LOADER)


def check(weights: Weights, folder: Path, options: Options) -> Check:
    """Maps the file back to the JAX tree, bit for bit, and runs lerobot's policy if lerobot is there."""
    policy = family_of(weights.architecture).LEROBOT
    count = check_tensors(weights, folder, prefix=policy.PREFIX)
    missing = None if options.run else "not asked for (--check bits)"
    if options.run:
        write_reference(weights, folder, options)
        write_json(folder / "export.json", export_record(weights, "lerobot", options, None))
        missing = _missing(policy.LOADER, policy.INSTALL)
    difference, missing = run_check(folder / policy.LOADER, missing=missing)
    check_tolerance(difference)
    what = "action chunks of lerobot's policy and of the JAX model, float32 on CPU"
    return Check(count, difference, what, missing)


def _write_statistics(file: Path, statistics: dict[str, np.ndarray]) -> None:
    tensors = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in statistics.items()}
    with TensorWriter(file, tensors, {"format": "pt"}) as writer:
        for name, value in statistics.items():
            writer.write(name, [value])
    written = read_tensors(file)
    assert all(np.array_equal(written[name], value) for name, value in statistics.items())


def _missing(loader: str, install: str) -> str | None:
    """What the comparison needs and this Python lacks."""
    lacking = [name for name in ("torch", "lerobot") if importlib.util.find_spec(name) is None]
    if not lacking:
        return None
    return (
        f"needs {' and '.join(lacking)}, not installed here: run `python {loader}` of the export where lerobot is "
        f"(Python 3.12, pip install '{install}')"
    )
