"""``experiment_cfg/metadata.json``: statistics of the robots that a checkpoint knows, as NVIDIA writes them.

Per embodiment's tag: ``statistics.{state,action}.<part>.{min,max,mean,std,q01,q99}`` and, for the same parts,
``modalities``. A vector is its parts in the file's order.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from clp_jax.errors import InputError, blamed_on
from clp_jax.files import read_json_object
from clp_jax.processing import norm_stats
from clp_jax.processing.norm_stats import NormStats

FILE = "experiment_cfg/metadata.json"
_VECTORS = {"state": "state", "actions": "action"}
_PART = {"absolute": True, "rotation_type": None, "continuous": True}


def read_metadata(folder: epath.Path | None) -> dict[str, Any]:
    """What a checkpoint says of each embodiment, by tag; nothing if it has no such file.

    Raises:
      InputError: the file is broken.
    """
    if folder is None or not (folder / FILE).exists():
        return {}
    content = read_json_object(folder / FILE)
    if not all(isinstance(entry, dict) for entry in content.values()):
        raise InputError(f"{folder / FILE} does not hold one object for each embodiment; restore it.")
    return content


def only_tag(folder: epath.Path | None) -> str | None:
    """The embodiment of a checkpoint that knows one alone, as fine-tuning leaves it; None otherwise."""
    tags = list(read_metadata(folder))
    return tags[0] if len(tags) == 1 else None


def statistics_of(folder: epath.Path | None) -> dict[str, dict[str, NormStats]]:
    """Statistics of state and actions, by tag of the embodiment.

    Raises:
      InputError: the file is broken; the message names tag, part and dimension.
    """
    return {tag: _vectors(entry, f"{folder}/{FILE}, {tag}") for tag, entry in read_metadata(folder).items()}


def with_statistics(metadata: Mapping[str, Any], tag: str, stats: Mapping[str, NormStats]) -> dict[str, Any]:
    """The metadata of a checkpoint that was trained on one robot's data: its entry alone, with new statistics.

    Args:
      metadata: from `read_metadata`.
      tag: of the robot.
      stats: of ``state`` and ``actions``. Where the entry has parts of as many dimensions they keep their names,
        else the vector is one part.
    """
    entry = dict(metadata.get(tag, {}))
    old, modalities = entry.get("statistics", {}), dict(entry.get("modalities", {"video": {}}))
    parts = {theirs: _split(stats[ours], old.get(theirs, {}), theirs) for ours, theirs in _VECTORS.items()}
    for vector, found in parts.items():
        known = modalities.get(vector, {})
        modalities[vector] = {
            name: known.get(name, _PART) | {"shape": [len(values["mean"])]} for name, values in found.items()
        }
    return {tag: entry | {"statistics": parts, "modalities": modalities, "embodiment_tag": tag}}


def _vectors(entry: Mapping[str, Any], where: str) -> dict[str, NormStats]:
    found = {}
    for ours, theirs in _VECTORS.items():
        parts = _object(_object(entry.get("statistics"), f"{where}, statistics").get(theirs), f"{where}, {theirs}")
        kinds = _object(_object(entry.get("modalities", {}), f"{where}, modalities").get(theirs, {}), where)
        for name, kind in kinds.items():
            if isinstance(kind, dict) and kind.get("rotation_type") is not None:
                raise InputError(
                    f"{where}: {theirs}.{name} is a rotation ({kind['rotation_type']}), which upstream converts before "
                    "it normalises and clp_jax does not; compute statistics of the numbers as they are with clp "
                    "norm-stats."
                )
        with blamed_on(where, "restore the file"):
            entries = [norm_stats.of_lists(f"{theirs}.{name}", part) for name, part in parts.items()]
        if not entries:
            raise InputError(f"{where} has no parts of {theirs}; restore the file.")
        columns = {key: [vars(part)[key] for part in entries] for key in vars(entries[0])}
        if any(value is None for value in (*columns["min"], *columns["max"])):
            raise InputError(f"{where}: a part of {theirs} has no min and max, which normalise; restore the file.")
        whole = {
            key: None if any(v is None for v in parts) else np.concatenate(parts) for key, parts in columns.items()
        }
        found[ours] = NormStats(**whole)
    return found


def _split(stats: NormStats, parts: Mapping[str, Any], vector: str) -> dict[str, dict[str, list[float]]]:
    """Statistics of a vector by the names of its parts."""
    widths = {name: len(part["mean"]) for name, part in parts.items()}
    dims = len(stats.mean)
    if sum(widths.values()) != dims:
        widths = {vector: dims}
    ends = np.cumsum(list(widths.values()))
    values = {key: value for key, value in vars(stats).items() if value is not None}
    return {
        name: {key: value[end - width : end].tolist() for key, value in values.items()}
        for (name, width), end in zip(widths.items(), ends, strict=True)
    }


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} is no object; restore the file.")
    return value
