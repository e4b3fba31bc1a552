"""LeRobot data sets from their own files: tables with pyarrow, frames with PyAV and Pillow.

Numbers are read once and stay in memory; images are read when asked for.
"""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from clp_jax.data.lerobot_meta import Meta, readable
from clp_jax.data.video import OpenFiles, VideoFrames
from clp_jax.errors import InputError

_FILES_AT_A_TIME = 8
_TOLERANCE = 1e-3
"""Seconds between the time of a row and of its frame: ten times what lerobot allows, and never another frame."""


class LeRobotData:
    """The rows of a data set.

    Args:
      meta: from `lerobot_meta.read_meta`.
    """

    def __init__(self, meta: Meta):
        self.meta = meta
        lengths = np.array([episode.length for episode in meta.episodes])
        self._ends = np.cumsum(lengths)
        self._by_file: dict[Path, list[int]] = {}
        self._row_in_file = np.zeros(len(lengths), np.int64)
        for position, episode in enumerate(meta.episodes):
            inside = self._by_file.setdefault(episode.table, [])
            if inside:
                self._row_in_file[position] = self._row_in_file[inside[-1]] + lengths[inside[-1]]
            inside.append(position)
        self._tables = OpenFiles(_open_table)
        self._videos = VideoFrames()
        self._numbers: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def episodes(self) -> Int[np.ndarray, " n"]:
        """The episode number of each row."""
        return np.repeat([e.index for e in self.meta.episodes], [e.length for e in self.meta.episodes])

    @property
    def ends(self) -> Int[np.ndarray, " e"]:
        """One past the last row of each episode."""
        return self._ends

    def numbers(self, *keys: str) -> list[Float[np.ndarray, "n _"]]:
        """Columns over all rows; each file is read at most once for them, several at a time.

        Raises:
          InputError: a column is absent or holds something else than finite numbers, or a file is broken or has other
            rows than its episodes.
        """
        new = [key for key in keys if key not in self._numbers]
        if new:
            with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
                tables = list(pool.map(lambda file: self._read_numbers(file, new), self._by_file))
            pieces: list[Any] = [None] * len(self.meta.episodes)
            for positions, columns in zip(self._by_file.values(), tables, strict=True):
                for position in positions:
                    start = self._row_in_file[position]
                    pieces[position] = slice(start, start + self.meta.episodes[position].length), columns
            for key in new:
                self._numbers[key] = np.concatenate([columns[key][rows] for rows, columns in pieces])
        return [self._numbers[key] for key in keys]

    def chunk(self, row: int, horizon: int) -> tuple[Int[np.ndarray, " h"], Bool[np.ndarray, " h"]]:
        """The rows of the actions from here on, held at the episode's last, and which of them are only held."""
        end = int(self._ends[self._position(row)])
        wanted = np.arange(row, row + horizon)
        return np.minimum(wanted, end - 1), wanted >= end

    def image(self, key: str, row: int) -> UInt8[np.ndarray, "h w 3"]:
        """What a camera saw.

        Raises:
          InputError: it cannot be read; the message names the episode.
        """
        position = self._position(row)
        episode = self.meta.episodes[position]
        frame = row - int(self._ends[position]) + episode.length
        try:
            if key in episode.videos:
                time = float(self.numbers("timestamp")[0][row, 0])
                return self._videos.frame(episode.videos[key], episode.offset[key] + time, tolerance=_TOLERANCE)
            return self._still(episode.table, key, int(self._row_in_file[position]) + frame)
        except InputError as error:
            raise InputError(f"episode {episode.index}, frame {frame}, {key}: {error}") from error

    def _position(self, row: int) -> int:
        return int(np.searchsorted(self._ends, row, side="right"))

    def _read_numbers(self, file: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
        wanted = list(dict.fromkeys(["episode_index", *keys]))
        with readable(file), self._tables.borrow(file) as table:
            _check_columns(file, table, wanted)
            read = table.read(columns=wanted, use_threads=False)
        columns = {key: _as_numbers(read.column(key), f"column {key} of {file}") for key in wanted}
        episodes = [self.meta.episodes[position] for position in self._by_file[file]]
        expected = np.repeat([e.index for e in episodes], [e.length for e in episodes])
        found = columns["episode_index"][:, 0]
        if len(found) != len(expected):
            raise InputError(f"{file} has {len(found)} rows, its episodes have {len(expected)} according to meta.")
        if (found != expected).any():
            row = int(np.flatnonzero(found != expected)[0])
            raise InputError(f"row {row} of {file} is of episode {found[row]:g}, according to meta of {expected[row]}.")
        return columns

    def _still(self, file: Path, key: str, row: int) -> UInt8[np.ndarray, "h w 3"]:
        from PIL import Image

        with readable(file), self._tables.borrow(file) as table:
            _check_columns(file, table, [key])
            group = 0
            while row >= (count := table.metadata.row_group(group).num_rows):
                group, row = group + 1, row - count
            stored = table.read_row_group(group, columns=[key], use_threads=False).column(key)[row].as_py()
        content = stored.get("bytes") if isinstance(stored, dict) else None
        if content is None:
            raise InputError(f"{file} holds no image bytes.")
        try:
            return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        except OSError as error:
            raise InputError(f"{file} holds a broken image: {error}.") from error


def _open_table(file: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file)


def _check_columns(file: Path, table: Any, wanted: Sequence[str]) -> None:
    absent = [key for key in wanted if key not in table.schema_arrow.names]
    if absent:
        raise InputError(f"{file} has no column {', '.join(absent)}; it has {', '.join(table.schema_arrow.names)}.")


def _as_numbers(column: Any, where: str) -> Float[np.ndarray, "n d"]:
    """A column of numbers, or of lists of equally many, as float32 or float64 with two axes."""
    import pyarrow
    import pyarrow.compute
    from pyarrow import types

    column = column.combine_chunks()
    rows, kind = len(column), column.type
    if column.null_count:
        raise InputError(f"{where} has {column.null_count} empty values.")
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        if len(pyarrow.compute.call_function("list_value_length", [column]).unique()) > 1:
            raise InputError(f"{where} holds lists of different lengths.")
        column, kind = column.flatten(), kind.value_type
    if not (types.is_floating(kind) or types.is_integer(kind) or types.is_boolean(kind)):
        raise InputError(f"{where} holds {kind}, not numbers.")
    exact = pyarrow.float32() if kind == pyarrow.float32() else pyarrow.float64()
    values = column.cast(exact).to_numpy(zero_copy_only=False)
    if rows == 0 or not np.isfinite(values).all():
        raise InputError(f"{where} is empty, or holds NaN or infinite values.")
    return values.reshape(rows, -1)
