"""Columns of numbers from parquet files; what is no finite number is named by file, column and row."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from clp_jax.data.lerobot_files import check_columns, readable
from clp_jax.errors import InputError

_LARGEST = float(np.finfo(np.float32).max)
"""Models compute in float32 at most: a larger value would become infinite."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """What was read of one file.

    Attributes:
      values: per column its numbers, float32 or float64 [n, d].
      problems: one sentence for each column that cannot be used.
    """

    values: dict[str, np.ndarray]
    problems: tuple[str, ...] = ()


def open_table(file: Path) -> Any:
    """A parquet file, its rows unread."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file)


def read_columns(
    file: Path, table: Any, wanted: Sequence[str], optional: Sequence[str] = (), left_out: Sequence[int] = ()
) -> Columns:
    """Columns of an open table.

    Args:
      file: its path, for messages.
      table: from `open_table`.
      wanted: names of columns.
      optional: names of columns that may be absent.
      left_out: numbers of episodes whose rows may hold what is not finite.
    """
    values, problems = {}, []
    names = table.schema_arrow.names
    keys = list(dict.fromkeys([*wanted, *(key for key in optional if key in names)]))
    usable = []
    for key in keys:
        try:
            check_columns(file, names, [key])
            usable.append(key)
        except InputError as error:
            problems.append(str(error))
    try:
        with readable(file):
            owners = ["episode_index"] if left_out and names.count("episode_index") == 1 else []
            read = table.read(columns=list(dict.fromkeys([*usable, *owners])), use_threads=False)
    except InputError as error:
        return Columns({}, (*problems, str(error)))
    unread = np.isin(read.column("episode_index").to_numpy(), left_out) if owners else np.zeros(len(read), bool)
    for key in usable:
        try:
            values[key] = as_numbers(read.column(key), f"column {key} of {file}", unread)
        except InputError as error:
            problems.append(str(error))
    return Columns(values, tuple(problems))


def as_numbers(column: Any, where: str, unread: Bool[np.ndarray, " n"]) -> np.ndarray:
    """A column of numbers, or of lists of equally many, as float32 or float64 with two axes.

    Args:
      column: from pyarrow.
      where: its name in messages.
      unread: rows whose numbers need not be finite.

    Raises:
      InputError: a value is absent, no number, not finite or beyond float32, or lists differ in length.
    """
    import pyarrow
    from pyarrow import types

    column = column.combine_chunks()
    column = pyarrow.concat_arrays(column.chunks) if isinstance(column, pyarrow.ChunkedArray) else column
    rows, kind = len(column), column.type
    if column.null_count:
        empty = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise InputError(f"{where} has {column.null_count} empty values, the first in row {empty}.")
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        _check_lengths(column, where)
        column, kind = column.flatten(), kind.value_type
    if not (types.is_floating(kind) or types.is_integer(kind) or types.is_boolean(kind)):
        raise InputError(f"{where} holds {kind}, not numbers.")
    if column.null_count:
        empty = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0]) // max(1, len(column) // rows)
        raise InputError(f"{where} has {column.null_count} empty values in its lists, the first in row {empty}.")
    exact = pyarrow.float32() if kind == pyarrow.float32() else pyarrow.float64()
    values = column.cast(exact, safe=False).to_numpy(zero_copy_only=False)
    if rows == 0:
        return values.reshape(0, 0)
    if len(values) == 0:
        raise InputError(f"{where} holds empty lists.")
    values = values.reshape(rows, -1)
    _check_finite(values, where, unread)
    return values


def _check_lengths(column: Any, where: str) -> None:
    import pyarrow.compute
    from pyarrow import types

    if types.is_fixed_size_list(column.type):
        return
    lengths = pyarrow.compute.call_function("list_value_length", [column]).to_numpy(zero_copy_only=False)
    other = np.flatnonzero(lengths != lengths[0]) if len(lengths) else []
    if len(other):
        raise InputError(
            f"{where} holds lists of different lengths: row 0 has {lengths[0]:g} values, row {other[0]} "
            f"{lengths[other[0]]:g}."
        )


def _check_finite(values: np.ndarray, where: str, unread: np.ndarray) -> None:
    """Raise unless all values are finite in float32; the fast way is one maximum over all of them."""
    with np.errstate(invalid="ignore"):
        if max(abs(float(values.min())), abs(float(values.max()))) <= _LARGEST:  # false for NaN
            return
        bad = np.argwhere(~(np.abs(values) <= _LARGEST) & ~unread[:, None])
    if not len(bad):
        return
    row, dimension = bad[0]
    value = values[row, dimension]
    what = f"{value}" if not np.isfinite(value) else f"{value:g}, which float32 cannot hold,"
    raise InputError(
        f"{where} holds {what} in row {row}, dimension {dimension}"
        + (f", and {len(bad) - 1} more such values" if len(bad) > 1 else "")
        + "; repair or remove these rows."
    )
