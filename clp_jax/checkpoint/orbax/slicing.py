"""Copy a checkpoint leaf by leaf, keeping some rows of axis 0 (layers), without ever holding the model."""

import contextlib
import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clp_jax.checkpoint.carrying import check_room, side_files
from clp_jax.checkpoint.manifest import list_files
from clp_jax.checkpoint.opening import fingerprint, unchanged
from clp_jax.checkpoint.orbax.chunks import StoredArray, stored_arrays
from clp_jax.checkpoint.orbax.decoding import ChunkStream
from clp_jax.checkpoint.orbax.params import files_beside, write_beside
from clp_jax.checkpoint.orbax.spec import POLICY, CheckpointSpec, translated
from clp_jax.checkpoint.orbax.writer import CHUNK_BYTES, ArrayForm, ItemWriter, rows_per_chunk
from clp_jax.checkpoint.threads import run_in_threads
from clp_jax.errors import InputError
from clp_jax.outputs import staged
from clp_jax.trees import flatten

Take = Callable[[str], Sequence[int] | None] | Mapping[str, Sequence[int] | None]
"""Which rows of axis 0 to keep, by path of the leaf, 0-based and increasing; None keeps the leaf as it is."""


@dataclasses.dataclass(frozen=True)
class RewriteReport:
    """What `rewrite` did.

    Attributes:
      leaves: parameters written.
      sliced: those of which only some rows were kept.
      bytes_in: size of the source's arrays, decoded.
      bytes_out: size of the written arrays, decoded.
      seconds: wall time.
      notes: what else there is to know, for people.
    """

    leaves: int
    sliced: int
    bytes_in: int
    bytes_out: int
    seconds: float
    notes: tuple[str, ...] = ()


