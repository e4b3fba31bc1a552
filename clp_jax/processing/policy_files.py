"""The processor files of a lerobot policy folder: where the statistics of its normalisation are, and with which values.

A state file is a safetensors file of a few vectors under ``<feature>.<statistic>``.
"""

import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy
import numpy as np
from etils import epath

from clp_jax.errors import InputError, blamed_on
from clp_jax.files import opened, parse_json, read_json_object
from clp_jax.folders import check_inside, is_remote, linked_file
from clp_jax.processing.norm_stats import NormStats, of_lists

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
_FEATURES = {"state": "observation.state", "actions": "action"}
NORMALIZER, UNNORMALIZER = "normalizer_processor", "unnormalizer_processor"
"""The steps with statistics."""
_LIMIT = 2**26
"""Bytes of a file of statistics that are read; more is none."""
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16", "I64": "<i8", "I32": "<i4", "BOOL": "?"}


def read_steps(folder: epath.Path, name: str) -> list[dict[str, Any]]:
    """The steps of a processor file, none where there is no such file.

    Raises:
      InputError: the file is not lerobot's.
    """
    file = folder / name
    if not file.exists():
        return []
    content = read_json_object(file)
    with blamed_on(file, verb="is no processor file of lerobot"):
        return [_step(step) for step in content["steps"]]


def state_files(folder: epath.Path) -> list[str]:
    """Names of the files with the statistics of both processors.

    Raises:
      InputError: a processor file is not lerobot's, or names something that is missing or outside of the folder.
    """
    found = [
        (processor, step["state_file"])
        for processor in (PREPROCESSOR, POSTPROCESSOR)
        for step in read_steps(folder, processor)
        if step.get("registry_name") in (NORMALIZER, UNNORMALIZER) and step.get("state_file")
    ]
    return [name for processor, name in found if _existing(folder, processor, name)]


def tokenizer_name(folder: epath.Path) -> str | None:
    """What the preprocessor calls its tokenizer: a hub id or a folder."""
    found = [step["config"].get("tokenizer_name") for step in read_steps(folder, PREPROCESSOR)]
    return next((name for name in found if name), None)


def norm_stats_of(folder: epath.Path, normaliser: str = NORMALIZER) -> dict[str, NormStats] | None:
    """The statistics that a policy folder carries; None if it has none.

    Args:
      folder: of the policy.
      normaliser: name of the step that has them.

    Raises:
      InputError: the preprocessor names a file that is missing, broken or outside of the folder.
    """
    steps = read_steps(folder, PREPROCESSOR)
    names = [step.get("state_file") for step in steps if step.get("registry_name") == normaliser]
    if not names or names[0] is None:
        return None
    vectors = read_state_file(folder, PREPROCESSOR, names[0])
    with blamed_on(folder / names[0], verb="holds statistics that no data have"):
        found = {name: _stats(vectors, feature) for name, feature in _FEATURES.items()}
    return {name: entry for name, entry in found.items() if entry is not None} or None


def read_state_file(folder: epath.Path, processor: str, name: str) -> dict[str, np.ndarray]:
    """The vectors of a file that a processor file names.

    Raises:
      InputError: it is missing, broken or outside of the folder.
    """
    return read_vectors(_existing(folder, processor, name))


def _existing(folder: epath.Path, processor: str, name: str) -> epath.Path:
    file = folder / _inside(folder, name)
    if not file.exists():
        raise InputError(f"{folder / processor} names {name}, which is not beside it; copy it there.")
    return file


def _inside(folder: epath.Path, name: str) -> str:
    """The name, of a file that neither it nor a link leads out of the folder to."""
    check_inside(name, f"{folder}: state_file")
    if not is_remote(folder) and Path(folder, name).is_symlink():
        linked_file(Path(folder, name), Path(folder).resolve())
    return name


def _step(step: Any) -> dict[str, Any]:
    """A step whose fields that we read are what lerobot writes there.

    Raises:
      TypeError: one is not.
    """
    fields = {"registry_name": str, "state_file": str, "config": dict}
    for key, wanted in fields.items():
        if step.get(key) is not None and not isinstance(step[key], wanted):
            raise TypeError(f"{key} of a step is {step[key]!r}")
    config = step.get("config") or {}
    if not isinstance(config.get("norm_map") or {}, dict) or not isinstance(config.get("tokenizer_name") or "", str):
        raise TypeError("norm_map or tokenizer_name of a step is of a wrong type")
    return {**step, "config": config}


def _stats(vectors: Mapping[str, np.ndarray], feature: str) -> NormStats | None:
    found = {field.name: vectors.get(f"{feature}.{field.name}") for field in dataclasses.fields(NormStats)}
    if found["mean"] is None or found["std"] is None:
        return None
    # Booleans stay what they are, to be refused.
    numbers = {key: x if x is None or x.dtype == np.bool_ else x.astype(np.float64) for key, x in found.items()}
    return of_lists(feature, {key: None if x is None else x.tolist() for key, x in numbers.items()})


def read_vectors(file: epath.Path) -> dict[str, np.ndarray]:
    """All tensors of a small safetensors file, in memory.

    Raises:
      InputError: it is damaged.
    """
    with opened(file) as stream:
        content = stream.read(_LIMIT)
    with blamed_on(file, verb="is no readable safetensors file"):
        (length,) = struct.unpack("<Q", content[:8])
        header, data = parse_json(content[8 : 8 + length], f"the header of {file}"), content[8 + length :]
        header.pop("__metadata__", None)
        return {
            name: np.frombuffer(data[slice(*entry["data_offsets"])], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()
        }


def with_stats(vectors: Mapping[str, np.ndarray], stats: Mapping[str, NormStats]) -> dict[str, np.ndarray]:
    """The vectors of a state file with these statistics of state and actions in place of all that it had of them.

    Statistics that we do not have (number of rows) are left out: they were another data set's.
    """
    old = tuple(f"{feature}." for name, feature in _FEATURES.items() if name in stats)
    kept = {name: vector for name, vector in vectors.items() if not name.startswith(old)}
    for name, entry in stats.items():
        values = {key: value for key, value in vars(entry).items() if value is not None}
        kept |= {f"{_FEATURES[name]}.{key}": np.asarray(value, np.float32) for key, value in values.items()}
    return kept


def to_safetensors(vectors: Mapping[str, np.ndarray]) -> bytes:
    """The content of a safetensors file."""
    codes = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
    header, parts, offset = {}, [], 0
    for name, vector in vectors.items():
        raw = np.ascontiguousarray(vector).tobytes()
        span = [offset, offset + len(raw)]
        header[name] = {"dtype": codes[vector.dtype], "shape": list(vector.shape), "data_offsets": span}
        parts.append(raw)
        offset += len(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(parts)
