"""A folder in NVIDIA's own layout for Isaac-GR00T and lerobot 0.4: weights, config, statistics, and a check of them.

What stands in its files is in the family's ``NVIDIA``.
"""

import dataclasses
import shutil
from pathlib import Path

from etils import epath

from clp_jax.checkpoint import write_beside
from clp_jax.export import tensors, upstream
from clp_jax.export.result import Check, Options
from clp_jax.export.weights import Weights
from clp_jax.models import family_of
from clp_jax.processing.conventions import Conventions


def unlike(weights: Weights, conventions: Conventions) -> tuple[str, ...]:
    """What NVIDIA's code would miss in the statistics, one sentence each."""
    del conventions
    return family_of(weights.architecture).NVIDIA.unlike(weights.spec.folder)


def write(weights: Weights, folder: Path, options: Options) -> None:
    """Writes everything but the comparison into a folder that is being staged."""
    nvidia = family_of(weights.architecture).NVIDIA
    files = nvidia.folder_files(weights.architecture, upstream.wanted_of(weights, options))
    tensors.write_tensors(_tied(weights), folder, shard_bytes=tensors.SHARD_BYTES)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_beside(epath.Path(folder), assets=None, record=weights.spec.plan_record)
    shutil.copyfile(upstream.TEMPLATES / nvidia.LOADER, folder / nvidia.LOADER)


def check(weights: Weights, folder: Path, options: Options) -> Check:
    """Maps the files back to the JAX tree, bit for bit, and runs upstream's model if its code is there."""
    nvidia = family_of(weights.architecture).NVIDIA
    count = tensors.check_tensors(_tied(weights), folder)
    difference, missing = upstream.compare(
        weights,
        folder,
        options,
        target="groot",
        script=nvidia.LOADER,
        modules=("torch", "lerobot"),
        where=f"where lerobot 0.4 is (pip install '{nvidia.INSTALL}')",
    )
    what = "action chunks of lerobot 0.4's GR00TN15 and of the JAX model, float32 on CPU"
    return Check(count, difference, what, missing)


def _tied(weights: Weights) -> Weights:
    return dataclasses.replace(weights, tied=family_of(weights.architecture).NVIDIA.TIED)
