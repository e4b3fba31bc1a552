"""A data set proven before it is used: tables in one pass, videos by their indices, pictures by check sums.

findings   what a proof says
rows       order, times and tasks of rows
videos     frames against rows
stills     pictures in tables
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence

from clp_jax.data.lerobot import COUNTERS, LeRobotData, Rows
from clp_jax.data.lerobot_meta import described, find_folder, read_meta
from clp_jax.data.proof import rows as row_checks
from clp_jax.data.proof.findings import Check, Finding, limited
from clp_jax.data.proof.stills import check_stills
from clp_jax.data.proof.videos import check_videos
from clp_jax.errors import InputError

_PICTURE_BYTES = 2 * 2**30
"""Of the pictures in tables so much is read at most before training begins; `check_set` reads all."""


@dataclasses.dataclass(frozen=True)
class Proof:
    """What is known of a proven data set.

    Attributes:
      notes: what is odd and may be meant so, one sentence each, for the user to see.
      pictures: identity of the videos or pictures of each camera that was read.
      sizes: heights and widths of the pictures of each camera that was read.
    """

    notes: tuple[str, ...]
    pictures: Mapping[str, str]
    sizes: Mapping[str, frozenset[tuple[int, int]]]


def prove(
    data: LeRobotData,
    *,
    columns: Sequence[str],
    cameras: Sequence[str] = (),
    task: str = "task_index",
    tolerance: float | None = None,
) -> Proof:
    """Proves that rows, times and pictures of a data set are whole and belong together.

    Args:
      data: the data set, opened with the same cameras.
      columns: vectors that will be read: those of state and actions.
      cameras: keys of the cameras that will be read; nothing is asked about others.
      task: key of the column with the number of each row's task.
      tolerance: seconds by which the time between two rows may differ from one period; `timestamp_tolerance` if None.

    Raises:
      InputError: the first thing that must be repaired, with episode, row and file.
    """
    notes, digests, sizes = [], {}, {}
    for check in _checks(data, columns, cameras, task, tolerance, picture_bytes=_PICTURE_BYTES):
        for finding in check.findings:
            if finding.fatal:
                raise InputError(finding.text)
            notes.append(finding.text)
        if check.digest is not None:
            key = check.name.removeprefix("camera ")
            digests[key], sizes[key] = check.digest, check.sizes
    return Proof(tuple(notes), digests, sizes)


def check_set(
    source: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    cameras: Sequence[str] | None = None,
    task: str = "task_index",
    episodes: str | None = None,
    prompt: str | None = None,
    tolerance: float | None = None,
) -> tuple[Check, ...]:
    """Everything that is wrong or odd in a data set, all pictures included.

    Args:
      source: folder or hub id.
      columns: vectors to prove; all vectors of decimal numbers that the tables have if None.
      cameras: keys of cameras to prove; all whose files are here if None.
      task: as for `prove`.
      episodes: which to keep or leave out, as `episodes.chosen` reads it.
      prompt: stands in for the texts of tasks.
      tolerance: as for `prove`.
    """
    folder = find_folder(source)
    try:
        meta = read_meta(folder, (), episodes=episodes)
        features = meta.features
        absent = [key for key in [*(columns or ()), *(cameras or ())] if key not in features]
        if absent:
            listed = ", ".join(f"{key} ({described(feature)})" for key, feature in features.items())
            raise InputError(f"{source} has no {', '.join(absent)}; it has {listed}.")
        notes, chosen = [], list(cameras or ())
        if cameras is None:
            chosen, notes = _cameras_here(folder, features, episodes)
        meta = read_meta(folder, chosen, episodes=episodes)
    except InputError as error:
        return (Check("meta", str(source), (Finding(str(error)),)),)
    data = LeRobotData(meta, tolerance=tolerance)
    if columns is None:
        columns = [key for key in data.column_names() if str(features.get(key, {}).get("dtype")).startswith("float")]
        columns = [key for key in columns if key not in COUNTERS]
    checks = list(_checks(data, columns, chosen, task, tolerance, picture_bytes=None, texts=prompt is None))
    return (*checks, *([Check("other cameras", str(len(notes)), tuple(notes))] if notes else ()))


def _cameras_here(
    folder: os.PathLike[str], features: Mapping[str, Mapping], episodes: str | None
) -> tuple[list[str], list[Finding]]:
    """Cameras that can be read, and a note about each of the others, which may not have been fetched."""
    chosen, notes = [], []
    for key, feature in features.items():
        if feature.get("dtype") not in ("video", "image"):
            continue
        try:
            read_meta(folder, [key], episodes=episodes)
            chosen.append(key)
        except InputError as error:
            notes.append(Finding(f"{key} was not checked: {error}", fatal=False))
    return chosen, notes


def _checks(
    data: LeRobotData,
    columns: Sequence[str],
    cameras: Sequence[str],
    task: str,
    tolerance: float | None,
    *,
    picture_bytes: int | None,
    texts: bool = False,
) -> Iterator[Check]:
    """One check after the other, the cheap ones first."""
    meta = data.meta
    yield Check("meta", f"{len(meta.episodes):,} episodes, {len(meta.tasks):,} tasks", limited(row_checks.totals(meta)))
    rows, problems = data.read([*columns, "timestamp", task], optional=("frame_index", "index"))
    found = (*map(Finding, problems), *(Finding(note, fatal=False) for note in data.notes))
    yield Check("tables", f"{len(data):,} rows, columns {', '.join(columns)}", limited(found))
    if not len(rows.ends):
        return
    yield Check("order of rows", f"{rows.ends[-1]:,} rows", limited(row_checks.counters(meta, rows)))
    times = limited(row_checks.timestamps(meta, rows, tolerance))
    yield Check("timestamps", f"{meta.fps:g} fps", times)
    tasks = [*row_checks.tasks(meta, rows, task), *row_checks.other_tasks(meta, rows, task)]
    tasks += row_checks.nameless_tasks(meta, rows, task) if texts else ()
    yield Check("tasks", f"{len(meta.tasks):,} texts", limited(tasks))
    for key in cameras:
        yield _camera(data, rows, key, picture_bytes)


def _camera(data: LeRobotData, rows: Rows, key: str, picture_bytes: int | None) -> Check:
    if data.meta.features[key].get("dtype") == "video":
        return check_videos(data, rows, key)
    return check_stills(data, rows, key, most_bytes=picture_bytes)
