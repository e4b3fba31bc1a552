"""A policy folder of lerobot 0.6 for π0 and π0.5: its config, its processors, and how to load it."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from clp_jax.errors import InputError
from clp_jax.models.family import Lengths
from clp_jax.models.layers.lerobot import (
    ACTION,
    PREFIX,
    RENAME,
    STATE,
    PolicyFiles,
    Wanted,
    renames,
    robot_keys,
    step,
    what_no_rename_does,
)
from clp_jax.models.pi0.architecture import Architecture
from clp_jax.models.pi0.layout import why_no_torch, zero_tensors
from clp_jax.models.pi0.processing import CAMERAS
from clp_jax.processing import norm_stats
from clp_jax.processing.conventions import Conventions

LOADER = "load_lerobot.py"
"""The program in the folder that loads it and compares its actions."""

INSTALL = "lerobot[pi]==0.6.1"
"""What pip needs for it."""

ONE_DTYPE = True
"""lerobot's config names one dtype for all weights."""

_STATISTICS = ("mean", "std", "q01", "q99")

_CAMERA = "observation.images."
_TOKENIZER = "google/paligemma-3b-pt-224"
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

Cameras are `observation.images.{base_0_rgb,left_wrist_0_rgb,right_wrist_0_rgb}`. The first processor step renames
those of the robot that it was trained with, if that is known; one that is absent is masked. State and action
statistics are those of openpi's model space: transforms that the openpi config applies before them (delta actions,
joint flips and gripper scales) are not part of this folder. lerobot tokenises a π0 prompt as it is, openpi first
turns underscores into spaces. The tokenizer, google/paligemma-3b-pt-224, is fetched from its hub, which asks for
Gemma's licence."""


def why_not(architecture: Architecture, record: Mapping[str, Any] | None) -> str | None:
    """Why lerobot's policies cannot be this model; None where they can."""
    del record
    return why_no_torch(architecture, "lerobot")


def unlike(architecture: Architecture, conventions: Conventions) -> tuple[str, ...]:
    """What the conventions ask for and the exported processors do not do, one sentence each."""
    robot, found = conventions.robot, []
    if robot is not None and any(robot.delta):
        relative = " ".join(str(i) for i, moved in enumerate(robot.delta) if moved)
        found.append(f"The exported processors add no state to actions: add it yourself to dimensions {relative}.")
    if robot is not None and robot.units != "own":
        found.append(f"The exported processors know no units of {robot.units}: convert states and actions yourself.")
    found += [] if robot is None else what_no_rename_does(robot, _CAMERA)
    if architecture.kind == "pi05" and conventions.state_in_prompt is False:
        found.append("lerobot's processors spell the state in the prompt, which this checkpoint was not trained with.")
    return tuple(found)


