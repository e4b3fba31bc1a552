"""LeRobot data sets from their own files: tables with pyarrow, frames with PyAV and Pillow.

Numbers are read once and stay in memory; images are read when asked for.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from clp_jax.data import pictures
from clp_jax.data.lerobot_files import check_columns, readable
from clp_jax.data.lerobot_meta import Episode, Meta, shape_of
from clp_jax.data.places import Place, locate
from clp_jax.data.tables import Columns, open_table, read_columns
from clp_jax.data.video import OpenFiles, VideoFrames, frame_tolerance
from clp_jax.errors import InputError

_FILES_AT_A_TIME = 8
COUNTERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""Columns of one number that say what a row is."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of those episodes that could be read.

    Attributes:
      episodes: in order.
      places: where each one's rows are.
      ends: one past the last row of each episode.
      columns: numbers by name [n, d].
    """

    episodes: tuple[Episode, ...]
    places: tuple[Place, ...]
    ends: Int[np.ndarray, " e"]
    columns: Mapping[str, np.ndarray]


class LeRobotData:
    """The rows of a data set.

    Args:
      meta: from `lerobot_meta.read_meta`.
      tolerance: seconds by which a row and its frame may differ, where that is more than the default.
    """

    def __init__(self, meta: Meta, *, tolerance: float | None = None):
        self.meta = meta
        self.frame_tolerance = frame_tolerance(meta.fps, tolerance)
        self.notes: tuple[str, ...] = ()
        self._ends = np.cumsum([episode.length for episode in meta.episodes])
        self._places: list[Place | None] = []
        self._tables = OpenFiles(open_table)
        self._videos = VideoFrames()
        self._numbers: dict[str, np.ndarray] = {}
        self._found: dict[Path, Columns] = {}

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
        if any(key not in self._numbers for key in keys):
            problems = self.read(keys)
            if problems:
                raise InputError(problems[0])
        return [self._numbers[key] for key in keys]

    def read(self, keys: Sequence[str], optional: Sequence[str] = ()) -> tuple[str, ...]:
        """Reads columns that are not in memory yet; `rows` gives those of them that could be read.

        Args:
          keys: names of columns.
          optional: names of columns that may be absent.

        Returns:
          A sentence for each thing that could not be read.
        """
        new = [key for key in dict.fromkeys([*keys, "episode_index"]) if key not in self._numbers]
        listed = list(dict.fromkeys(episode.table for episode in self.meta.episodes))
        if self._places:
            listed = list(dict.fromkeys(place.file for place in self._places if place is not None))
        maybe = [key for key in optional if key not in self._numbers]
        found = self._read_files(listed, new, maybe)
        mismatches = []
        if not self._places:
            located = locate(self.meta, found, lambda files: self._read_files(files, new, maybe))
            self._places, self.notes, mismatches = located.places, located.notes, located.problems
        _check_widths(self.meta, found)
        problems = [*(problem for columns in found.values() for problem in columns.problems), *mismatches]
        self._found = found
        if not problems:
            whole = {key: self.rows(key) for key in [*new, *maybe]}
            self._numbers |= {
                key: rows.columns[key] for key, rows in whole.items() if len(rows.ends) == len(self._ends)
            }
            self._found = {}
        return tuple(problems)

    def rows(self, *keys: str) -> Rows:
        """The rows of those episodes of which `read` could read these columns, whatever is wrong with others.

        Args:
          keys: names of columns that it was given.
        """
        fresh = [key for key in keys if key not in self._numbers]
        kept = [
            (position, place)
            for position, place in enumerate(self._places)
            if place is not None
            and all(place.file in self._found and key in self._found[place.file].values for key in fresh)
        ]
        columns, whole = {}, len(kept) == len(self._places)
        for key in keys:
            if key in self._numbers and whole:
                columns[key] = self._numbers[key]
            elif kept:
                columns[key] = np.concatenate([self._of_episode(key, position, place) for position, place in kept])
        episodes = tuple(self.meta.episodes[position] for position, _ in kept)
        ends = np.cumsum([episode.length for episode in episodes], dtype=np.int64)
        return Rows(episodes, tuple(place for _, place in kept), ends, columns)

    def _of_episode(self, key: str, position: int, place: Place) -> np.ndarray:
        length = self.meta.episodes[position].length
        if key in self._numbers:
            return self._numbers[key][self._ends[position] - length : self._ends[position]]
        return self._found[place.file].values[key][place.row : place.row + length]

    def column_names(self) -> list[str]:
        """Names of the columns of the first table that is not broken, none if all are."""
        for file in dict.fromkeys(episode.table for episode in self.meta.episodes):
            try:
                with readable(file), self._tables.borrow(file) as table:
                    return list(table.schema_arrow.names)
            except InputError:
                continue
        return []

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
        time = float(self.numbers("timestamp")[0][row, 0])
        try:
            if key in episode.videos:
                return self._videos.frame(
                    episode.videos[key], episode.offset[key] + time, tolerance=self.frame_tolerance
                )
            place = self._places[position]
            assert place is not None
            return self._still(place.file, key, place.row + frame)
        except InputError as error:
            raise InputError(f"episode {episode.index}, frame {frame}, {key}: {error}") from error

    def _position(self, row: int) -> int:
        return int(np.searchsorted(self._ends, row, side="right"))

    def _read_files(self, files: Sequence[Path], keys: Sequence[str], optional: Sequence[str]) -> dict[Path, Columns]:
        left_out = [episode.index for episode in self.meta.left_out]

        def read(file: Path) -> Columns:
            try:
                with readable(file), self._tables.borrow(file) as table:
                    return read_columns(file, table, keys, optional, left_out)
            except InputError as error:
                return Columns({}, (str(error),))

        with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
            return dict(zip(files, pool.map(read, files), strict=True))

    def _still(self, file: Path, key: str, row: int) -> UInt8[np.ndarray, "h w 3"]:
        with readable(file), self._tables.borrow(file) as table:
            check_columns(file, table.schema_arrow.names, [key])
            group = 0
            while row >= (count := table.metadata.row_group(group).num_rows):
                group, row = group + 1, row - count
            stored = table.read_row_group(group, columns=[key], use_threads=False).column(key)[row].as_py()
        content = stored.get("bytes") if isinstance(stored, dict) else None
        if content is None:
            raise InputError(f"{file} holds no image bytes.")
        try:
            return pictures.decode(content)
        except InputError as error:
            raise InputError(f"{file} holds {error}") from error


def _check_widths(meta: Meta, found: dict[Path, Columns]) -> None:
    """Adds a problem where a column has another width than info.json says, or, where it says none, the first file."""
    expected = {}
    for file, columns in list(found.items()):
        for key, values in columns.values.items():
            if len(values) == 0:
                continue
            if key not in expected:
                shape = (1,) if key in COUNTERS else shape_of(meta.features.get(key, {}))
                expected[key] = (values.shape[1], file) if shape is None else (int(np.prod(shape)), "info.json")
            width, source = expected[key]
            if values.shape[1] != width:
                text = f"column {key} of {file} has {values.shape[1]} dimensions, in {source} it has {width}."
                usable = {name: numbers for name, numbers in found[file].values.items() if name != key}
                found[file] = Columns(usable, (*found[file].problems, text))
