"""Progress: a bar on a terminal, plain lines elsewhere, and the same items either way."""

from io import StringIO

import pytest
from rich.console import Console

from clp_jax.cli import main
from clp_jax.distributed import DistributedFlags, join
from clp_jax.progress import _HEARD, SECONDS_BETWEEN_LINES, heard, progress, stage, track, track_stage


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(console: Console, clock: Clock, *, seconds: float, steps: int, total: int | None) -> None:
    with progress("calibration", total=total, unit="batches", console=console, clock=clock) as advance:
        for _ in range(steps):
            clock.now += seconds
            advance(1)


def plain() -> Console:
    return Console(file=StringIO(), force_terminal=False, width=40)


def written(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_without_a_terminal_there_is_a_line_every_few_seconds_and_one_at_the_end():
    console = plain()
    run(console, Clock(), seconds=SECONDS_BETWEEN_LINES / 2, steps=5, total=5)
    assert written(console).splitlines() == [
        "calibration: 2/5 batches, 0.4 batches/s, 0:00:08 left",
        "calibration: 4/5 batches, 0.4 batches/s, 0:00:02 left",
        "calibration: 5/5 batches, done in 0:00:12",
    ]


def test_without_a_total_no_time_left_is_made_up():
    console = plain()
    run(console, Clock(), seconds=SECONDS_BETWEEN_LINES, steps=2, total=None)
    assert written(console).splitlines() == [
        "calibration: 1 batches, 0.2 batches/s",
        "calibration: 2 batches, 0.2 batches/s",
        "calibration: 2 batches, done in 0:00:10",
    ]


def test_failed_work_is_not_reported_as_done():
    console = plain()
    with pytest.raises(ZeroDivisionError), progress("work", total=2, unit="steps", console=console) as advance:
        advance(1 // 0)
    assert written(console) == ""


def test_on_a_terminal_the_bar_shows_count_rate_and_time_left():
    console = Console(
        file=StringIO(), force_terminal=True, force_interactive=True, width=120, _environ={"TERM": "xterm"}
    )
    clock = Clock()
    with progress("calibration", total=4, unit="batches", console=console, clock=clock) as advance:
        for _ in range(2):
            clock.now += 2.0
            advance(1)
    assert all(words in written(console) for words in ("calibration", "2/4", "0.5 batches/s", "0:00:04"))


def test_stages_of_the_library_are_silent_unless_a_command_is_heard_and_shows_nothing_itself(monkeypatch, capsys):
    monkeypatch.setattr("clp_jax.progress.SECONDS_BETWEEN_LINES", 0.0)

    def library() -> None:
        assert list(track_stage([1, 2], "inside", unit="parts")) == [1, 2]

    library()
    assert capsys.readouterr().err == ""
    with heard():
        library()
        assert capsys.readouterr().err.splitlines()[-1] == "inside: 2/2 parts, done in 0:00:00"
        with progress("outside", total=1, unit="steps"):
            library()
        assert "inside" not in capsys.readouterr().err
        library()
        assert "inside" in capsys.readouterr().err
    library()
    assert capsys.readouterr().err == ""


def test_of_several_processes_only_the_first_shows_stages(monkeypatch, capsys):
    monkeypatch.setattr("clp_jax.progress.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("jax.distributed.initialize", lambda *_: None)
    for number, shown in ((0, True), (1, False)):
        monkeypatch.setattr("jax.process_index", lambda number=number: number)
        with heard():
            join(DistributedFlags(distributed=True))
            assert list(track_stage([1, 2], "inside", unit="parts")) == [1, 2]
        assert ("inside" in capsys.readouterr().err) is shown


def test_a_short_stage_leaves_no_line(capsys):
    with heard(), stage("reading", total=None, unit="MB") as advance:
        advance(4)
    assert capsys.readouterr().err == ""


def test_a_command_is_heard(monkeypatch):
    seen = []
    monkeypatch.setattr("clp_jax.commands.inspect.run", lambda _: seen.append(_HEARD.get()))
    assert main(["inspect", "x"]) == 0
    assert seen == [True] and not _HEARD.get()


@pytest.mark.parametrize("items", [[3, 1, 2], iter([3, 1, 2])], ids=["sized", "unsized"])
def test_track_passes_the_items_on_in_order(capsys, items):
    assert list(track(items, "calibration", unit="batches")) == [3, 1, 2]
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert "3 batches, done in 0:00:00" in stderr or "3/3 batches, done in 0:00:00" in stderr
