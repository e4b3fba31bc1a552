"""A policy folder for lerobot 0.6: weights, config, processors with their statistics, and the file that loads it.

What differs between families, above all how lerobot learns of another depth, is in each family's ``LEROBOT``.
"""

import shutil
from pathlib import Path

import jax
import numpy as np
from etils import epath

from clp_jax.checkpoint import write_beside
from clp_jax.checkpoint.safetensors.tensorfile import TensorWriter, read_tensors
from clp_jax.export import upstream
from clp_jax.export.result import Check, Options, write_json
from clp_jax.export.tensors import check_tensors, write_tensors
from clp_jax.export.weights import Weights
from clp_jax.models import family_of
from clp_jax.processing.conventions import Conventions


def unlike(weights: Weights, conventions: Conventions) -> tuple[str, ...]:
    """What lerobot does otherwise than the conventions ask, one sentence each."""
    return family_of(weights.architecture).LEROBOT.unlike(weights.architecture, conventions)


def write(weights: Weights, folder: Path, options: Options) -> None:
    """Writes everything but the comparison into a folder that is being staged."""
    policy = family_of(weights.architecture).LEROBOT
    files = policy.policy_files(weights.architecture, upstream.wanted_of(weights, options))
    unused = policy.unused_tensors(weights.architecture, weights.leaves)
    write_tensors(weights, folder, zeros=unused, prefix=policy.PREFIX)
    for name, content in files.contents.items():
        write_json(folder / name, content)
    for name, statistics in files.tensors.items():
        _write_statistics(folder / name, statistics)
    for name, source in files.copies.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(source.read_bytes())
    write_beside(epath.Path(folder), assets=None, record=weights.spec.plan_record)
    shutil.copyfile(upstream.TEMPLATES / policy.LOADER, folder / policy.LOADER)


def check(weights: Weights, folder: Path, options: Options) -> Check:
    """Maps the file back to the JAX tree, bit for bit, and runs lerobot's policy if lerobot is there."""
    policy = family_of(weights.architecture).LEROBOT
    count = check_tensors(weights, folder, prefix=policy.PREFIX)
    difference, missing = upstream.compare(
        weights,
        folder,
        options,
        target="lerobot",
        script=policy.LOADER,
        modules=("torch", "lerobot"),
        where=f"where lerobot is (Python 3.12, pip install '{policy.INSTALL}')",
    )
    what = "action chunks of lerobot's policy and of the JAX model, float32 on CPU"
    return Check(count, difference, what, missing)


def _write_statistics(file: Path, statistics: dict[str, np.ndarray]) -> None:
    tensors = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in statistics.items()}
    with TensorWriter(file, tensors, {"format": "pt"}) as writer:
        for name, value in statistics.items():
            writer.write(name, [value])
    written = read_tensors(file)
    assert all(np.array_equal(written[name], value) for name, value in statistics.items())
