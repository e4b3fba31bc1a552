"""Whose a folder is: in each of our outputs a manifest says which command wrote it, and what it put there.

Only what a manifest lists is ever deleted, so that ``--overwrite`` with a wrong path costs nobody his work.
"""

import contextlib
import errno
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from clp_jax.errors import InputError
from clp_jax.files import read_json_object
from clp_jax.folders import is_remote

MANIFEST = "clp-manifest.json"

_NOBODYS = (MANIFEST, ".DS_Store", "__pycache__")
"""Names that say nothing about whose a folder is."""


@contextlib.contextmanager
def writable(folder: epath.Path | Path) -> Iterator[None]:
    """Says in one line that an output cannot be begun where its user may not write.

    Args:
      folder: the output, for the message.

    Raises:
      InputError: its permissions, or those of what it lies in, forbid it, or its file system can only be read.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise InputError(f"cannot write {folder}: {error.strerror}; choose another --out") from error


def sign(folder: epath.Path, by: str) -> None:
    """Write into a finished output who wrote it and what it holds.

    Args:
      folder: the output.
      by: what wrote it, such as "clp prune".
    """
    held = sorted(child.name for child in folder.iterdir() if child.name not in _NOBODYS)
    write_manifest(folder, written_by=by, holds=held)


def write_manifest(folder: epath.Path, **keys: Any) -> None:
    """Set keys of a folder's manifest; what else it says stays."""
    (folder / MANIFEST).write_text(json.dumps({**keys, **read_manifest(folder), **keys}, indent=1) + "\n")


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """Content of a folder's manifest; empty without one.

    Raises:
      InputError: it is no JSON object.
    """
    file = folder / MANIFEST
    return read_json_object(file) if file.exists() else {}


def check_own(folder: epath.Path, by: str, *, names: str | None = None) -> None:
    """Raise unless a folder is empty, or what would replace it wrote all that lies in it.

    Args:
      folder: an existing path.
      by: what would replace it, such as "clp prune".
      names: regular expression over the whole names of what it may hold, where that is not written in its manifest.

    Raises:
      InputError: says what it is instead; nothing was deleted.
    """
    if not is_remote(folder) and Path(folder).is_symlink():
        raise InputError(f"{folder} is a link, which is not followed; give the folder that it leads to")
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; only what {by} wrote is replaced: remove it yourself")
    found = sorted(child.name for child in folder.iterdir() if child.name not in _NOBODYS)
    if not found:
        return
    manifest = read_manifest(folder)
    if manifest.get("written_by") != by:
        raise InputError(
            f"{folder} was written by {manifest.get('written_by', 'something else')}, and only what {by} wrote is "
            "replaced; choose another --out, or remove it yourself"
        )
    foreign = [name for name in found if not _is_listed(name, manifest, names)]
    if foreign:
        raise InputError(f"{folder} holds {foreign[0]}, which {by} did not write; move it elsewhere first")


def check_begun(folder: epath.Path, by: str, *, names: str | None = None) -> None:
    """Raise unless what a folder holds was begun by the command that is to go on with it or to replace it.

    Args:
      folder: an existing folder that is not empty.
      by: what would write to it, such as "clp finetune".
      names: as for `check_own`; a folder without a manifest is taken for an output of `by` if it holds only these.

    Raises:
      InputError: says what it is instead.
    """
    writer = read_manifest(folder).get("written_by")
    if writer == by:
        return
    if writer is not None:
        raise InputError(f"{folder} was written by {writer}, not by {by}; choose another --out.")
    found = sorted(child.name for child in folder.iterdir() if child.name not in _NOBODYS)
    foreign = [name for name in found if names is None or not re.fullmatch(names, name)]
    if foreign:
        raise InputError(f"{folder} holds {foreign[0]}, which {by} did not write; choose another --out.")


def _is_listed(name: str, manifest: Mapping[str, Any], names: str | None) -> bool:
    held = manifest.get("holds")
    return re.fullmatch(names, name) is not None if names is not None else isinstance(held, list) and name in held