def rewrite(
    spec: CheckpointSpec,
    out: str | os.PathLike,
    *,
    take: Take,
    given: Mapping[str, np.ndarray] | None = None,
    record: Mapping[str, Any] | None = None,
    policy_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> RewriteReport:
    """Writes a checkpoint that keeps the given rows of every leaf; values, dtypes and compression stay.

    Memory does not grow with the model, also if the source stores a leaf as one chunk. The optimiser's state
    (``train_state``) is not carried: its moments belong to the old shapes.

    Args:
      spec: the checkpoint to read.
      out: step folder to write: ``params``, ``assets`` (copied) and ``clp.json`` if there is a record.
      take: rows of axis 0 to keep for each leaf, by path.
      given: leaves by path whose values are these, of the shape and dtype that stays, and not the source's.
      record: content of ``clp.json``.
      policy_files: contents of files below ``assets/policy``, in place of the copies.
      overwrite: replace an existing `out`.
      allow_nonfinite: accept NaN and infinity in the weights.
      progress: called with the bytes written so far and in all, those of arrays decoded.

    Returns:
      Sizes and time.

    Raises:
      InputError: the source is damaged or not finite, `take` names rows or leaves that do not exist, or `out` exists.
      OSError: `out` has no room for the assets, or cannot be written.
    """
    started = time.perf_counter()
    shapes = flatten(spec.tree)
    kept, given = _kept_rows(shapes, take), given or {}
    fingerprint(spec)  # before anything is listed: the block below proves that all of it is of one checkpoint
    with translated(spec.path):
        arrays = stored_arrays(spec.path)
    leaves = [(arrays[spec.stored_name(path)], kept[path]) for path in shapes]
    replaced = {spec.stored_name(path): values for path, values in given.items()}
    total = sum(_size(array, rows) for array, rows in leaves)
    to_copy = check_room(out, side_files(spec.assets).values())
    source = spec.path.parent if spec.assets or spec.plan_record else spec.path
    done = 0

    def report(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total + to_copy)

    with staged(out, by="clp prune", overwrite=overwrite, sources=[source]) as folder, unchanged(spec):
        with ItemWriter(folder / "params", allow_nonfinite=allow_nonfinite) as writer:
            copy_columns(
                [c for array, rows in leaves for c in columns(array, rows, writer, replaced.get(array.name))], report
            )
        write_beside(folder, assets=spec.assets, record=record, report=report)
        for name, content in (policy_files or {}).items():
            (folder / "assets" / POLICY / name).write_bytes(content)
        list_files(folder, files_beside(folder))
    return RewriteReport(
        leaves=len(leaves),
        sliced=sum(rows is not None for _, rows in leaves),
        bytes_in=sum(_size(array, None) for array, _ in leaves),
        bytes_out=total,
        seconds=time.perf_counter() - started,
    )


def _kept_rows(shapes: Mapping[str, Any], take: Take) -> dict[str, tuple[int, ...] | None]:
    """Checks and returns the rows to keep of every leaf; all rows means None."""
    if isinstance(take, Mapping):
        unknown = sorted(take.keys() - shapes.keys())
        if unknown:
            raise InputError(f"the checkpoint has no parameters {unknown}; correct the rows to keep")
        take = take.get
    kept: dict[str, tuple[int, ...] | None] = {}
    for path, leaf in shapes.items():
        rows = take(path)
        if rows is None:
            kept[path] = None
            continue
        rows = tuple(int(row) for row in rows)
        count = leaf.shape[0] if leaf.shape else 0
        if not rows or rows[0] < 0 or rows[-1] >= count or any(a >= b for a, b in itertools.pairwise(rows)):
            raise InputError(f"cannot keep rows {list(rows)} of {path}: give increasing numbers from 0 to {count - 1}")
        kept[path] = None if len(rows) == count else rows
    return kept


def _size(array: StoredArray, rows: Sequence[int] | None) -> int:
    shape = array.shape if rows is None else (len(rows), *array.shape[1:])
    return math.prod(shape) * array.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Column:
    """The chunks of an array at one place of all axes but the first, to be copied one after another.

    Attributes:
      array: the source.
      rows: the rows of axis 0 to keep.
      place: the chunks' index without axis 0, in the source as in the output.
      height: rows in a chunk of the output.
      as_is: whether chunks of the output are chunks of the source, which need no new encoding.
      writer: the output.
      given: all rows of the output, if they are not the source's.
    """

    array: StoredArray
    rows: Sequence[int]
    place: tuple[int, ...]
    height: int
    as_is: bool
    writer: ItemWriter
    given: np.ndarray | None = None

    @property
    def row_bytes(self) -> int:
        """Size of a row of a chunk."""
        return math.prod(self.array.chunk[1:]) * self.array.dtype.itemsize

    @property
    def work(self) -> int:
        """Bytes to handle, about."""
        return self.row_bytes * (len(self.rows) if self.as_is else math.prod(self.array.shape[:1]))

    def copy(self) -> Iterator[int]:
        """Copies the chunks; yields the decoded size of each as it is done."""
        if self.given is not None:
            for number in range(math.ceil(len(self.rows) / self.height)):
                rows = self.given[number * self.height : (number + 1) * self.height]
                self.writer.write_chunk(self.array.name, (number, *self.place), self._blocks(rows))
                yield self._size(len(rows))
            return
        groups = [self.rows[start : start + self.height] for start in range(0, len(self.rows), self.height)]
        with contextlib.closing(_RowReader(self.array, self.place)) as reader:
            for number, rows in enumerate(groups):
                if self.as_is:
                    self._copy_chunk(number, rows[0] // self.height)
                else:
                    self.writer.write_chunk(self.array.name, (number, *self.place), reader.blocks(rows))
                yield self._size(len(rows))
            reader.finish()

    def _blocks(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """What of given rows lies in this column, with the padding that chunks at an edge are stored with."""
        for row in rows:
            part = row[tuple(slice(p * c, (p + 1) * c) for p, c in zip(self.place, self.array.chunk[1:], strict=True))]
            missing = [(0, c - n) for c, n in zip(self.array.chunk[1:], part.shape, strict=True)]
            yield np.ascontiguousarray(np.pad(part, missing) if any(after for _, after in missing) else part)

    def _copy_chunk(self, number: int, source: int) -> None:
        """Copies a chunk as it is stored, and decodes it all the same, to see that it can be and is finite."""
        with self.writer.open_chunk(self.array.name, (number, *self.place)) as file:
            stream = ChunkStream(self.array, (source, *self.place), copy_to=file)
            with contextlib.closing(stream):
                for block in stream.blocks(0, self.height * self.row_bytes):
                    file.holds(block)

    def _size(self, rows: int) -> int:
        """Bytes of some rows that belong to the array; chunks at its edges are stored with padding."""
        chunk, shape = self.array.chunk[1:], self.array.shape[1:]
        inside = (min(c, n - p * c) for c, n, p in zip(chunk, shape, self.place, strict=True))
        return rows * math.prod(inside) * self.array.dtype.itemsize


def columns(
    array: StoredArray, rows: Sequence[int] | None, writer: ItemWriter, given: np.ndarray | None = None
) -> Iterator[Column]:
    """Declares the output of one array and yields its columns.

    Args:
      array: the source.
      rows: the rows of axis 0 to keep, checked; None keeps all.
      writer: the output.
      given: values of all rows of the output, if they are not the source's.

    Raises:
      InputError: the given values have another shape or dtype than the output.
    """
    shape, chunk = array.shape or (1,), array.chunk or (1,)
    row_bytes = math.prod(chunk[1:]) * array.dtype.itemsize
    if given is not None and (given.dtype != array.dtype or given.shape != (_count(array, rows), *shape[1:])):
        raise InputError(f"{array.name} would be {given.dtype}{list(given.shape)}, which does not fit the source's")
    as_is = chunk[0] == 1 or (rows is None and chunk[0] * row_bytes <= CHUNK_BYTES)
    rows = range(shape[0]) if rows is None else rows
    height = chunk[0] if as_is else rows_per_chunk(row_bytes, len(rows))
    form = ArrayForm((len(rows), *shape[1:]), (height, *chunk[1:]), array.dtype, array.metadata["compressor"])
    writer.add(array.name, form if array.shape else dataclasses.replace(form, shape=(), chunk=()))
    for place in np.ndindex(*(math.ceil(size / step) for size, step in zip(shape[1:], chunk[1:], strict=True))):
        yield Column(array, rows, place, height, as_is, writer, given)


def copy_columns(columns: Iterable[Column], report: Callable[[int], None]) -> None:
    """Copies columns in a few threads, the longest first, so that the threads end together.

    Args:
      columns: of one output or several.
      report: called with the decoded bytes of each chunk.
    """
    longest_first = sorted(columns, key=lambda column: column.work, reverse=True)
    run_in_threads([column.copy() for column in longest_first], report)


def _count(array: StoredArray, rows: Sequence[int] | None) -> int:
    return array.shape[0] if rows is None else len(rows)


class _RowReader:
    """Reads rows of axis 0, in increasing order, from the chunks at one place of the other axes."""

    def __init__(self, array: StoredArray, place: tuple[int, ...]):
        self._array = array
        self._place = place
        self._height = math.prod(array.chunk[:1])
        self._row_bytes = math.prod(array.chunk[1:]) * array.dtype.itemsize
        self._opened = -1
        self._stream: ChunkStream | None = None

    def blocks(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields the elements of some rows in small pieces."""
        for first, count in _runs(rows, self._height):
            chunk, offset = divmod(first, self._height)
            if self._stream is None or chunk != self._opened:
                self.finish()
                self.close()
                self._stream, self._opened = ChunkStream(self._array, (chunk, *self._place)), chunk
            yield from self._stream.blocks(offset * self._row_bytes, count * self._row_bytes)

    def finish(self) -> None:
        """Proves the open chunk by its check sum, which rows that are not kept may stand before."""
        if self._stream is not None:
            self._stream.finish()

    def close(self) -> None:
        """Closes what is open."""
        if self._stream is not None:
            self._stream.close()


def _runs(rows: Sequence[int], height: int) -> Iterator[tuple[int, int]]:
    """Yields first row and length of each run of consecutive rows that lies in one chunk.

    >>> list(_runs([1, 2, 3, 4, 7], 3))
    [(1, 2), (3, 2), (7, 1)]
    """
    for _, group in itertools.groupby(enumerate(rows), key=lambda pair: (pair[1] - pair[0], pair[1] // height)):
        run = list(group)
        yield run[0][1], len(run)