def unused_tensors(
    architecture: Architecture, leaves: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Tensors of lerobot's file that no parameter stands for, because nothing uses them."""
    return zero_tensors(architecture, leaves)


def policy_files(architecture: Architecture, wanted: Wanted) -> PolicyFiles:
    """The config, the processors and their statistics, which are openpi's norm stats.

    Raises:
      InputError: there are no norm stats, or several to choose from.
    """
    statistics = _norm_stats(wanted)
    sizes = {name: len(statistics[f"{name}.mean"]) for name in (STATE, ACTION)}
    lengths, dtype = wanted.lengths, wanted.dtype or "float32"
    renamed = {} if wanted.robot is None else renames(robot_keys(wanted.robot, _CAMERA))
    processors = processors_of(architecture, lengths, sizes, renamed)
    contents = {"config.json": config_of(architecture, lengths, wanted.num_steps, dtype, sizes)}
    contents |= {f"{name}.json": content for name, content in processors.items()}
    steps = [step for content in processors.values() for step in content["steps"]]
    files = [step["state_file"] for step in steps if "state_file" in step]
    return PolicyFiles(contents, dict.fromkeys(files, statistics), {})


def _norm_stats(wanted: Wanted) -> dict[str, np.ndarray]:
    """openpi's normalisation statistics under lerobot's names: ``observation.state.mean``, ``action.q99``, ..."""
    assets, asset_id = wanted.assets, wanted.asset_id
    found = {} if assets is None else {str(f.parent.relative_to(assets)): f for f in _stats_files(assets)}
    if not found:
        raise InputError(
            f"{wanted.source} has no assets/<asset id>/norm_stats.json, and lerobot's policies normalise: "
            "copy the training run's assets there."
        )
    if asset_id is None and len(found) > 1:
        raise InputError(f"there are norm stats of {', '.join(sorted(found))}; choose with --asset-id.")
    if asset_id is not None and asset_id not in found:
        raise InputError(f"there are no norm stats of {asset_id}, only of {', '.join(sorted(found))}.")
    file = found[asset_id or next(iter(found))]
    content = norm_stats.load(file)
    if "state" not in content:
        raise InputError("the norm stats are of a robot without state, and lerobot's policies need one.")
    statistics = {}
    for ours, theirs in (("state", STATE), ("actions", ACTION)):
        if ours not in content:
            raise InputError(f"{file} has no statistics of {ours}; write one with clp norm-stats.")
        for name in _STATISTICS:
            if (vector := getattr(content[ours], name)) is not None:
                statistics[f"{theirs}.{name}"] = vector.astype(np.float32)
    return statistics


def _stats_files(assets: epath.Path) -> list[epath.Path]:
    children = [child for child in assets.iterdir() if child.is_dir()]
    own = [assets / "norm_stats.json"] if (assets / "norm_stats.json").exists() else []
    return own + [file for child in sorted(children) for file in _stats_files(child)]


def config_of(
    architecture: Architecture, lengths: Lengths, num_steps: int, dtype: str, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """``config.json`` of a lerobot policy; what is not there keeps lerobot's default."""
    a = architecture
    depths = f"depth{a.vlm.depth}_vision{a.vision.depth}"
    return {
        "type": a.kind,
        "input_features": _images(a) | {STATE: {"type": "STATE", "shape": [sizes[STATE]]}},
        "output_features": {ACTION: {"type": "ACTION", "shape": [sizes[ACTION]]}},
        "paligemma_variant": f"gemma_2b_{depths}",
        "action_expert_variant": f"gemma_300m_{depths}",
        "dtype": dtype,
        "chunk_size": lengths.horizon,
        "n_action_steps": lengths.horizon,
        "max_state_dim": a.action_dim,
        "max_action_dim": a.action_dim,
        "num_inference_steps": num_steps,
        "image_resolution": [a.vision.image_size] * 2,
        "tokenizer_max_length": lengths.prompt,
        "normalization_mapping": _modes(a),
        "push_to_hub": False,
    }


def processors_of(
    architecture: Architecture, lengths: Lengths, sizes: Mapping[str, int], renamed: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The two processors around a policy, in lerobot's order of steps for this kind."""
    state = {STATE: {"type": "STATE", "shape": [sizes[STATE]]}}
    action = {ACTION: {"type": "ACTION", "shape": [sizes[ACTION]]}}
    modes = _modes(architecture)
    normalise = {"eps": _EPSILON, "features": _images(architecture) | state | action, "norm_map": modes}
    tokenise = {"max_length": lengths.prompt, "tokenizer_name": _TOKENIZER}
    tokenise |= {"task_key": "task", "padding_side": "right", "padding": "max_length", "truncation": True}
    relative = {"enabled": False, "exclude_joints": [], "action_names": None}
    cpu = {"device": "cpu", "float_dtype": None}
    start = [step(RENAME, rename_map=renamed), step("to_batch_processor")]
    if architecture.kind == "pi0":
        before = [step("pi0_new_line_processor"), step("tokenizer_processor", **tokenise)]
        before += [step("device_processor", **cpu), step("relative_actions_processor", **relative)]
        after = []
    else:
        before = [step("relative_actions_processor", **relative)]
        after = [step("pi05_prepare_state_tokenizer_processor_step"), step("tokenizer_processor", **tokenise)]
        after += [step("device_processor", **cpu)]
    number = len(start) + len(before)
    normaliser = step("normalizer_processor", **normalise)
    normaliser["state_file"] = f"policy_preprocessor_step_{number}_normalizer_processor.safetensors"
    undo = step("unnormalizer_processor", eps=_EPSILON, features=action, norm_map=modes)
    undo["state_file"] = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    outputs = [undo, step("absolute_actions_processor", enabled=False), step("device_processor", **cpu)]
    return {
        "policy_preprocessor": {"name": "policy_preprocessor", "steps": [*start, *before, normaliser, *after]},
        "policy_postprocessor": {"name": "policy_postprocessor", "steps": outputs},
    }


def _images(architecture: Architecture) -> dict[str, dict[str, Any]]:
    """lerobot passes images in this order, so it must be the model's."""
    size = architecture.vision.image_size
    return {_CAMERA + camera: {"type": "VISUAL", "shape": [3, size, size]} for camera in CAMERAS}


def _modes(architecture: Architecture) -> dict[str, str]:
    mode = "QUANTILES" if architecture.kind == "pi05" else "MEAN_STD"
    return {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}


__all__ = [
    "INSTALL",
    "LOAD",
    "LOADER",
    "ONE_DTYPE",
    "PREFIX",
    "config_of",
    "policy_files",
    "processors_of",
    "unlike",
    "unused_tensors",
    "why_not",
]
