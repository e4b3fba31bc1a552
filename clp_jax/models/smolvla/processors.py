"""The processors of a lerobot policy folder: what they say must be what is done here, or it is refused.

lerobot trains by ``config.json`` and acts by ``policy_preprocessor.json`` and ``policy_postprocessor.json``; here the
first says everything. A folder without processors is one from before lerobot had them.

Source: lerobot 0.6.1, ``policies/smolvla/processor_smolvla.py`` and ``processor/``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from clp_jax.errors import InputError
from clp_jax.models.layers.lerobot import ACTION, OBSERVATION, RENAME, STATE, renames
from clp_jax.models.layers.lerobot import step as make_step
from clp_jax.processing import policy_files
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.policy_files import NORMALIZER, POSTPROCESSOR, PREPROCESSOR, UNNORMALIZER

_TOKENIZER, _NEW_LINE = "tokenizer_processor", "smolvla_new_line_processor"
_NORMALISES = {"eps": 1e-8, "normalize_observation_keys": None}
_KNOWN: dict[str, dict[str, dict[str, Any]]] = {
    PREPROCESSOR: {
        RENAME: {},
        "to_batch_processor": {},
        _NEW_LINE: {},
        _TOKENIZER: {"padding_side": "right", "truncation": True, "task_key": "task"},
        "device_processor": {"float_dtype": None},
        NORMALIZER: _NORMALISES,
    },
    POSTPROCESSOR: {UNNORMALIZER: _NORMALISES, "device_processor": {"float_dtype": None}},
}
"""Steps of each file, and the values of their settings that are what is done here."""

_NEEDED = {PREPROCESSOR: (_NEW_LINE, _TOKENIZER, NORMALIZER), POSTPROCESSOR: (UNNORMALIZER,)}
"""Steps that must be there once."""


def check_processors(folder: epath.Path, dims: Mapping[str, int], norms: Mapping[str, str], prompt: int) -> None:
    """Raise where a processor of a policy folder does what is not done here.

    Args:
      folder: of the policy.
      dims: true dimensions of "STATE" and "ACTION".
      norms: how ``config.json`` normalises each kind of feature.
      prompt: longest prompt in tokens by ``config.json``.

    Raises:
      InputError: names the file, the step and what it says.
    """
    found = {name: policy_files.read_steps(folder, name) for name in _KNOWN if (folder / name).exists()}
    if not found:
        return
    if missing := [name for name in _KNOWN if name not in found]:
        raise InputError(f"{folder} has no {missing[0]}, which lerobot saves with {', '.join(found)}; copy it there.")
    for name, steps in found.items():
        _check_steps(folder / name, steps, _KNOWN[name], _NEEDED[name])
    (tokenizer,) = [step for step in found[PREPROCESSOR] if step.get("registry_name") == _TOKENIZER]
    if (length := tokenizer["config"].get("max_length", prompt)) != prompt:
        raise InputError(
            f"{folder / PREPROCESSOR} cuts prompts at {length} tokens, tokenizer_max_length of config.json is "
            f"{prompt}; correct the file that is wrong."
        )
    _check_norms(folder, found, norms)
    _check_statistics(folder, found, dims, norms)
    robot_keys(folder)


def robot_keys(folder: epath.Path) -> dict[str, str]:
    """The robot's key of each of the model's inputs that the preprocessor renames.

    Raises:
      InputError: two keys get one name, or the map is none.
    """
    found: dict[str, str] = {}
    for step in policy_files.read_steps(folder, PREPROCESSOR):
        if step.get("registry_name") != RENAME:
            continue
        renamed = step["config"].get("rename_map") or {}
        if not isinstance(renamed, dict) or not all(isinstance(value, str) for value in renamed.values()):
            raise InputError(f"{folder / PREPROCESSOR}: rename_map of {RENAME} is {renamed!r}; map keys to names.")
        for key, name in renamed.items():
            if not key.startswith(OBSERVATION):  # which lerobot does not see there
                continue
            if name in found:
                raise InputError(f"{folder / PREPROCESSOR} renames both {found[name]} and {key} to {name}; remove one.")
            found[name] = key
    return found


def with_robot_keys(processor: dict[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """The content of a preprocessor that takes these keys of the robot for the model's inputs, by the inputs' names.

    What it renames to something else stays.
    """
    old = [step["config"].get("rename_map") or {} for step in processor["steps"] if step.get("registry_name") == RENAME]
    kept = {key: name for renamed in old for key, name in renamed.items() if name not in keys}
    others = [step for step in processor["steps"] if step.get("registry_name") != RENAME]
    return processor | {"steps": [make_step(RENAME, rename_map=kept | renames(keys)), *others]}


def check_statistics_are_named(processor: dict[str, Any], what: str) -> None:
    """Raise where a step of a processor that normalises names no statistics: lerobot leaves its numbers as they are."""
    for step in processor["steps"]:
        if step.get("registry_name") not in (NORMALIZER, UNNORMALIZER) or step.get("state_file"):
            continue
        if any(kind != "IDENTITY" for kind in (step["config"].get("norm_map") or {}).values()):
            raise InputError(
                f"{what} names no statistics, though the run had some, for an earlier version saved the step; go on "
                "with it for a step more (clp finetune --resume), whose files name them."
            )


def with_statistics(
    processor: dict[str, Any], read: Mapping[str, Mapping[str, np.ndarray]], stats: Mapping[str, NormStats]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A processor's content and its files of statistics with these in them, also where it named no file.

    lerobot leaves numbers of which it has no statistics as they are, without a word.

    Args:
      processor: content of the JSON file.
      read: vectors of the files that it names.
      stats: of ``state`` and ``actions``.
    """
    steps, files = [], {}
    for number, step in enumerate(processor["steps"]):
        if (kind := step.get("registry_name")) not in (NORMALIZER, UNNORMALIZER):
            steps.append(step)
            continue
        name = step.get("state_file") or f"{processor.get('name', 'policy')}_step_{number}_{kind}.safetensors"
        steps.append(step | {"state_file": name})
        files[name] = policy_files.to_safetensors(policy_files.with_stats(read.get(name, {}), stats))
    return processor | {"steps": steps}, files


