"""Files that a user gave, read with suspicion: a pipe is not waited for, a fault is one line that names the file."""

import contextlib
import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from etils import epath

from clp_jax.errors import InputError, blamed_on
from clp_jax.folders import is_remote

AnyPath = str | os.PathLike[str]
FILE_LIMIT = 2**28
"""Bytes of the longest small file: ten times a tokenizer of the largest vocabularies."""
_DEEPEST = 64
_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
"""How JSON escapes a surrogate, which stands for nothing without its other half."""
_AGAIN = "copy or save it again"
_POINTER = b"version https://git-lfs.github.com/spec/"
_LONGEST_POINTER = 1024
"""Bytes; Git LFS writes no longer ones."""


def check_regular(file: AnyPath) -> None:
    """Raises unless a path leads to a regular file: a pipe would be waited for and a device read for ever.

    Args:
      file: local path, symbolic links followed; what is remote is always a file.

    Raises:
      InputError: there is nothing, or a folder, pipe, socket or device; or what Git LFS leaves in the file's place.
    """
    if is_remote(file):
        return
    try:
        found = Path(file).stat()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{os.fspath(file)} cannot be read: {reason}; {_AGAIN}") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(
            f"{os.fspath(file)} is no regular file (a folder, pipe, socket or device); put the file in its place"
        )
    if found.st_size <= _LONGEST_POINTER:
        _check_fetched(file)


def _check_fetched(file: AnyPath) -> None:
    """Raise if a clone without Git LFS left its pointer in place of the content."""
    with blamed_on(file), Path(file).open("rb") as begin:
        if begin.read(len(_POINTER)) == _POINTER:
            raise InputError(
                f"{os.fspath(file)} is a pointer of Git LFS, its content was not fetched; run git lfs pull"
            )


def check_all_regular(folder: AnyPath) -> None:
    """As `check_regular` for everything below a local folder, before a library opens it.

    Raises:
      InputError: names the first thing that is neither a file nor a folder.
    """
    if is_remote(folder):
        return
    for top, _, names in os.walk(folder):
        for name in names:
            check_regular(Path(top, name))


@contextlib.contextmanager
def opened(file: AnyPath) -> Iterator[IO[bytes]]:
    """A regular file, opened to read bytes; what goes wrong in the block is blamed on it.

    Raises:
      InputError: it cannot be read.
    """
    check_regular(file)
    with blamed_on(file), epath.Path(file).open("rb") as stream:
        yield stream


def read_bytes(file: AnyPath, limit: int = FILE_LIMIT) -> bytes:
    """The content of a small file.

    Args:
      file: local path or any address etils understands.
      limit: bytes that are too many.

    Raises:
      InputError: no such file, or it is too long.
    """
    with opened(file) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise InputError(f"{os.fspath(file)} has more than {limit:,} bytes, which is far too long; {_AGAIN}")
    return content


def read_text(file: AnyPath) -> str:
    """The text of a small file in UTF-8.

    Raises:
      InputError: no such file, too long, or no UTF-8.
    """
    try:
        return read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{os.fspath(file)} is no text in UTF-8: {error.reason} at byte {error.start}") from None


def read_json(file: AnyPath, *, finite: bool = False) -> Any:
    """The JSON value in a file.

    Args:
      file: local path or any address etils understands.
      finite: refuse NaN, infinity and numbers beyond float64, which standard JSON lacks and Python writes.

    Raises:
      InputError: the file cannot be read, is no JSON, is nested too deeply, or gives a key twice in one object.
    """
    return parse_json(read_text(file), file, finite=finite)


def read_json_object(file: AnyPath, *, finite: bool = False) -> dict[str, Any]:
    """As `read_json`, of an object.

    Raises:
      InputError: it is no object.
    """
    value = read_json(file, finite=finite)
    if not isinstance(value, dict):
        raise InputError(f"{os.fspath(file)} must hold a JSON object {{...}}, not {_shown(value)}; {_AGAIN}")
    return value


def read_archive(file: AnyPath, limit: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of a ``.npz``; sizes that it only claims are found out before memory is asked for.

    Args:
      file: local path or any address etils understands.
      limit: bytes of all arrays that are too many; the machine's memory if None.

    Raises:
      InputError: it is no such file, is damaged or too large.
    """
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if limit is None else limit
    arrays = {}
    with opened(file) as stream:
        if stream.read(6) == np.lib.format.MAGIC_PREFIX:
            raise ValueError("it holds one bare array and is no .npz")
        with zipfile.ZipFile(stream) as archive:
            claimed = sum(info.file_size for info in archive.infolist())
            if claimed > most:
                raise InputError(f"{os.fspath(file)} unpacks to {claimed:,} bytes, more than {most:,}; {_AGAIN}")
            for info in archive.infolist():
                key = info.filename.removesuffix(".npy")
                if key in arrays:
                    raise ValueError(f"it holds {key!r} twice")
                arrays[key] = _member(archive, info)
    return arrays


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = header(member)
        size, room = math.prod(shape) * dtype.itemsize, info.file_size - member.tell()
        if size != room or min(shape, default=0) < 0:
            raise ValueError(f"{info.filename} says that it is {dtype} of shape {shape}, but has {room} bytes")
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def parse_json(
    text: str | bytes, what: AnyPath, *, finite: bool = False, todo: str = "correct or copy it again"
) -> Any:
    """As `read_json` from text.

    Args:
      text: JSON.
      what: to blame.
      finite: as for `read_json`.
      todo: what the user can do.
    """
    hooks = {"parse_constant": _no_constant, "parse_float": _finite} if finite else {}
    with blamed_on(what, todo, verb="is no valid JSON"):
        value = json.loads(text, object_pairs_hook=_without_repetition, **hooks)
        _check_depth(value)
        if _HALF_A_PAIR.search(text if isinstance(text, str) else text.decode("utf-8", "replace")):
            json.dumps(value, ensure_ascii=False).encode()  # it could be read, but not written
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object; a key given twice is a slip, not a case for "the last one wins"."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number, write null")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), -float("inf")):
        raise ValueError(f"the number {text} is beyond float64")
    return value


def _check_depth(value: Any) -> None:
    """What the parser can nest is more than recursive code can follow."""
    level, depth = [value], 0
    while level:
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        inner = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        level, depth = [item for item in inner if isinstance(item, dict | list)], depth + 1


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 40 else f"{text[:40]}..."
