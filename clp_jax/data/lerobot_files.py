"""The files of a LeRobot data set's meta: JSON and parquet, read or refused in one line."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clp_jax.errors import InputError, blamed_on
from clp_jax.files import parse_json, read_text


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turns what pyarrow raises about a broken file into an `InputError` of one line."""
    with blamed_on(file, verb="cannot be read, it is cut off or damaged"):
        yield


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of one JSON object a line.

    Raises:
      InputError: the file is absent, or a line is no JSON object.
    """
    found = []
    # Only a line feed ends a line: a text may hold U+2028 and its like, at which str.splitlines would cut it.
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        value = parse_json(line, f"line {number} of {file}")
        if not isinstance(value, dict):
            raise InputError(f"line {number} of {file} is no JSON object.")
        found.append(value)
    return found


def read_rows(file: Path, columns: list[str] | None = None, optional: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a parquet file; of all columns, or of those and of the optional ones that it has.

    Raises:
      InputError: the file is absent or broken, or has not these columns, once each.
    """
    import pyarrow.parquet

    if not file.is_file():
        raise InputError(f"there is no {file}.")
    with readable(file), pyarrow.parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        if columns is not None:
            columns = [*columns, *(key for key in optional if key in names)]
        check_columns(file, names, names if columns is None else columns)
        return table.read(columns=columns).to_pylist()


def check_columns(file: Path, names: list[str], wanted: list[str]) -> None:
    """Raise unless a table has every wanted column exactly once.

    Raises:
      InputError: names the columns that are absent or there twice.
    """
    absent = [key for key in wanted if key not in names]
    if absent:
        raise InputError(f"{file} has no column {', '.join(absent)}; it has {', '.join(names)}.")
    twice = [key for key in wanted if names.count(key) > 1]
    if twice:
        raise InputError(f"{file} has the column {twice[0]} {names.count(twice[0])} times; which is right? Keep one.")


def one_text(file: Path, row: Mapping[str, Any]) -> Any:
    """The text in a row of v3.0's tasks table: the row label of a pandas table, which its writer may have named.

    Raises:
      InputError: no column can be it.
    """
    others = [key for key in row if key != "task_index"]
    for name in ("task", "__index_level_0__", *(others if len(others) == 1 else ())):
        if name in row:
            return row[name]
    raise InputError(f"{file} has no column of texts; it has {', '.join(row)}. Name it task.")
