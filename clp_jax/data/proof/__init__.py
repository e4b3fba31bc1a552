"""A data set proven before it is used: tables in one pass, videos by their indices, pictures by check sums.

findings   what a proof says
rows       order, times and tasks of rows
videos     frames against rows
stills     pictures in tables
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

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
        chosen, missing = _cameras_here(folder, features, episodes, cameras)
        meta = read_meta(folder, chosen, episodes=episodes)
    except InputError as error:
        reason = "it is found by what meta says, which has to be repaired first."
        return (
            Check("meta", str(source), (Finding(str(error)),)),
            *(Check(name, "", unmade=reason) for name in ("tables", "order of rows", "timestamps", "tasks", "cameras")),
        )
    data = LeRobotData(meta, tolerance=tolerance)
    if columns is None:
        columns = [key for key in data.column_names() if str(features.get(key, {}).get("dtype")).startswith("float")]
        columns = [key for key in columns if key not in COUNTERS]
    there = [key for key in columns if key in features]
    checks = list(_checks(data, there, chosen, task, tolerance, picture_bytes=None, texts=prompt is None))
    absent = [key for key in (*columns, *(cameras or ())) if key not in features]
    if absent:
        listed = ", ".join(f"{key} ({described(feature)})" for key, feature in features.items())
        text = f"{source} has no {', '.join(absent)}; it has {listed}."
        checks.insert(0, Check("names", f"{len(columns)} columns, {len(cameras or ())} cameras", (Finding(text),)))
    if missing and cameras is None:
        notes = [Finding(f"{key} was not checked: {reason}", fatal=False) for key, reason in missing.items()]
        checks.append(Check("other cameras", str(len(notes)), tuple(notes)))
    elif missing:
        checks += [Check(f"camera {key}", "", (Finding(reason),)) for key, reason in missing.items()]
    return tuple(checks)


def _cameras_here(
    folder: os.PathLike[str],
    features: Mapping[str, Mapping],
    episodes: str | None,
    cameras: Sequence[str] | None,
) -> tuple[list[str], dict[str, str]]:
    """Those of some cameras, or of all, that can be read, and why each of the others cannot: it may not be fetched."""
    chosen, missing = [], {}
    for key, feature in features.items():
        if feature.get("dtype") not in ("video", "image") if cameras is None else key not in cameras:
            continue
        try:
            read_meta(folder, [key], episodes=episodes)
            chosen.append(key)
        except InputError as error:
            missing[key] = str(error)
    return chosen, missing


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
    problems = data.read([*columns, "timestamp", task], optional=row_checks.COUNTS)
    found = (*map(Finding, problems), *(Finding(note, fatal=False) for note in data.notes))
    yield Check("tables", f"{len(data):,} rows, columns {', '.join(columns)}", limited(found))
    yield _order(data, broken=bool(problems))
    yield _on_rows(
        data,
        "timestamps",
        "timestamp",
        lambda rows: Check("timestamps", f"{meta.fps:g} fps", limited(row_checks.timestamps(meta, rows, tolerance))),
    )
    yield _on_rows(data, "tasks", task, lambda rows: _tasks(data, rows, task, texts=texts))
    for key in cameras:
        if meta.features[key].get("dtype") == "video":
            yield _on_rows(data, f"camera {key}", "timestamp", lambda rows, key=key: check_videos(data, rows, key))
        else:
            yield _on_rows(
                data,
                f"camera {key}",
                "episode_index",
                lambda rows, key=key: check_stills(data, rows, key, most_bytes=picture_bytes),
            )


def _on_rows(data: LeRobotData, name: str, column: str, check: Callable[[Rows], Check]) -> Check:
    """A check of those rows that have a readable value in a column; what is wrong with other columns is no matter."""
    rows = data.rows(column)
    if not len(rows.ends):
        return Check(name, "", unmade=f"no table has a column {column} that can be read and fits the list of episodes.")
    made, left = check(rows), _left(data, rows, column)
    return dataclasses.replace(made, findings=(*made.findings, *left))


def _left(data: LeRobotData, rows: Rows, column: str) -> tuple[Finding, ...]:
    """What is to be said of rows that a check could not look at."""
    missing = len(data) - int(rows.ends[-1])
    if not missing:
        return ()
    rows_left = f"{missing:,} of {len(data):,} rows were not checked"
    reason = f"their {column} cannot be read, or their table does not fit the list of episodes."
    return (Finding(f"{rows_left}: {reason}", fatal=False),)


def _order(data: LeRobotData, *, broken: bool) -> Check:
    """Whether those columns count that there are; ``broken`` if one of them may be there and be unreadable."""
    found, count = [], 0
    for key in row_checks.COUNTS:
        rows = data.rows(key)
        if len(rows.ends):
            count = max(count, int(rows.ends[-1]))
            found += [*row_checks.counters(data.meta, rows, key), *_left(data, rows, key)]
        elif broken:
            found.append(Finding(f"no table has a column {key} that can be read; it was not checked.", fatal=False))
        else:
            text = f"the tables have no column {key}; the order of the rows is taken as it is."
            found.append(Finding(text, fatal=False))
    if broken and not count:
        columns = " or ".join(row_checks.COUNTS)
        return Check("order of rows", "", unmade=f"no table has a column {columns} that can be read.")
    return Check("order of rows", f"{count or len(data):,} rows", limited(found))


def _tasks(data: LeRobotData, rows: Rows, key: str, *, texts: bool) -> Check:
    meta = data.meta
    found = [*row_checks.tasks(meta, rows, key), *row_checks.other_tasks(meta, rows, key)]
    found += row_checks.nameless_tasks(meta, rows, key) if texts else ()
    return Check("tasks", f"{len(meta.tasks):,} texts", limited(found))
