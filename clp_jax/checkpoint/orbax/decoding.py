"""Decode a chunk as a stream.

Orbax writes a leaf as few big zarr chunks (up to 2 GiB), and readers of arrays decode a whole chunk to get at one layer
of it. Here a chunk is decompressed in blocks that stay in the processor's cache, so memory stays at a few of them.
"""

import contextlib
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import zstandard

from clp_jax.checkpoint.manifest import Summed, check_part
from clp_jax.checkpoint.orbax.chunks import Span, StoredArray, chunk_name
from clp_jax.errors import InputError

BLOCK_BYTES = 2**18
"""Bytes handled at a time, on the way in as on the way out."""

_FRAME_HEAD = 18
"""Bytes of the longest head of a zstd frame, which says whether a check sum ends it."""


class ChunkStream:
    """The decoded bytes of one chunk, in C order, read once from front to end.

    Args:
      array: the array.
      index: the chunk's index in the grid.
      copy_to: file that gets the encoded bytes as they are read.
    """

    def __init__(self, array: StoredArray, index: tuple[int, ...], *, copy_to: Summed | None = None):
        self._what = f"chunk {index} of {array.name}"
        self._crc32 = array.crc32.get(chunk_name(index))
        self._place, self._compressed = array.place(index), array.compressed
        self._summed = Summed() if copy_to is None and self._crc32 is not None else copy_to
        self._source = _Source(self._place, self._summed)
        self._stream: Any = self._source
        if array.compressed:
            decoder = zstandard.ZstdDecompressor()
            self._stream = decoder.stream_reader(self._stream, BLOCK_BYTES, read_across_frames=True, closefd=True)
        self._position = 0
        self._size = math.prod(array.chunk) * array.dtype.itemsize
        self._scratch = np.empty(BLOCK_BYTES, np.uint8)
        self._dtype = array.dtype

    def blocks(self, start: int, size: int) -> Iterator[np.ndarray]:
        """Yields decoded elements; each block is valid until the next one.

        Args:
          start: position of the first byte in the chunk, not before the last read.
          size: how many bytes.

        Raises:
          InputError: the chunk cannot be decoded, ends early, or does not end where it should.
        """
        self._skip_to(start)
        while self._position < start + size:
            block = self._scratch[: start + size - self._position]
            self._fill(block.data)
            yield block.view(self._dtype)
        self._check_end()

    def read_into(self, target: np.ndarray, start: int) -> None:
        """Decodes elements to where they are wanted.

        Args:
          target: contiguous array to fill.
          start: position of its first byte in the chunk, not before the last read.

        Raises:
          InputError: as `blocks`.
        """
        self._skip_to(start)
        self._fill(target.reshape(-1).view(np.uint8).data)
        self._check_end()

    def _skip_to(self, start: int) -> None:
        while self._position < start:
            self._fill(self._scratch.data[: start - self._position])

    def _check_end(self) -> None:
        """Proves the chunk, if all of it was read."""
        if self._position == self._size:
            if self._read_into(memoryview(bytearray(1))):  # also verifies the checksum of the frame
                raise InputError(
                    f"{self._what} is longer than its shape, the checkpoint is damaged; copy or save it again"
                )
            if self._summed is not None:
                check_part(self._what, self._crc32, self._summed.crc32)

    def finish(self) -> None:
        """Proves the chunk by its check sums, for which all of it is read; Orbax's own chunks have none.

        Raises:
          InputError: it is damaged.
        """
        if self._position < self._size and (self._crc32 is not None or self._has_checksum()):
            for _ in self.blocks(self._position, self._size - self._position):
                pass

    def close(self) -> None:
        """Closes the file, if there is one."""
        self._stream.close()

    def _has_checksum(self) -> bool:
        if not self._compressed:
            return False
        head = self._place[:_FRAME_HEAD] if isinstance(self._place, bytes) else self._place.read(_FRAME_HEAD)
        return zstandard.get_frame_parameters(head).has_checksum

    def _fill(self, target: memoryview) -> None:
        done = 0
        while done < len(target):
            count = self._read_into(target[done:])
            if not count:
                raise InputError(f"{self._what} ends early, the checkpoint is damaged; copy or save it again")
            done += count
        self._position += done

    def _read_into(self, target: memoryview) -> int:
        try:
            return self._stream.readinto(target)
        except zstandard.ZstdError as error:
            raise InputError(f"{self._what} cannot be decoded ({error}); the checkpoint is damaged") from error


class _Source:
    """Encoded bytes as what zstandard reads from; `copy_to` gets them, too."""

    def __init__(self, place: bytes | Span, copy_to: Summed | None):
        self._file, self._left = (
            (place.open(), place.length) if isinstance(place, Span) else (io.BytesIO(place), len(place))
        )
        self._copy_to = copy_to

    def read(self, size: int) -> bytes:
        try:
            content = self._file.read(min(size, self._left))
        except OSError as error:
            raise InputError(f"{self._file.name} cannot be read ({error}); the checkpoint is damaged") from error
        self._left -= len(content)
        if self._copy_to is not None:
            self._copy_to.write(content)
        return content

    def readinto(self, target: memoryview) -> int:
        content = self.read(len(target))
        target[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()


def read_array(array: StoredArray) -> np.ndarray:
    """Reads one array; beside it, little more than a few blocks are in memory.

    Args:
      array: where it is stored.

    Returns:
      The whole array.
    """
    values = np.empty(array.shape or (1,), array.dtype)
    row_bytes = math.prod(array.shape[1:]) * array.dtype.itemsize
    for _ in read_slabs(array, max(1, 16 * BLOCK_BYTES // max(1, row_bytes)), out=values):
        pass
    return values.reshape(array.shape)


def read_slabs(array: StoredArray, step: int, *, out: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Reads an array from front to end without ever holding it.

    Args:
      array: where it is stored.
      step: rows of axis 0 to read at a time.
      out: the whole array, if it is to be held: slabs are then views of it.

    Yields:
      Arrays of at most `step` rows, which never reach over the end of a chunk; together they are the array.
    """
    shape, chunk = array.shape or (1,), array.chunk or (1,)
    row_bytes = math.prod(chunk[1:]) * array.dtype.itemsize
    grid = list(np.ndindex(*(math.ceil(n / c) for n, c in zip(shape[1:], chunk[1:], strict=True))))
    for number in range(math.ceil(shape[0] / chunk[0])):
        rows = min(chunk[0], shape[0] - number * chunk[0])
        with contextlib.ExitStack() as opened:
            streams = [opened.enter_context(contextlib.closing(ChunkStream(array, (number, *at)))) for at in grid]
            for start in range(0, rows, step):
                count = min(step, rows - start)
                first = number * chunk[0] + start
                slab = np.empty((count, *shape[1:]), array.dtype) if out is None else out[first : first + count]
                for at, stream in zip(grid, streams, strict=True):
                    if chunk[1:] == shape[1:]:
                        stream.read_into(slab, start * row_bytes)
                        continue
                    part = np.empty((count, *chunk[1:]), array.dtype)
                    stream.read_into(part, start * row_bytes)
                    places = [
                        slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(at, chunk[1:], shape[1:], strict=True)
                    ]
                    inside = [slice(place.stop - place.start) for place in places]
                    slab[(slice(None), *places)] = part[(slice(None), *inside)]
                yield slab
            for stream in streams:
                stream.finish()
