"""``meta/modality.json``, in which GR00T's data sets name the parts of their vectors, as the fields of a `Robot`."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from clp_jax.editable_json import json_object, typed
from clp_jax.errors import InputError
from clp_jax.processing.columns import Part

_COLUMNS = {"state": "observation.state", "action": "action"}
"""Where the parts lie that do not say it."""
_KNOWN = ["start", "end", "original_key", "rotation_type", "absolute", "dtype", "range"]


def names_parts(images: Mapping[str, str], columns: Sequence[str]) -> bool:
    """Whether a robot's keys are names in such a file (``video.top``, ``state.arm``), and no columns of a data set."""
    return all(key.startswith("video.") for key in images.values()) and all(
        key.partition(".")[0] in _COLUMNS and "." in key for key in columns
    )


def columns_of(
    value: Any,
    *,
    images: Mapping[str, str],
    state: Sequence[str],
    actions: Sequence[str],
    task: str,
    state_modes: Sequence[str],
    action_modes: Sequence[str],
) -> dict[str, Any]:
    """The fields of a robot with columns in place of the names of parts, and with these names as what clients send.

    Args:
      value: content of the file.
      images: per camera a ``video.<name>``.
      state: ``state.<name>`` of each part.
      actions: ``action.<name>`` of each part.
      task: the annotation with the number of each row's task.
      state_modes: of the parts; of a rotation that is converted perhaps without what it is converted from.
      action_modes: likewise.

    Raises:
      InputError: a name is not in the file, or a part that is converted has no rotation type.
    """
    value = json_object(value, "modality.json", ["state", "action", "video"], ["annotation"])
    videos = _entries(value, "video", ["original_key"])
    pictures = {camera: _named(videos, key).get("original_key") or key[6:] for camera, key in images.items()}
    annotations = _entries(value, "annotation", ["original_key"])
    found = {"state": _entries(value, "state", _KNOWN), "action": _entries(value, "action", _KNOWN)}
    parts, modes = {}, {}
    for name, texts, wanted in (("state", state, state_modes), ("action", actions, action_modes)):
        entries = [_named(found[name], text) for text in texts]
        parts[name] = tuple(_part(name, text, entry) for text, entry in zip(texts, entries, strict=True))
        modes[name] = tuple(
            with_source(mode, entry.get("rotation_type"), text)
            for mode, entry, text in zip(wanted, entries, texts, strict=True)
        )
    sent = dict(zip(parts["action"], actions, strict=True)) | dict(zip(parts["state"], state, strict=True))
    return {
        "images": pictures,
        "state": parts["state"],
        "actions": parts["action"],
        "state_modes": modes["state"],
        "action_modes": modes["action"],
        "task": _named(annotations, task).get("original_key") or task,
        "client": sent | {pictures[camera]: key for camera, key in images.items()},
    }


def with_source(mode: str, rotation: Any, where: str) -> str:
    """The mode of a part whose rotation is now known; none is left where it already is what it is converted to.

    Raises:
      InputError: the mode converts a rotation, and nothing says which.

    >>> with_source(">rotation_6d", "quaternion", "arm"), with_source(">axis_angle min_max", "axis_angle", "arm")
    ('quaternion>rotation_6d', 'min_max')
    """
    if not mode.startswith(">"):
        return mode
    target, _, scaling = mode[1:].partition(" ")
    if not isinstance(rotation, str):
        raise InputError(f"{where} has no rotation_type, and is to become {target}; write it into the file.")
    return scaling if rotation == target else f"{rotation}{mode}"


def _named(entries: Mapping[str, Any], text: str) -> Any:
    """The entry that ``state.arm`` names."""
    name = text.partition(".")[2]
    if name not in entries:
        raise InputError(f"there is no {text}; the file has {', '.join(entries) or 'none'}.")
    return entries[name]


def robot_fields(value: Mapping[str, Any], cameras: Collection[str] | None) -> dict[str, Any]:
    """Images, state, actions and task, in the file's order.

    Args:
      value: content of the file.
      cameras: those of the model; a video of another name is left out. None keeps all.

    Raises:
      InputError: a part is incomplete or of a rotation type, or several annotations could be the task.
    """
    value = json_object(value, "modality.json", ["state", "action", "video"], ["annotation"])
    videos = _entries(value, "video", ["original_key"])
    images = {name: entry.get("original_key") or name for name, entry in videos.items()}
    return {
        "images": {name: key for name, key in images.items() if cameras is None or name in cameras},
        "state": _parts(value, "state"),
        "actions": _parts(value, "action"),
        "task": _task(_entries(value, "annotation", ["original_key"])),
    }


def _entries(value: Mapping[str, Any], name: str, known: list[str]) -> dict[str, dict[str, Any]]:
    entries = typed(value.get(name) or {}, dict, name)
    return {key: json_object(entry, f"{name}.{key}", [], known) for key, entry in entries.items()}


def _parts(value: Mapping[str, Any], name: str) -> tuple[str, ...]:
    parts = []
    for key, entry in _entries(value, name, _KNOWN).items():
        where = f"{name}.{key}"
        if entry.get("rotation_type") is not None:
            raise InputError(
                f"{where} is of rotation type {entry['rotation_type']!r}: choose what becomes of it by the name of "
                "Isaac-GR00T's configuration with --data-config, or in a robot file with state_modes and action_modes."
            )
        parts.append(_part(name, where, entry))
    return tuple(parts)


def _part(name: str, where: str, entry: Mapping[str, Any]) -> str:
    start, end = (typed(entry.get(edge), int, f"{where}.{edge}") for edge in ("start", "end"))
    if not 0 <= start < end:
        raise InputError(f"{where} goes from {start} to {end}, which chooses nothing.")
    column = typed(entry.get("original_key") or _COLUMNS[name], str, f"{where}.original_key")
    return str(Part(column, start, end))


def _task(annotations: Mapping[str, Mapping[str, Any]]) -> str:
    """The column with each row's task number: that of the annotation called task_description, or the only one."""
    chosen = [name for name in annotations if name.endswith("task_description")] or list(annotations)
    if len(chosen) > 1:
        raise InputError(f"annotations {', '.join(chosen)} could each be the task; leave one in the file.")
    return next((annotations[name].get("original_key") or f"annotation.{name}" for name in chosen), "task_index")
