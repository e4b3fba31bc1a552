"""Copy stretches of bytes between safetensors files in a few threads, and look for NaN and infinity on the way."""

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clp_jax.checkpoint.manifest import Listed, check_part, checksum
from clp_jax.checkpoint.orbax.writer import writing
from clp_jax.checkpoint.safetensors.header import StoredTensor, opened_to_read, read_exactly
from clp_jax.errors import InputError

BLOCK_BYTES = 2**19
"""Bytes that one call reads or writes; they stay in the processor's cache between the two, checks included."""

SPAN_BYTES = 2**26
"""Bytes that one thread copies at a stretch, and that have a checksum of their own: an embedding table is shared by
several, a norm's scale by none."""


@dataclass(frozen=True)
class _NonFinite:
    """How to see NaN and infinity in the bits of a float: all bits of `mask` are set, after those of `flip` changed."""

    width: int
    mask: int
    flip: int = 0


_NONFINITE = {
    "F64": _NonFinite(8, 0x7FF0_0000_0000_0000),
    "C64": _NonFinite(4, 0x7F80_0000),
    "F32": _NonFinite(4, 0x7F80_0000),
    "F16": _NonFinite(2, 0x7C00),
    "BF16": _NonFinite(2, 0x7F80),
    "F8_E5M2": _NonFinite(1, 0x7C),
    "F8_E4M3": _NonFinite(1, 0x7F),  # has no infinity; its largest exponent holds numbers too
    "F8_E8M0": _NonFinite(1, 0xFF),
    "F8_E5M2FNUZ": _NonFinite(1, 0xFF, 0x7F),  # the bits of -0 mean NaN
    "F8_E4M3FNUZ": _NonFinite(1, 0xFF, 0x7F),
}


@dataclass(frozen=True)
class _Ends:
    """Two open files."""

    source: int
    source_path: Path
    target: int
    target_path: Path


class Span(NamedTuple):
    """A stretch of one tensor to be copied: from the source, or from ``given``."""

    ends: _Ends
    what: str
    begin: int
    to: int
    size: int
    rule: _NonFinite | None
    number: str
    known: int | None
    crc32: dict[str, int]
    given: memoryview | None = None

    def copy(self) -> Iterator[int]:
        """Copies it and notes its checksum; yields the size of each part as it is written."""
        buffer, crc32 = _buffer(BLOCK_BYTES), 0
        for start in range(0, self.size, BLOCK_BYTES):
            part = buffer[: min(BLOCK_BYTES, self.size - start)]
            if self.given is None:
                read_exactly(self.ends.source, part.data, self.begin + start, self.ends.source_path)
            else:
                part[:] = self.given[start : start + len(part)]
            if self.rule is not None:
                _check_finite(part, self.rule, self.what)
            with writing(self.ends.target_path):
                _write_exactly(self.ends.target, part.data, self.to + start)
            crc32 = checksum(part.data, crc32)
            yield len(part)
        check_part(self.what, self.known, crc32)
        self.crc32[self.number] = crc32


@dataclass(frozen=True)
class FileToWrite:
    """A file to write.

    Attributes:
      name: in the folder.
      source: the file to read.
      source_data: where its tensors begin.
      header: to write.
      tensors: by new name, in the order of the header: what the source has and where it goes.
      sliced: how many of them belong to a shortened tower.
      added: new names of tensors that the source has under another name only, which is the value.
      known: checksums of the stretches of each tensor, where the source's manifest has them.
      given: bytes of the tensors that are not the source's.
      crc32: the same checksums as they were written.
    """

    name: str
    source: Path
    source_data: int
    header: bytes
    tensors: dict[str, tuple[StoredTensor, StoredTensor]]
    sliced: int
    added: dict[str, str]
    known: Mapping[str, Mapping[str, int]]
    given: Mapping[str, memoryview] = field(default_factory=dict)
    crc32: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(new.size for _, new in self.tensors.values())

    def open(self, folder: Path, opened: contextlib.ExitStack, *, check: bool) -> Iterator[Span]:
        """Creates the file in its full size and yields what is to be copied, in the order of its bytes.

        Args:
          folder: to write to.
          opened: closes the files in the end.
          check: refuse NaN and infinity.
        """
        path = folder / self.name
        source = opened.enter_context(opened_to_read(self.source))
        with writing(path):
            target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            opened.callback(os.close, target)
            _write_exactly(target, memoryview(self.header), 0)
            os.truncate(target, len(self.header) + self.data_bytes)
        shared = _Ends(source, self.source, target, path)
        for name, (old, new) in sorted(self.tensors.items(), key=lambda item: item[1][1].begin):
            rule = _NONFINITE.get(old.dtype) if check else None
            sums = self.crc32[name] = {}
            for start in range(0, old.size, SPAN_BYTES):
                size = min(SPAN_BYTES, old.size - start)
                places = (self.source_data + old.begin + start, len(self.header) + new.begin + start)
                number = str(start // SPAN_BYTES)
                known = self.known.get(name, {}).get(number)
                given = self.given[name][start : start + size] if name in self.given else None
                yield Span(shared, f"{name} in {self.source}", *places, size, rule, number, known, sums, given)

    def listed(self) -> dict[str, Listed]:
        """What the manifest is to say of the tensors, once all are copied."""
        return {
            name: Listed(new.shape, new.dtype, dict(sorted(self.crc32[name].items())))
            for name, (_, new) in self.tensors.items()
        }


_of_thread = threading.local()


def _buffer(size: int) -> np.ndarray:
    """Memory that belongs to this thread, so that a thousand small tensors do not ask for it a thousand times."""
    if getattr(_of_thread, "buffer", None) is None:
        _of_thread.buffer = np.empty(size, np.uint8)
    return _of_thread.buffer


def _check_finite(part: np.ndarray, rule: _NonFinite, what: str) -> None:
    """Raises an `InputError` that names the tensor if any value is NaN or infinite."""
    unsigned = np.dtype(f"u{rule.width}")
    mask, flip = unsigned.type(rule.mask), unsigned.type(rule.flip)
    bits = part.view(unsigned)
    if ((bits ^ flip if rule.flip else bits) & mask).max() == mask:
        raise InputError(f"{what} holds NaN or infinity, the run that saved it has diverged; take an earlier step")


def _write_exactly(descriptor: int, data: memoryview, position: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], position + done)