def _check_steps(
    file: epath.Path, steps: Sequence[Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]], needed: Sequence[str]
) -> None:
    """Raise on a step that is not known, set otherwise, missing, or there twice."""
    names = [step.get("registry_name") or step.get("class") for step in steps]
    for name, step in zip(names, steps, strict=True):
        if name not in known:
            raise InputError(
                f"{file} has a step {name!r}, which clp_jax does not do; a SmolVLA's has {_listed(known)}."
            )
        for key, value in known[name].items():
            if (said := step["config"].get(key, value)) != value:
                raise InputError(f"{file}: {key} of {name} is {said!r}; only {value!r} is implemented.")
    for name in needed:
        if (count := names.count(name)) != 1:
            raise InputError(f"{file} has {count or 'no'} steps {name}, where a SmolVLA's has one; correct it.")


def _check_norms(
    folder: epath.Path, found: Mapping[str, Sequence[Mapping[str, Any]]], norms: Mapping[str, str]
) -> None:
    """Raise unless the processors normalise as the configuration says."""
    for name, step, kind in ((PREPROCESSOR, NORMALIZER, "STATE"), (POSTPROCESSOR, UNNORMALIZER, "ACTION")):
        maps = [one["config"].get("norm_map") or {} for one in found[name] if one.get("registry_name") == step]
        said, needed = (each.get(kind, "IDENTITY") for each in (*maps, norms))
        if said != needed:
            raise InputError(
                f"{folder / name} normalises {kind} with {said}, normalization_mapping of config.json with {needed}; "
                "correct the file that is wrong."
            )


def _check_statistics(
    folder: epath.Path,
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    dims: Mapping[str, int],
    norms: Mapping[str, str],
) -> None:
    """Raise unless both processors have the same statistics of actions, or neither has, and all fit the model."""
    files = {
        name: next(step.get("state_file") for step in found[name] if step.get("registry_name") == kind)
        for name, kind in ((PREPROCESSOR, NORMALIZER), (POSTPROCESSOR, UNNORMALIZER))
    }
    if any(file is not None and not (folder / file).exists() for file in files.values()):
        return  # said where they are needed
    places = {}
    for name, file in files.items():
        places[name] = {} if file is None else policy_files.read_state_file(folder, name, file)
        for feature, of in ((STATE, "STATE"), (ACTION, "ACTION")):
            for key in ("mean", "std"):
                shape = np.shape(places[name].get(f"{feature}.{key}", np.zeros(dims[of])))
                if shape != (dims[of],):
                    raise InputError(
                        f"{folder / str(file)}: {feature}.{key} has shape {list(shape)}, config.json says "
                        f"{dims[of]} dimensions; correct the file that is wrong."
                    )
    if norms.get("ACTION", "IDENTITY") == "IDENTITY":
        return
    for key in (f"{ACTION}.mean", f"{ACTION}.std"):
        before, after = (places[name].get(key) for name in (PREPROCESSOR, POSTPROCESSOR))
        if before is None and after is None:
            continue
        if before is None or after is None or not np.array_equal(before, after):
            raise InputError(
                f"{folder}: the statistics of {PREPROCESSOR} and {POSTPROCESSOR} have not the same {key}, so the "
                "policy would give other actions than it was trained on; copy the file that is right over the other."
            )


def _listed(names: Mapping[str, Any]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}"
