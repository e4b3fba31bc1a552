"""Write a params item as a stream, in the form that Orbax (0.11 and 0.12) restores.

The form is Orbax's without OCDBT: one folder an array, one file a chunk. Orbax and openpi read it by the same calls,
and only here can a chunk go to the disk in blocks that never leave the processor's cache, which halves the processor
time of a pruning. Every zstd frame has a checksum: a flipped bit in one of our files is an error for every reader. In a
file that Orbax wrote, most flipped bits pass for another weight.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import jax.numpy as jnp
import numpy as np
import zstandard
from etils import epath

from clp_jax.checkpoint.manifest import Listed, Summed, list_arrays
from clp_jax.checkpoint.orbax.chunks import Span, StoredArray, chunk_name
from clp_jax.checkpoint.orbax.decoding import BLOCK_BYTES, ChunkStream
from clp_jax.checkpoint.orbax.spec import fingerprint, read_spec
from clp_jax.errors import InputError

CHUNK_BYTES = 64 * 2**20
"""A chunk of small rows (the embedding table) holds as many as fit in this."""

ROW_BYTES = 2**20
"""A row at least this big (one layer of a stacked weight) is a chunk of its own, so that later prunings skip it."""

COMPRESSOR = {"id": "zstd", "level": 1}
"""Orbax's default."""

# Float32 weights with random mantissas shrink by 8% at level 1, which takes 5 times the time to write and 6 times the
# time to read of a frame that zstd stores as it is. So a chunk whose first block shrinks by less than this fraction is
# stored as it is, still as a zstd frame with a checksum.
_WORTHWHILE = 0.1

# What zstd saves on weights lies in their exponents, and in the zeros behind bfloat16 in float32: Huffman codes find
# both. A search for repetitions finds little more, so it gets the smallest table and the longest match. Of bfloat16 the
# size is that of level 1; float32 that bfloat16 holds takes 7% more, and a third of the time to write, half to read.
_HUFFMAN = {"strategy": zstandard.STRATEGY_FAST, "hash_log": 6, "min_match": 7, "window_log": 17}
_STORE = {**_HUFFMAN, "target_length": zstandard.TARGETLENGTH_MAX}  # steps over whole blocks: nothing is searched

_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"


