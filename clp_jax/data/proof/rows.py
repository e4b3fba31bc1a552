"""Rows proven by their counters: order, completeness, times, tasks."""

from collections.abc import Iterator

import numpy as np

from clp_jax.data.lerobot import Rows
from clp_jax.data.lerobot_meta import Meta
from clp_jax.data.proof.findings import Finding, first_of_each

_LEROBOT_TOLERANCE = 1e-4
"""Seconds by which lerobot lets two neighbouring rows differ from one period."""
_SHARE_OF_PERIOD = 0.01
"""The same as a share of a period: at 10 rows a second clocks are read less exactly than at 100."""


def timestamp_tolerance(fps: float) -> float:
    """Seconds by which the time between two rows may differ from one period: lerobot's, or 1 % of the period if more.

    >>> timestamp_tolerance(10.0), timestamp_tolerance(200.0)
    (0.001, 0.0001)
    """
    return max(_LEROBOT_TOLERANCE, _SHARE_OF_PERIOD / fps)


def totals(meta: Meta) -> Iterator[Finding]:
    """Lost or unlisted episodes: the counts of info.json against the list of episodes."""
    listed = (*meta.episodes, *meta.left_out)
    found = {"total_episodes": len(listed), "total_frames": sum(e.length for e in listed)}
    for name, count in found.items():
        if name in meta.totals and meta.totals[name] != count:
            yield Finding(
                f"{meta.folder}/meta/info.json says {name} {meta.totals[name]!r}, the list of episodes has {count}: "
                "lines were lost, or info.json was not updated; repair the one that is wrong."
            )
    if meta.totals.get("total_tasks", len(meta.tasks)) != len(meta.tasks):
        count = meta.totals["total_tasks"]
        yield Finding(f"info.json says total_tasks {count!r}, the list of tasks has {len(meta.tasks)}.", fatal=False)
    tables = {episode.table for episode in listed}
    if len(tables) == len(listed) > 1:  # a file an episode
        others = [file for folder in {file.parent for file in tables} for file in folder.glob("episode_*.parquet")]
        unlisted = sorted(file for file in others if file not in tables)
        if unlisted:
            yield Finding(
                f"{len(unlisted)} tables are of no listed episode and stay unread: {unlisted[0]}", fatal=False
            )


COUNTS = ("frame_index", "index")
"""Columns that count the rows of an episode and of all; a data set may lack them."""


def counters(meta: Meta, rows: Rows, key: str) -> Iterator[Finding]:
    """A column of `COUNTS` must count the rows, in the order in which they are stored."""
    values, owner, inside = rows.columns[key][:, 0], _owners(rows), _inside(rows)
    bad = np.flatnonzero((np.diff(values, prepend=0) != 1) & (inside > 0))
    for episode, row, count in first_of_each(owner, bad):
        yield Finding(
            f"{_where(rows, episode, row)}: {key} goes from {values[row - 1]:g} to {values[row]:g}{_more(count)}; "
            "rows are missing, out of order or of another take."
        )
    starts = _starts(rows)
    yield from _frame_starts(rows, values[starts]) if key == "frame_index" else _index_starts(meta, rows, values)


def timestamps(meta: Meta, rows: Rows, tolerance: float | None) -> Iterator[Finding]:
    """Times must grow by one period from row to row of an episode."""
    values, period = rows.columns["timestamp"][:, 0], 1 / meta.fps
    allowed = timestamp_tolerance(meta.fps) if tolerance is None else tolerance
    rounding = 2 * np.spacing(np.abs(values).astype(np.float32)).astype(np.float64)
    steps = np.diff(values.astype(np.float64), prepend=0)
    bad = np.flatnonzero((np.abs(steps - period) > allowed + rounding) & (_inside(rows) > 0))
    for episode, row, count in first_of_each(_owners(rows), bad):
        yield Finding(
            f"{_where(rows, episode, row)}: timestamp goes from {values[row - 1]:.6g} to {values[row]:.6g} s"
            f"{_more(count)}; at {meta.fps:g} fps it must grow by {period:.6g} s, give or take {allowed:.2g} s. Repair "
            "the times, split the episode where a new take begins, or allow a larger tolerance."
        )
    late = np.flatnonzero(np.abs(values[_starts(rows)]) > allowed)
    if len(late):
        episode = rows.episodes[late[0]].index
        yield Finding(
            f"{len(late)} episodes begin at another time than 0, first episode {episode} at "
            f"{values[_starts(rows)[late[0]]]:.6g} s.",
            fatal=False,
        )


