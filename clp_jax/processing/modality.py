"""``meta/modality.json``, in which GR00T's data sets name the parts of their vectors, as the fields of a `Robot`."""

from collections.abc import Collection, Mapping
from typing import Any

from clp_jax.editable_json import json_object, typed
from clp_jax.errors import InputError
from clp_jax.processing.columns import Part

_COLUMNS = {"state": "observation.state", "action": "action"}
"""Where the parts lie that do not say it."""


def robot_fields(value: Mapping[str, Any], cameras: Collection[str] | None) -> dict[str, Any]:
    """Images, state, actions and task, in the file's order.

    Args:
      value: content of the file.
      cameras: those of the model; a video of another name is left out. None keeps all.

    Raises:
      InputError: a part is incomplete or of a rotation type, which would have to be converted, or several annotations
        could be the task.
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
    parts, known = [], ["start", "end", "original_key", "rotation_type", "absolute", "dtype", "range"]
    for key, entry in _entries(value, name, known).items():
        where = f"{name}.{key}"
        if entry.get("rotation_type") is not None:
            raise InputError(
                f"{where} is of rotation type {entry['rotation_type']!r}, which is not converted; write a robot file "
                "that takes the numbers as they are."
            )
        start, end = (typed(entry.get(edge), int, f"{where}.{edge}") for edge in ("start", "end"))
        if not 0 <= start < end:
            raise InputError(f"{where} goes from {start} to {end}, which chooses nothing.")
        column = typed(entry.get("original_key") or _COLUMNS[name], str, f"{where}.original_key")
        parts.append(str(Part(column, start, end)))
    return tuple(parts)


def _task(annotations: Mapping[str, Mapping[str, Any]]) -> str:
    """The column with each row's task number: that of the annotation called task_description, or the only one."""
    chosen = [name for name in annotations if name.endswith("task_description")] or list(annotations)
    if len(chosen) > 1:
        raise InputError(f"annotations {', '.join(chosen)} could each be the task; leave one in the file.")
    return next((annotations[name].get("original_key") or f"annotation.{name}" for name in chosen), "task_index")
