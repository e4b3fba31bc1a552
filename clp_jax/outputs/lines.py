"""Files that grow by a line of JSON at a time, of which a crash costs the line that was being written and no other."""

import json
import os
from pathlib import Path
from typing import Any

from clp_jax.files import read_bytes


def append_line(file: Path, value: Any) -> None:
    """Write a JSON value as a line at the end; on return it is on the disk."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(value) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def whole_lines(file: Path) -> list[bytes]:
    """The lines of a file, none of one that is not there; a last line that was cut off is taken away from it.

    Raises:
      InputError: it cannot be read.
    """
    if not file.exists():
        return []
    content = read_bytes(file)
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):  # killed while it was written
        os.truncate(file, len(whole))
    return whole.splitlines()
