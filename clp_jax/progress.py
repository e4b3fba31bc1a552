"""Progress of long work: a bar with rate and time left on a terminal, else one plain line every few seconds.

`progress` and `track` are for commands. `stage` and `track_stage` are for work inside the library, which is silent
unless a command is `heard`, and where something around it shows its own progress.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

SECONDS_BETWEEN_LINES = 5.0

_HEARD: ContextVar[bool] = ContextVar("heard", default=False)
"""Whether stages are shown."""

T = TypeVar("T")


def track(items: Iterable[T], label: str, *, unit: str, total: int | None = None) -> Iterator[T]:
    """Passes the items on and shows how many are done.

    Args:
      items: what is worked through; an item counts as done when the next one is asked for.
      label: the work, as a user would call it, for example ``"calibration"``.
      unit: the items, in the plural, for example ``"batches"``.
      total: how many items there are; ``None`` takes ``len(items)``, and shows no time left where there is none.

    Yields:
      The items, in order.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(label, total=total, unit=unit) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def progress(
    label: str,
    *,
    total: int | None,
    unit: str,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
    passing: bool = False,
) -> Iterator[Callable[[int], None]]:
    """Shows the progress of work that has no iterator, or advances by more than one.

    JAX computes asynchronously: advance after a result was waited for, or the rate is that of the dispatch.

    Args:
      label: the work, as a user would call it.
      total: what the sum of all advances will be, or ``None`` where nobody knows.
      unit: what is counted, in the plural.
      console: where to show it; ``None`` is standard error, so that standard output stays a command's result.
      clock: seconds, from any origin.
      passing: leave nothing behind of work that was too short for a line, and no bar.

    Yields:
      A function that takes how much more is done.
    """
    console = console or Console(stderr=True)
    heard = _HEARD.get()
    _HEARD.set(False)  # a terminal has room for one
    try:
        with _shown(label, total, unit, console, clock, passing=passing) as advance:
            yield advance
    finally:
        _HEARD.set(heard)


@contextmanager
def heard() -> Iterator[None]:
    """Lets the stages of the library be seen while the block runs."""
    before = _HEARD.get()
    _HEARD.set(True)
    try:
        yield
    finally:
        _HEARD.set(before)


def hush() -> None:
    """Lets no more stages be seen, until the block of `heard` ends: of several processes only the first talks."""
    _HEARD.set(False)


@contextmanager
def stage(label: str, *, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """As `progress`, for a part of the library's work that may be short: shown to who runs a command."""
    if not _HEARD.get():
        yield lambda _: None
        return
    with progress(label, total=total, unit=unit, passing=True) as advance:
        yield advance


def track_stage(items: Sequence[T], label: str, *, unit: str) -> Iterator[T]:
    """As `track`, for a part of the library's work."""
    with stage(label, total=len(items), unit=unit) as advance:
        for item in items:
            yield item
            advance(1)


def in_megabytes(advance: Callable[[int], None]) -> Callable[[int], None]:
    """For work that is counted in MB and done in bytes.

    >>> shown = []
    >>> advance = in_megabytes(shown.append)
    >>> for size in (900_000, 200_000, 2_900_000):
    ...     advance(size)
    >>> shown
    [0, 1, 3]
    """
    done = 0

    def add(size: int) -> None:
        nonlocal done
        advance((done + size) // 10**6 - done // 10**6)
        done += size

    return add


@contextmanager
def _shown(
    label: str, total: int | None, unit: str, console: Console, clock: Callable[[], float], *, passing: bool
) -> Iterator[Callable[[int], None]]:
    if console.is_interactive:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=console, get_time=clock, transient=passing) as bar:
            task = bar.add_task(label, total=total)
            yield lambda more: bar.advance(task, more)
    else:
        lines = _Lines(label, total, unit, console, clock)
        yield lines.advance
        if lines.has_printed or not passing:
            lines.finish()


class _Rate(ProgressColumn):
    """The column ``3.1 batches/s``."""

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g} {self.unit}/s")


@dataclass
class _Lines:
    """Plain lines, the last one when the work is done; none when it fails."""

    label: str
    total: int | None
    unit: str
    console: Console
    clock: Callable[[], float]
    done: int = 0
    has_printed: bool = False
    start: float = field(init=False)
    last_line: float = field(init=False)

    def __post_init__(self):
        self.start = self.last_line = self.clock()

    def advance(self, more: int) -> None:
        self.done += more
        now = self.clock()
        if now - self.last_line < SECONDS_BETWEEN_LINES:
            return
        self.last_line, self.has_printed = now, True
        elapsed = now - self.start
        rate = self.done / elapsed
        left = "" if self.total is None or not self.done else f", {_clock(elapsed * (self.total / self.done - 1))} left"
        self._print(f"{rate:.3g} {self.unit}/s{left}")

    def finish(self) -> None:
        elapsed = self.clock() - self.start
        self._print(f"done in {_clock(elapsed)}")

    def _print(self, text: str) -> None:
        count = self.done if self.total is None else f"{self.done}/{self.total}"
        self.console.print(f"{self.label}: {count} {self.unit}, {text}", soft_wrap=True, highlight=False, markup=False)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
