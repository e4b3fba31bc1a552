"""A policy folder for lerobot 0.6: weights, config, processors with their statistics, and the file that loads it.

lerobot's config cannot say a depth, and its loader turns weights of another depth into a half-random policy without an
error. So the depth is part of the variant's name, which lerobot alone refuses, and ``load_lerobot.py`` in the folder
makes lerobot understand it and compares every weight after loading.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from clp_jax.checkpoint import write_beside
from clp_jax.errors import InputError
from clp_jax.export.pytorch import TEMPLATES, WEIGHTS_FILE, check_tensors, write_reference, write_tensors
from clp_jax.export.result import Check, Options, check_tolerance, run_check, write_json
from clp_jax.checkpoint.tensorfile import TensorWriter, read_tensors
from clp_jax.export.weights import Weights
from clp_jax.models import CAMERAS, Architecture

LOADER = "load_lerobot.py"
_PREFIX = "model."
_TOKENIZER = "google/paligemma-3b-pt-224"
_STATISTICS = ("mean", "std", "q01", "q99")
_STATE, _ACTION = "observation.state", "action"
_EPSILON = 1e-6
"""openpi's; lerobot's default is 1e-8."""

LOAD = """Where lerobot 0.6.1 is installed (Python 3.12, `pip install 'lerobot[pi]==0.6.1'`), from this folder:

```python
from load_lerobot import load_policy
from lerobot.policies.factory import make_pre_post_processors

policy = load_policy(device="cuda")
preprocess, postprocess = make_pre_post_processors(policy.config, pretrained_path="THIS_FOLDER")
```

```console
$ python load_lerobot.py    # compares with the JAX model's actions in check.npz
$ python load_lerobot.py -m lerobot.scripts.lerobot_eval --policy.path=THIS_FOLDER ...    # any program of lerobot
```

lerobot alone refuses the folder (`Invalid paligemma_variant`): its π0 has one depth, and weights of another would
silently become a half-random policy. `load_lerobot.py` teaches it the depth and compares every weight after loading.
It also gives the sampling times and their embedding JAX's roundings to float32: lerobot's float64 moves a π0.5's
actions by up to 2e-4.

Cameras are `observation.images.{base_0_rgb,left_wrist_0_rgb,right_wrist_0_rgb}` (rename yours in the first processor
step); one that is absent is masked. State and action statistics are those of openpi's model space: transforms that the
openpi config applies before them (delta actions, joint flips, gripper scales) are not part of this folder. lerobot
tokenises a π0 prompt as it is, openpi first turns underscores into spaces. The tokenizer, google/paligemma-3b-pt-224,
is fetched from its hub, which asks for Gemma's licence."""


def write(weights: Weights, folder: Path, options: Options) -> None:
    """Writes everything but the comparison into a folder that is being staged."""
    statistics = norm_stats(weights, options.asset_id)
    write_tensors(weights, folder / WEIGHTS_FILE, prefix=_PREFIX)
    sizes = {name: len(statistics[f"{name}.mean"]) for name in (_STATE, _ACTION)}
    write_json(folder / "config.json", config_of(weights, options, sizes))
    for processor, content in processors_of(weights.architecture, options, sizes).items():
        write_json(folder / f"{processor}.json", content)
        for step in content["steps"]:
            if "state_file" in step:
                _write_statistics(folder / step["state_file"], statistics)
    write_beside(epath.Path(folder), assets=None, record=weights.spec.plan_record)
    shutil.copyfile(TEMPLATES / LOADER, folder / LOADER)


def check(weights: Weights, folder: Path, options: Options) -> Check:
    """Maps the file back to the JAX tree, bit for bit, and runs lerobot's policy if lerobot is there."""
    count = check_tensors(weights, folder / WEIGHTS_FILE, prefix=_PREFIX)
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
    for ours, theirs in (("state", _STATE), ("actions", _ACTION)):
        for name in _STATISTICS:
            if content[ours].get(name) is not None:
                statistics[f"{theirs}.{name}"] = np.asarray(content[ours][name], np.float32)
    return statistics


def config_of(weights: Weights, options: Options, sizes: dict[str, int]) -> dict[str, Any]:
    """``config.json`` of a lerobot policy; what is not there keeps lerobot's default."""
    a = weights.architecture
    depths = f"depth{a.vlm.depth}_vision{a.vision.depth}"
    return {
        "type": a.kind,
        "input_features": _images(a) | {_STATE: {"type": "STATE", "shape": [sizes[_STATE]]}},
        "output_features": {_ACTION: {"type": "ACTION", "shape": [sizes[_ACTION]]}},
        "paligemma_variant": f"gemma_2b_{depths}",
        "action_expert_variant": f"gemma_300m_{depths}",
        "dtype": weights.dtype or "float32",
        "chunk_size": options.horizon,
        "n_action_steps": options.horizon,
        "max_state_dim": a.action_dim,
        "max_action_dim": a.action_dim,
        "num_inference_steps": options.num_steps,
        "image_resolution": [a.vision.image_size] * 2,
        "tokenizer_max_length": options.prompt_length,
        "normalization_mapping": _modes(a),
        "push_to_hub": False,
    }


def processors_of(architecture: Architecture, options: Options, sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    """The two processors around a policy, in lerobot's order of steps for this kind."""
    state = {_STATE: {"type": "STATE", "shape": [sizes[_STATE]]}}
    action = {_ACTION: {"type": "ACTION", "shape": [sizes[_ACTION]]}}
    modes = _modes(architecture)
    normalise = {"eps": _EPSILON, "features": _images(architecture) | state | action, "norm_map": modes}
    tokenise = {"max_length": options.prompt_length, "tokenizer_name": _TOKENIZER}
    tokenise |= {"task_key": "task", "padding_side": "right", "padding": "max_length", "truncation": True}
    relative = {"enabled": False, "exclude_joints": [], "action_names": None}
    cpu = {"device": "cpu", "float_dtype": None}
    start = [_step("rename_observations_processor", rename_map={}), _step("to_batch_processor")]
    if architecture.kind == "pi0":
        before = [_step("pi0_new_line_processor"), _step("tokenizer_processor", **tokenise)]
        before += [_step("device_processor", **cpu), _step("relative_actions_processor", **relative)]
        after = []
    else:
        before = [_step("relative_actions_processor", **relative)]
        after = [_step("pi05_prepare_state_tokenizer_processor_step"), _step("tokenizer_processor", **tokenise)]
        after += [_step("device_processor", **cpu)]
    number = len(start) + len(before)
    normaliser = _step("normalizer_processor", **normalise)
    normaliser["state_file"] = f"policy_preprocessor_step_{number}_normalizer_processor.safetensors"
    undo = _step("unnormalizer_processor", eps=_EPSILON, features=action, norm_map=modes)
    undo["state_file"] = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    outputs = [undo, _step("absolute_actions_processor", enabled=False), _step("device_processor", **cpu)]
    return {
        "policy_preprocessor": {"name": "policy_preprocessor", "steps": [*start, *before, normaliser, *after]},
        "policy_postprocessor": {"name": "policy_postprocessor", "steps": outputs},
    }


def _step(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}


def _images(architecture: Architecture) -> dict[str, dict[str, Any]]:
    """lerobot passes images in this order, so it must be the model's."""
    size = architecture.vision.image_size
    return {f"observation.images.{camera}": {"type": "VISUAL", "shape": [3, size, size]} for camera in CAMERAS}


def _modes(architecture: Architecture) -> dict[str, str]:
    mode = "QUANTILES" if architecture.kind == "pi05" else "MEAN_STD"
    return {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}


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
