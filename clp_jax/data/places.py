"""Where in the table files the rows of each episode are."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from clp_jax.data.lerobot_meta import Meta
from clp_jax.data.tables import Columns


@dataclasses.dataclass(frozen=True)
class Place:
    """The first row of an episode: ``file`` and number of the row in it."""

    file: Path
    row: int


@dataclasses.dataclass(frozen=True)
class Located:
    """What `locate` found.

    Attributes:
      places: per episode of meta; None where its rows are not as meta says.
      problems: a sentence for each file or episode that does not fit.
      notes: what is odd but harmless.
    """

    places: list[Place | None]
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Run:
    """Rows of one episode that follow one another in a file."""

    file: Path
    episode: float
    row: int
    length: int


def locate(meta: Meta, found: dict[Path, Columns], read: Callable[[Sequence[Path]], dict[Path, Columns]]) -> Located:
    """Finds each episode's rows in the file that meta names, or by ``episode_index`` in another one.

    lerobot's converter to v3.0 wrote for some time the file before instead of the first episode's own one of a new
    file (lerobot pull request 2941); lerobot itself reads such sets by position.

    Args:
      meta: of the data set.
      found: the columns of each file that meta names, ``episode_index`` among them; other files are added to it when
        they turn out to be needed.
      read: reads the same columns of more files.
    """
    left_out = {episode.index for episode in meta.left_out}
    runs = [run for file, columns in found.items() for run in _runs(file, columns) if run.episode not in left_out]
    if (places := _as_listed(meta, runs)) is not None:
        return Located(places)
    others = [file for file in sorted((meta.folder / "data").rglob("*.parquet")) if file not in found]
    listed = set(found)
    more = read(others)
    known = {episode.index for episode in meta.episodes}
    runs += [run for file, columns in more.items() for run in _runs(file, columns) if run.episode in known]
    by_episode: dict[float, list[_Run]] = {}
    for run in runs:
        by_episode.setdefault(run.episode, []).append(run)
    places, unplaced, moved = [], [], []
    for episode in meta.episodes:
        own = by_episode.get(episode.index, [])
        fits = len(own) == 1 and own[0].length == episode.length
        places.append(Place(own[0].file, own[0].row) if fits else None)
        if not fits:
            unplaced.append(episode)
        elif own[0].file != episode.table:
            moved.append(episode.index)
    found |= {file: more[file] for file in more if any(place and place.file == file for place in places)}
    problems = _mismatches(meta, {file for file in listed if "episode_index" in found[file].values}, runs, unplaced)
    return Located(places, problems, (_moved(moved),) if moved and not problems else ())


def _moved(episodes: list[int]) -> str:
    return (
        f"meta names another file than the one that holds the rows for {len(episodes)} of the episodes, first episode "
        f"{episodes[0]}, as lerobot's converter wrote it for some time; they were found by episode_index."
    )


def _runs(file: Path, columns: Columns) -> list[_Run]:
    if "episode_index" not in columns.values or not len(columns.values["episode_index"]):
        return []
    numbers = columns.values["episode_index"][:, 0]
    starts = np.flatnonzero(np.diff(numbers, prepend=np.nan) != 0)
    lengths = np.diff(np.append(starts, len(numbers)))
    return [
        _Run(file, episode, start, length)
        for episode, start, length in zip(numbers[starts].tolist(), starts.tolist(), lengths.tolist(), strict=True)
    ]


def _as_listed(meta: Meta, runs: list[_Run]) -> list[Place | None] | None:
    """The places if every file holds exactly the episodes that meta lists for it, in their order."""
    by_file: dict[Path, list[tuple[float, int]]] = {}
    rows: dict[tuple[Path, float], int] = {}
    for run in runs:
        by_file.setdefault(run.file, []).append((run.episode, run.length))
        rows[run.file, run.episode] = run.row
    expected: dict[Path, list[tuple[float, int]]] = {}
    for episode in meta.episodes:
        expected.setdefault(episode.table, []).append((episode.index, episode.length))
    if by_file != expected:
        return None
    return [Place(episode.table, rows[episode.table, episode.index]) for episode in meta.episodes]


def _mismatches(meta: Meta, listed: set[Path], runs: list[_Run], unplaced: list) -> list[str]:
    """A sentence for each readable file that holds other rows than meta says."""
    expected: dict[Path, list[tuple[int, int]]] = {}
    for episode in meta.episodes:
        expected.setdefault(episode.table, []).append((episode.index, episode.length))
    known, wrong = {episode.index for episode in meta.episodes}, {episode.index for episode in unplaced}
    files = {e.table for e in unplaced} | {run.file for run in runs if run.episode not in known or run.episode in wrong}
    problems = []
    for file in sorted(files & listed):
        own = [run for run in runs if run.file == file]
        numbers = np.repeat([run.episode for run in own], [run.length for run in own])
        count = sum(length for _, length in expected.get(file, ()))
        if len(numbers) != count:
            problems.append(f"{file} has {len(numbers)} rows, its episodes have {count} according to meta.")
            continue
        listed_here = expected.get(file, [])
        wanted = np.repeat([episode for episode, _ in listed_here], [length for _, length in listed_here])
        other = np.flatnonzero(numbers != wanted)
        if len(other):
            row = int(other[0])
            problems.append(
                f"row {row} of {file} is of episode {numbers[row]:g}, according to meta of {wanted[row]:g}."
            )
    twice = [e for e in unplaced if len([run for run in runs if run.episode == e.index]) > 1]
    if twice and not problems:
        problems.append(
            f"episode {twice[0].index} has rows at several places of the tables below {meta.folder}/data; which are "
            "right? Remove the others."
        )
    lost = [
        episode for episode in unplaced if episode.table in listed and not any(r.episode == episode.index for r in runs)
    ]
    problems += [f"episode {e.index} is listed in meta, but no table holds rows of it." for e in lost]
    return problems
