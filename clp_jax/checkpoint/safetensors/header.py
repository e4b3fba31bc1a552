"""The header of a safetensors file, read with suspicion: nothing of it is believed before it fits the file.

The format: eight bytes with the length of the header, a JSON header with dtype, shape and place of every tensor, then
their bytes without gaps. Bytes are only ever copied here, so a dtype that nobody knows is carried like any other.
"""

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clp_jax.errors import InputError, blamed_on
from clp_jax.files import check_regular, parse_json

HEADER_LIMIT = 100_000_000
"""Longest header that the format's own library reads."""

_LENGTH_BYTES = 8
_AGAIN = "copy or download it again"
_BITS = {
    **dict.fromkeys(["C64", "F64", "I64", "U64"], 64),
    **dict.fromkeys(["F32", "I32", "U32"], 32),
    **dict.fromkeys(["F16", "BF16", "I16", "U16"], 16),
    **dict.fromkeys(["BOOL", "I8", "U8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"], 8),
    **dict.fromkeys(["F6_E2M3", "F6_E3M2"], 6),
    "F4": 4,
}
"""Bits of an element, by the format's names of dtypes."""


class Stamp(NamedTuple):
    """What tells that a file is still the one that was there: device, inode, size and time of its last change."""

    device: int
    inode: int
    size: int
    changed: int


class StoredTensor(NamedTuple):
    """A tensor of a file.

    Attributes:
      dtype: the format's name of it, e.g. "BF16".
      shape: of the tensor.
      file: name of the file that holds it.
      begin: its first byte, counted from the end of the header.
      end: the byte after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Attributes:
      path: where it lies, symbolic links followed.
      data: position of the first byte after the header.
      metadata: strings of the header's ``__metadata__``; None if it has none.
      tensors: by name, in the order of the header.
      stamp: of the file as it was read.
    """

    path: Path
    data: int
    metadata: dict[str, str] | None
    tensors: dict[str, StoredTensor]
    stamp: Stamp


def stamp_of(path: Path) -> Stamp:
    """The stamp of a regular file.

    Raises:
      InputError: there is none, or it is a folder, a pipe or a device.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is no regular file (a folder, pipe or device); replace it by the file or remove it")
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def read_shard(path: Path, name: str) -> Shard:
    """Reads the header of one file; no tensor is read.

    Args:
      path: where the file lies.
      name: what it is called in its folder.

    Raises:
      InputError: the file is damaged, with what is wrong and where.
    """
    check_regular(path)
    stamp = stamp_of(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            room = stamp.size - _LENGTH_BYTES
            if room < 0 or length > room or length > HEADER_LIMIT:
                raise InputError(
                    f"{path} says that its header has {length} bytes, but the file has {stamp.size}: it is truncated "
                    f"or no safetensors file; {_AGAIN}"
                )
            text = file.read(length)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from error
    with blamed_on(f"the header of {path}", _AGAIN, verb="is damaged"):
        header = parse_json(text, f"the header of {path}")
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
        metadata = _metadata(header.pop("__metadata__", None))
        tensors = {key: _tensor(key, entry, name) for key, entry in header.items()}
        _check_places(tensors, room - length)
    return Shard(path, _LENGTH_BYTES + length, metadata, tensors, stamp)


def header_of(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str] | None) -> bytes:
    """The header of a file with its length before it, padded so that tensors begin at a multiple of eight bytes.

    Args:
      tensors: in the order in which the header is to list them.
      metadata: strings of ``__metadata__``; None leaves it out.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    for name, tensor in tensors.items():
        place = [tensor.begin, tensor.end]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


@contextlib.contextmanager
def opened_to_read(path: Path) -> Iterator[int]:
    """Opens a file for `read_exactly`; yields its descriptor.

    Raises:
      InputError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, buffer: memoryview, position: int, path: Path) -> None:
    """Fills a buffer from a position of an open file.

    Raises:
      InputError: the file ends early or cannot be read.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], position + done)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from error
        if count == 0:
            raise InputError(f"{path} became shorter while it was read; let what writes it finish, then try again")
        done += count


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("its __metadata__ is no object of strings")
    return value


def _tensor(name: str, entry: Any, file: str) -> StoredTensor:
    """Checks and returns one entry of a header."""
    name.encode()  # half a surrogate pair could be read, but not written again
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not dtype:
        raise ValueError(f"the dtype of {name!r} is {dtype!r}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{what} of {name!r} is no list of whole numbers from 0")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets of {name!r} are {offsets}, not a beginning and an end")
    size, bits = offsets[1] - offsets[0], _BITS.get(dtype)
    if bits is not None and math.prod(shape) * bits != 8 * size:
        raise ValueError(
            f"{name!r} is {dtype} of shape {shape}, which does not take the {size} bytes between its offsets"
        )
    return StoredTensor(dtype, tuple(shape), file, *offsets)


def _check_places(tensors: Mapping[str, StoredTensor], room: int) -> None:
    """Tensors must follow each other without overlap or gap, from the header to the end of the file."""
    position, before = 0, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            what = "overlaps with" if tensor.begin < position else "leaves a gap after"
            raise ValueError(f"{name!r} begins at byte {tensor.begin} and {what} {before!r}, which ends at {position}")
        position, before = tensor.end, name
    if position != room:
        what = "the file is truncated" if position > room else "the file goes on after them"
        raise ValueError(f"its tensors take {position} bytes after it, but there are {room}: {what}")
