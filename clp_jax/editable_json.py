"""JSON files that people edit: pleasant to write by hand, strict to read.

Reading finds the slips of an editor: a misspelt key, a wrong type, and (`files.read_json`) a key given twice. Keys
that begin with "_" are comments. Standard JSON only, so NaN is written as null by whoever has one.
"""

import difflib
import json
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from clp_jax.errors import InputError
from clp_jax.machine import full_disk_named


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes ``format_json(value)``; the file appears complete or not at all."""
    target = epath.Path(path)
    partial = target.with_name(target.name + ".partial")
    with full_disk_named(target):
        partial.write_text(format_json(value) + "\n", encoding="utf-8")
        partial.replace(target)


def format_json(value: Any, indent: int = 0) -> str:
    """Returns JSON text for people: objects over several lines, a list without objects in it on one line.

    >>> print(format_json({"depth": 4, "keep": [0, 3]}))
    {
      "depth": 4,
      "keep": [0, 3]
    }
    """
    inner = " " * (indent + 2)
    if isinstance(value, dict) and value:
        parts = [f"{inner}{json.dumps(str(key))}: {format_json(item, indent + 2)}" for key, item in value.items()]
        return "{\n" + ",\n".join(parts) + "\n" + " " * indent + "}"
    if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(inner + format_json(item, indent + 2) for item in value) + "\n" + " " * indent + "]"
    return json.dumps(value, allow_nan=False)


def json_object(value: Any, where: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the JSON object without its comments.

    Args:
      value: a value from a JSON file.
      where: its name in messages.
      required: keys that must be there.
      optional: further keys that may be there.

    Raises:
      InputError: no object, a required key is missing, or a key is unknown.

    >>> json_object({"depth": 4, "_why": "a comment"}, "tower 'vlm'", ["depth"])
    {'depth': 4}
    """
    value = {key: item for key, item in typed(value, dict, where).items() if not key.startswith("_")}
    known = [*required, *optional]
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise InputError(f"{where}: unknown key {key!r}; {hint} (comments begin with '_')")
    for key in required:
        if key not in value:
            raise InputError(f"{where}: the key {key!r} is missing")
    return value


_NAMES = {dict: "an object {...}", list: "a list [...]", int: "a whole number", str: "text"}


def typed(value: Any, wanted: type, where: str) -> Any:
    """Returns the value if it is of the wanted JSON type (dict, list, int or str), else raises an `InputError`."""
    # A bool is an int to Python, but nobody counts in true and false.
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise InputError(f"{where} must be {_NAMES[wanted]}, not {json.dumps(value, default=repr)}")
    return value
