"""A policy folder for lerobot 0.6: weights, config, processors with their statistics, and the file that loads it.

lerobot's config cannot say a depth, and its loader turns weights of another depth into a half-random policy without an
error. So the depth is part of the variant's name, which lerobot alone refuses, and ``load_lerobot.py`` in the folder
makes lerobot understand it and compares every weight after loading.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
from etils import epath

from clp_jax.checkpoint import write_beside
from clp_jax.checkpoint.safetensors.tensorfile import TensorWriter, read_tensors
from clp_jax.errors import InputError
from clp_jax.export.pytorch import TEMPLATES, WEIGHTS_FILE, check_tensors, write_reference, write_tensors
from clp_jax.export.result import Check, Options, check_tolerance, run_check, write_json
from clp_jax.export.weights import Weights
from clp_jax.models import family_of
from clp_jax.models.layers.lerobot import ACTION, PREFIX, STATE

LOADER = "load_lerobot.py"
_STATISTICS = ("mean", "std", "q01", "q99")


def write(weights: Weights, folder: Path, options: Options) -> None:
    """Writes everything but the comparison into a folder that is being staged."""
    statistics = norm_stats(weights, options.asset_id)
    write_tensors(weights, folder / WEIGHTS_FILE, prefix=PREFIX)
    sizes = {name: len(statistics[f"{name}.mean"]) for name in (STATE, ACTION)}
    policy, architecture = family_of(weights.architecture).LEROBOT, weights.architecture
    config = policy.config_of(architecture, options.lengths, options.num_steps, weights.dtype or "float32", sizes)
    write_json(folder / "config.json", config)
    for processor, content in policy.processors_of(architecture, options.lengths, sizes).items():
        write_json(folder / f"{processor}.json", content)
        for step in content["steps"]:
            if "state_file" in step:
                _write_statistics(folder / step["state_file"], statistics)
    write_beside(epath.Path(folder), assets=None, record=weights.spec.plan_record)
    shutil.copyfile(TEMPLATES / LOADER, folder / LOADER)


def check(weights: Weights, folder: Path, options: Options) -> Check:
    """Maps the file back to the JAX tree, bit for bit, and runs lerobot's policy if lerobot is there."""
    count = check_tensors(weights, folder / WEIGHTS_FILE, prefix=PREFIX)
    missing = None if options.run else "not asked for (--check bits)"
    if options.run:
        write_reference(weights, folder, options)
        missing = _missing()
    difference, missing = run_check(folder / LOADER, missing=missing)
    check_tolerance(difference)
    what = "action chunks of lerobot's policy and of the JAX model, float32 on CPU"
    return Check(count, difference, what, missing)


def norm_stats(weights: Weights, asset_id: str | None) -> dict[str, np.ndarray]:
    """openpi's normalisation statistics under lerobot's names: ``observation.state.mean``, ``action.q99``, ...

    Args:
      weights: whose checkpoint has them.
      asset_id: folder below ``assets``; None where there is one.

    Raises:
      InputError: there are none, or several to choose from.
    """
    assets = weights.spec.assets
    found = {} if assets is None else {str(f.parent.relative_to(assets)): f for f in _stats_files(assets)}
    if not found:
        raise InputError(
            f"{weights.spec.path.parent} has no assets/<asset id>/norm_stats.json, and lerobot's policies normalise: "
            "copy the training run's assets there."
        )
    if asset_id is None and len(found) > 1:
        raise InputError(f"there are norm stats of {', '.join(sorted(found))}; choose with --asset-id.")
    if asset_id is not None and asset_id not in found:
        raise InputError(f"there are no norm stats of {asset_id}, only of {', '.join(sorted(found))}.")
    content = json.loads(found[asset_id or next(iter(found))].read_text())["norm_stats"]
    statistics = {}
    for ours, theirs in (("state", STATE), ("actions", ACTION)):
        for name in _STATISTICS:
            if content[ours].get(name) is not None:
                statistics[f"{theirs}.{name}"] = np.asarray(content[ours][name], np.float32)
    return statistics


def _stats_files(assets: epath.Path) -> list[epath.Path]:
    children = [child for child in assets.iterdir() if child.is_dir()]
    own = [assets / "norm_stats.json"] if (assets / "norm_stats.json").exists() else []
    return own + [file for child in sorted(children) for file in _stats_files(child)]


def _write_statistics(file: Path, statistics: dict[str, np.ndarray]) -> None:
    tensors = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in statistics.items()}
    with TensorWriter(file, tensors, {"format": "pt"}) as writer:
        for name, value in statistics.items():
            writer.write(name, [value])
    written = read_tensors(file)
    assert all(np.array_equal(written[name], value) for name, value in statistics.items())


def _missing() -> str | None:
    """What the comparison needs and this Python lacks."""
    lacking = [name for name in ("torch", "lerobot") if importlib.util.find_spec(name) is None]
    if not lacking:
        return None
    return (
        f"needs {' and '.join(lacking)}, not installed here: run `python {LOADER}` of the export where lerobot is "
        "(Python 3.12, pip install 'lerobot[pi]==0.6.1')"
    )