def tasks(meta: Meta, rows: Rows, key: str) -> Iterator[Finding]:
    """Every row's task must be in the list of tasks, with or without a text."""
    values = rows.columns[key][:, 0]
    known = np.array(sorted(meta.tasks), np.float64)
    bad = np.flatnonzero(~np.isin(values, known)) if len(known) else np.flatnonzero((values < 0) | (values % 1 != 0))
    for episode, row, count in first_of_each(_owners(rows), bad):
        listed = f"{len(known)} tasks, {known[0]:g} to {known[-1]:g}" if len(known) else "none"
        yield Finding(f"{_where(rows, episode, row)}: {key} is {values[row]:g}{_more(count)}, the list has {listed}.")


def other_tasks(meta: Meta, rows: Rows, key: str) -> Iterator[Finding]:
    """Episodes whose rows name other tasks than the list of episodes does; training reads the rows."""
    if key != "task_index":
        return
    starts = _starts(rows)
    for episode, start, end in zip(rows.episodes, starts, rows.ends, strict=True):
        numbers = np.unique(rows.columns[key][start:end, 0])
        texts = {meta.tasks.get(int(number)) for number in numbers.tolist()}
        if episode.tasks and None not in texts and texts != episode.tasks:
            told, listed = (", ".join(map(repr, sorted(some))) for some in (texts, episode.tasks))
            yield Finding(
                f"the rows of episode {episode.index} have the task {told}, which is used; "
                f"meta/episodes lists {listed}.",
                fatal=False,
            )


def nameless_tasks(meta: Meta, rows: Rows, key: str) -> Iterator[Finding]:
    """Tasks that occur and have no text."""
    for number in np.unique(rows.columns[key][:, 0].astype(np.int64)).tolist():
        if not meta.tasks.get(number):
            yield Finding(f"the data set has no text for task {number}; give --prompt, or write it into meta/tasks.")


def _frame_starts(rows: Rows, firsts: np.ndarray) -> Iterator[Finding]:
    late = np.flatnonzero(firsts != 0)
    if len(late):
        episode = rows.episodes[late[0]].index
        yield Finding(
            f"frame_index of {len(late)} episodes does not begin at 0, first that of episode {episode} at "
            f"{firsts[late[0]]:g}.",
            fatal=False,
        )


def _index_starts(meta: Meta, rows: Rows, values: np.ndarray) -> Iterator[Finding]:
    """Between episodes ``index`` may leave out numbers, as where episodes were removed, but must not come back."""
    starts = _starts(rows)
    firsts, lasts = values[starts], values[rows.ends - 1]
    bad = np.flatnonzero(firsts[1:] <= lasts[:-1]) + 1
    for episode in bad.tolist():
        yield Finding(
            f"{_where(rows, episode, int(starts[episode]))}: index goes from {lasts[episode - 1]:g} back to "
            f"{firsts[episode]:g}; every row of the data set needs a number of its own."
        )
    for episode, number in zip(rows.episodes, firsts.tolist(), strict=True):
        if episode.first is not None and number != episode.first:
            yield Finding(
                f"episode {episode.index} begins with index {number:g}, according to meta with {episode.first}."
            )
            return
    gaps = int((firsts[1:] > lasts[:-1] + 1).sum()) + int(len(firsts) > 0 and firsts[0] != 0)
    if gaps and not len(bad) and len(rows.episodes) == len(meta.episodes) and not meta.left_out:
        yield Finding(f"index leaves out numbers at {gaps} places between episodes.", fatal=False)


def _owners(rows: Rows) -> np.ndarray:
    """Position of the episode of each row."""
    return np.repeat(np.arange(len(rows.ends)), np.diff(rows.ends, prepend=0))


def _starts(rows: Rows) -> np.ndarray:
    return rows.ends - np.diff(rows.ends, prepend=0)


def _inside(rows: Rows) -> np.ndarray:
    """Number of each row in its episode."""
    return np.arange(rows.ends[-1]) - np.repeat(_starts(rows), np.diff(rows.ends, prepend=0))


def _where(rows: Rows, position: int, row: int) -> str:
    inside, place = row - int(_starts(rows)[position]), rows.places[position]
    return f"episode {rows.episodes[position].index}, row {inside} (row {place.row + inside} of {place.file})"


def _more(count: int) -> str:
    return f" (and {count - 1} more rows of this episode)" if count > 1 else ""
