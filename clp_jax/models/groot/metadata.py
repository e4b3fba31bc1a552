"""``experiment_cfg/metadata.json``: statistics of the robots that a checkpoint knows, as NVIDIA writes them.

Per embodiment's tag: ``statistics.{state,action}.<part>.{min,max,mean,std,q01,q99}`` and, for the same parts,
``modalities``. A vector is its parts in the file's order.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from etils import epath

from clp_jax.errors import InputError, blamed_on
from clp_jax.files import read_json_object
from clp_jax.processing import norm_stats
from clp_jax.processing.columns import part
from clp_jax.processing.modality import with_source
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.robots import Robot

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


def has_nameless_parts(entry: Mapping[str, Any]) -> bool:
    """Whether an entry has a whole vector as one part, as `with_statistics` writes where a robot names none."""
    statistics = entry.get("statistics")
    return isinstance(statistics, Mapping) and any(
        list(statistics.get(name) or ()) == [name] for name in _VECTORS.values()
    )


def statistics_of(folder: epath.Path | None) -> dict[str, dict[str, NormStats]]:
    """Statistics of state and actions, all parts in the file's order, by tag of the embodiment.

    Raises:
      InputError: the file is broken; the message names tag, part and dimension.
    """
    return {tag: _vectors(entry, f"{folder}/{FILE}, {tag}") for tag, entry in read_metadata(folder).items()}


def statistics_for(folder: epath.Path, tag: str, robot: Robot | None) -> dict[str, NormStats] | None:
    """Statistics of one embodiment: of the parts that the robot names, else of all in the file's order.

    Args:
      folder: of the checkpoint.
      tag: of the embodiment.
      robot: whose parts may have names, see `part_names`.

    Returns:
      The statistics of ``state`` and ``actions``; None if the checkpoint does not know the embodiment.

    Raises:
      InputError: as `statistics_of`; or a part is missing, or is a rotation and the robot does not say what of it.
    """
    entry, where = read_metadata(folder).get(tag), f"{folder}/{FILE}, {tag}"
    if entry is None:
        return None
    names = None if robot is None else part_names(robot)
    if names is None:
        for vector in _VECTORS.values():
            for name, kind in _modalities(entry, vector, where).items():
                if kind.get("rotation_type") is not None:
                    raise InputError(
                        f"{where}: {vector}.{name} is a rotation ({kind['rotation_type']}): choose what becomes of it "
                        "by the name of Isaac-GR00T's configuration with --data-config, or compute statistics of the "
                        "numbers as they are with clp norm-stats."
                    )
    return _vectors(entry, where, names)


def part_names(robot: Robot) -> dict[str, tuple[str, ...]] | None:
    """What NVIDIA's files call the robot's parts of state and actions; None for a robot with other names."""
    texts = {"state": robot.state, "actions": robot.actions}
    names = {vector: [robot.client.get(text, text) for text in parts] for vector, parts in texts.items()}
    found = {
        vector: tuple(name.removeprefix(f"{_VECTORS[vector]}.") for name in parts) for vector, parts in names.items()
    }
    foreign = any(name == short for vector in names for name, short in zip(names[vector], found[vector], strict=True))
    return None if foreign else found


def known_robot(robot: Robot, entry: Mapping[str, Any], where: str) -> Robot:
    """A robot that names parts, with the widths and rotations that an entry of the file says they have.

    Raises:
      InputError: the entry lacks a part.
    """
    widths, modes = {}, {}
    for vector, texts, wanted in (
        ("state", robot.state, robot.state_modes),
        ("action", robot.actions, robot.action_modes),
    ):
        kinds = _modalities(entry, vector, where)
        for text in texts:
            if (name := text.partition(".")[2]) not in kinds:
                raise InputError(f"{where} has no {text}, which robot {robot.name!r} names; it has {', '.join(kinds)}.")
            with blamed_on(where, "restore the file"):
                widths[text] = int(kinds[name]["shape"][0])
        modes[vector] = tuple(
            with_source(mode, kinds[text.partition(".")[2]].get("rotation_type"), f"{where}: {text}")
            for mode, text in zip(wanted, texts, strict=True)
        )
    return dataclasses.replace(robot, widths=widths, state_modes=modes["state"], action_modes=modes["action"])


def with_statistics(
    metadata: Mapping[str, Any],
    tag: str,
    stats: Mapping[str, NormStats],
    robot: Robot | None = None,
    videos: Mapping[str, tuple[int, int, float]] = MappingProxyType({}),
) -> dict[str, Any]:
    """The metadata of a checkpoint that was trained on one robot's data: its entry alone, with new statistics.

    Args:
      metadata: from `read_metadata`.
      tag: of the robot.
      stats: of ``state`` and ``actions``. Where the robot names its parts they have these names; else, where the entry
        has parts of as many dimensions, they keep theirs, or the vector is one part.
      robot: whose statistics these are.
      videos: per camera of the robot height and width of its pictures, and how many there are in a second. Where it
        names its parts, they take the place of those that were there.
    """
    entry = dict(metadata.get(tag, {}))
    old, modalities = entry.get("statistics", {}), dict(entry.get("modalities", {"video": {}}))
    own = {} if robot is None else _own_parts(robot)
    if robot is not None and own and videos:
        modalities["video"] = {
            robot.client.get(robot.images[camera], camera).removeprefix("video."): {
                "resolution": [width, height],
                "channels": 3,
                "fps": fps,
            }
            for camera, (height, width, fps) in videos.items()
        }
    statistics = {}
    for ours, theirs in _VECTORS.items():
        known = own.get(ours) or {
            name: modalities.get(theirs, {}).get(name, _PART) | {"shape": [len(part["mean"])]}
            for name, part in old.get(theirs, {}).items()
        }
        dims = len(stats[ours].mean)
        if sum(kind["shape"][0] for kind in known.values()) != dims:
            known = {theirs: _PART | {"shape": [dims]}}
        modalities[theirs] = known
        statistics[theirs] = _split(stats[ours], {name: kind["shape"][0] for name, kind in known.items()})
    return {tag: entry | {"statistics": statistics, "modalities": modalities, "embodiment_tag": tag}}


def _own_parts(robot: Robot) -> dict[str, dict[str, dict[str, Any]]]:
    """What NVIDIA's files would say of the robot's parts, by their names; nothing where it has none."""
    names, found = part_names(robot), {}
    for vector, texts, modes in (
        ("state", robot.state, robot.state_modes),
        ("actions", robot.actions, robot.action_modes),
    ):
        for name, text, mode in zip(() if names is None else names[vector], texts, modes, strict=False):
            rotation = mode.partition(">")[0] if ">" in mode else None
            width = part(text).width_in(robot.widths)
            found.setdefault(vector, {})[name] = _PART | {"rotation_type": rotation, "shape": [width]}
    return found


def _vectors(
    entry: Mapping[str, Any], where: str, names: Mapping[str, Sequence[str]] | None = None
) -> dict[str, NormStats]:
    found = {}
    for ours, theirs in _VECTORS.items():
        parts = _object(_object(entry.get("statistics"), f"{where}, statistics").get(theirs), f"{where}, {theirs}")
        if names is not None:
            missing = [name for name in names[ours] if name not in parts]
            if missing:
                raise InputError(f"{where} has no {theirs}.{missing[0]}; it has {', '.join(parts)}.")
            parts = {name: parts[name] for name in names[ours]}
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


def _modalities(entry: Mapping[str, Any], vector: str, where: str) -> Mapping[str, Any]:
    """What the entry says of the parts of a vector beside their statistics."""
    kinds = _object(_object(entry.get("modalities", {}), f"{where}, modalities").get(vector, {}), where)
    return {name: _object(kind, f"{where}, {vector}.{name}") for name, kind in kinds.items()}


def _split(stats: NormStats, widths: Mapping[str, int]) -> dict[str, dict[str, list[float]]]:
    """Statistics of a vector by the names of its parts."""
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
