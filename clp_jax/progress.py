"""Progress of long work: a bar with rate and time left on a terminal, else one plain line every few seconds."""

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

SECONDS_BETWEEN_LINES = 5.0

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
) -> Iterator[Callable[[int], None]]:
    """Shows the progress of work that has no iterator, or advances by more than one.

    JAX computes asynchronously: advance after a result was waited for, or the rate is that of the dispatch.

    Args:
      label: the work, as a user would call it.
      total: what the sum of all advances will be, or ``None`` where nobody knows.
      unit: what is counted, in the plural.
      console: where to show it; ``None`` is standard error, so that standard output stays a command's result.
      clock: seconds, from any origin.

    Yields:
      A function that takes how much more is done.
    """
    console = console or Console(stderr=True)
    if console.is_interactive:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=console, get_time=clock) as bar:
            task = bar.add_task(label, total=total)
            yield lambda more: bar.advance(task, more)
    else:
        lines = _Lines(label, total, unit, console, clock)
        yield lines.advance
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
    start: float = field(init=False)
    last_line: float = field(init=False)

    def __post_init__(self):
        self.start = self.last_line = self.clock()

    def advance(self, more: int) -> None:
        self.done += more
        now = self.clock()
        if now - self.last_line < SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
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