def rows_per_chunk(row_bytes: int, rows: int) -> int:
    """Returns how many rows of axis 0 we store in one chunk.

    >>> rows_per_chunk(row_bytes=16 * 2**20, rows=18), rows_per_chunk(row_bytes=8192, rows=257152)
    (1, 8192)
    """
    if row_bytes >= ROW_BYTES:
        return 1
    return max(1, min(rows, CHUNK_BYTES // max(1, row_bytes)))


@dataclass(frozen=True)
class ArrayForm:
    """How an array is stored.

    Attributes:
      shape: shape of the array.
      chunk: shape of a chunk.
      dtype: dtype of the elements.
      compressor: zarr's description of the compressor; None stores chunks as they are.
    """

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype
    compressor: dict[str, Any] | None = field(default_factory=lambda: dict(COMPRESSOR))

    def to_json(self) -> dict[str, Any]:
        """Returns the content of ``.zarray``."""
        return {
            "zarr_format": 2,
            "shape": list(self.shape),
            "chunks": list(self.chunk),
            # zarr has no code for bfloat16, tensorstore has
            "dtype": self.dtype.name if self.dtype.kind == "V" else self.dtype.str,
            "compressor": self.compressor,
            "fill_value": None,
            "filters": None,
            "order": "C",
            "dimension_separator": ".",
        }


class ChunkFile(Summed):
    """The file of a chunk that is being written.

    Attributes:
      holds: to be called with the elements, contiguous and in their order, whose encoded bytes `write` gets.
    """

    def __init__(self, file: IO[bytes], holds: Callable[[np.ndarray], None]):
        super().__init__(file)
        self.holds = holds


class ItemWriter:
    """Writes one params item; chunks may be written from several threads.

    Use as a context manager: leaving it without an exception writes the metadata, last the file that makes the folder a
    checkpoint, and lists the arrays with their checksums in the manifest beside it.

    Args:
      folder: the item's folder, which must not exist.
      allow_nonfinite: accept NaN and infinity.
      read_back: decode every chunk once it is written, and compare what it holds with what it was to hold.
    """

    def __init__(self, folder: epath.Path, *, allow_nonfinite: bool = False, read_back: bool = False):
        self._folder = folder
        self._allow_nonfinite = allow_nonfinite
        self._read_back = read_back
        self._arrays: dict[str, ArrayForm] = {}
        self._crc32: dict[str, dict[str, int]] = {}
        self._started = time.time_ns()

    def __enter__(self) -> "ItemWriter":
        with writing(self._folder):
            self._folder.mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with writing(self._folder):
                self._write_metadata()
                arrays = {
                    name: Listed(form.shape, form.dtype.name, dict(sorted(self._crc32[name].items())))
                    for name, form in self._arrays.items()
                }
                list_arrays(self._folder.parent, arrays=arrays, fingerprint=fingerprint(read_spec(self._folder)))

    def add(self, name: str, form: ArrayForm) -> None:
        """Declares an array, before its chunks.

        Args:
          name: name of the array, keys joined by dots.
          form: how it is stored.
        """
        self._arrays[name], self._crc32[name] = form, {}
        with writing(self._folder):
            (self._folder / name).mkdir()

    @contextlib.contextmanager
    def open_chunk(self, name: str, index: tuple[int, ...]) -> Iterator[ChunkFile]:
        """Opens the file of one chunk, for encoded bytes.

        Args:
          name: a declared array.
          index: the chunk's index in the grid.

        Raises:
          InputError: it holds NaN or infinity, or does not read back.
        """
        path, content = self._folder / name / chunk_name(index), Summed()

        def holds(block: np.ndarray) -> None:
            self._check_finite(name, block)
            if self._read_back:
                content.write(block.view(np.uint8).data)

        with writing(path), path.open("wb") as file:
            chunk = ChunkFile(file, holds)
            yield chunk
        self._crc32[name][path.name] = chunk.crc32
        if self._read_back:
            self._compare(name, index, path, content.crc32)

    def _compare(self, name: str, index: tuple[int, ...], path: epath.Path, expected: int) -> None:
        """Decodes a chunk from its file, which proves the checksum of its frame, and compares what it holds."""
        complaint = f"{path} does not read back as it was written; check the disk and try again"
        form, found = self._arrays[name], Summed()
        array = StoredArray(name, form.to_json(), {index: Span(path, 0, path.stat().length)})
        try:
            with contextlib.closing(ChunkStream(array, index)) as stream:
                for block in stream.blocks(0, math.prod(form.chunk) * form.dtype.itemsize):
                    found.write(block.view(np.uint8).data)
        except InputError as error:  # which takes it for the source's
            raise InputError(complaint) from error
        if found.crc32 != expected:
            raise InputError(complaint)

    def write_chunk(self, name: str, index: tuple[int, ...], blocks: Iterable[np.ndarray]) -> None:
        """Checks, encodes and writes one whole chunk.

        Args:
          name: a declared array.
          index: the chunk's index in the grid.
          blocks: the chunk's elements in C order, in the dtype of the array, in small pieces. Where they end early, the
            chunk reaches over the array's edge: zarr stores it in full size.

        Raises:
          InputError: a block holds NaN or infinity.
        """
        form = self._arrays[name]
        size = math.prod(form.chunk) * form.dtype.itemsize
        encoder = None
        with self.open_chunk(name, index) as file:
            for block in _padded(blocks, size, form.dtype):
                file.holds(block)
                raw = block.view(np.uint8).data
                if form.compressor is None:
                    file.write(raw)
                    continue
                if encoder is None:
                    # Equal pieces begin at pages of the file, which the kernel writes a third faster.
                    encoder = _compressor(raw, form.compressor).chunker(size=size, chunk_size=BLOCK_BYTES)
                for piece in encoder.compress(raw):
                    file.write(piece)
            if encoder is not None:
                for piece in encoder.finish():
                    file.write(piece)

    def _check_finite(self, name: str, values: np.ndarray) -> None:
        """Raises an `InputError` that names the array if any of its values is NaN or infinite, unless allowed."""
        if self._allow_nonfinite or not jnp.issubdtype(values.dtype, jnp.floating):
            return
        # A float is NaN or infinite if all bits of its exponent are set: as fast to see of bfloat16 as of float32.
        unsigned = np.dtype(f"u{values.dtype.itemsize}")
        infinity = np.array(np.inf, values.dtype).view(unsigned)
        if (values.view(unsigned) & infinity).max() == infinity:
            raise InputError(f"{name} holds NaN or infinity, the run that saved it has diverged; take an earlier step")

    def _write_metadata(self) -> None:
        for name, form in self._arrays.items():
            (self._folder / name / ".zarray").write_text(json.dumps(form.to_json()))
        info = {
            "item_handlers": _HANDLER,
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": self._started,
            "commit_timestamp_nsecs": time.time_ns(),
            "custom_metadata": {},
        }
        tree = {
            "tree_metadata": {str(tuple(name.split("."))): _leaf_metadata(name) for name in self._arrays},
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self._folder / "_CHECKPOINT_METADATA").write_text(json.dumps(info))
        (self._folder / "_METADATA").write_text(json.dumps(tree))


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names what is written in a failure of the file system that names nothing, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        reason = f"{error.strerror or error}; check the space left there"
        raise OSError(error.errno, reason, os.fspath(path)) from error


def _padded(blocks: Iterable[np.ndarray], size: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yields the blocks, then zeros up to a size in bytes."""
    for block in blocks:
        yield block
        size -= block.nbytes
    while size > 0:
        zeros = np.zeros(min(size, BLOCK_BYTES) // dtype.itemsize, dtype)
        yield zeros
        size -= zeros.nbytes


def _compressor(block: memoryview, form: Mapping[str, Any]) -> zstandard.ZstdCompressor:
    """What encodes a chunk that begins with a block: by the level of its array if that pays, else it stores it."""
    level = form.get("level", COMPRESSOR["level"])
    chosen = zstandard.ZstdCompressor(level, write_checksum=True) if level > COMPRESSOR["level"] else _with(_HUFFMAN)
    return chosen if len(chosen.compress(block)) <= (1 - _WORTHWHILE) * len(block) else _with(_STORE)


def _with(parameters: Mapping[str, int]) -> zstandard.ZstdCompressor:
    form = zstandard.ZstdCompressionParameters(**parameters, write_content_size=True, write_checksum=True)
    return zstandard.ZstdCompressor(compression_params=form)


def _leaf_metadata(name: str) -> dict[str, Any]:
    # "np.ndarray" makes a restore without arguments return NumPy arrays on any machine. "jax.Array" would bind it to
    # the devices of the machine that saved, listed in a _sharding file, which are not those of the reader.
    keys = [{"key": key, "key_type": 2} for key in name.split(".")]
    return {"key_metadata": keys, "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False}}
