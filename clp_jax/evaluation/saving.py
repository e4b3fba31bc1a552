"""An evaluation on disk: each episode is saved when it ends, and the results are made of all that are saved.

``settings.json`` says what was asked, ``episodes.jsonl`` has a line for each episode, ``films/`` what some looked like.
``results.json`` and the pages of pictures come last: a folder without them is unfinished, and a run can go on with it.
"""

import collections
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from clp_jax.editable_json import write_json
from clp_jax.errors import InputError, blamed_on
from clp_jax.evaluation.pictures import save_film, save_page
from clp_jax.evaluation.rollouts import Episode
from clp_jax.files import parse_json, read_json_object
from clp_jax.folders import is_remote
from clp_jax.outputs import MANIFEST, append_line, resumable, whole_lines, write_manifest

_BY = "clp evaluate"
SETTINGS, EPISODES, RESULTS, FILMS = "settings.json", "episodes.jsonl", "results.json", "films"
AGAINST, COMPARISON = "against", "comparison.json"
_LONGEST = 60
"""Letters of a setting in a message."""
_SINCE = ("policy.files",)
"""Settings that earlier versions did not save: an evaluation without them is gone on with as it was."""


class Line(NamedTuple):
    """A line of ``episodes.jsonl``.

    Attributes:
      episode: without its film.
      seconds: since the line before it, or since the run began or went on.
      latencies: seconds of each answer in this time.
    """

    episode: Episode
    seconds: float
    latencies: tuple[float, ...]


class Evaluation:
    """The folder of an evaluation that this process alone writes to.

    Args:
      folder: it.
      lines: what was saved before.
    """

    def __init__(self, folder: Path, lines: Sequence[Line]):
        self.folder, self.lines = folder, list(lines)

    def missing(self, tasks: Sequence[str], episodes: int) -> list[tuple[str, int]]:
        """Task and number of each episode that is not saved, in order."""
        done = {(line.episode.task, line.episode.number) for line in self.lines}
        return [job for job in ((task, number) for task in tasks for number in range(episodes)) if job not in done]

    def add(self, line: Line) -> None:
        """Save an episode, at last its line: whoever has the line has the film."""
        if line.episode.film is not None:
            save_film(self.folder / FILMS, line.episode)
        episode = {name: value for name, value in vars(line.episode).items() if name != "film"}
        append_line(self.folder / EPISODES, episode | {"seconds": line.seconds, "latencies": line.latencies})
        self.lines.append(line._replace(episode=dataclasses.replace(line.episode, film=None)))

    def finish(self, result: Mapping[str, Any], tasks: Sequence[str]) -> None:
        """Write the pages of pictures and ``results.json``."""
        for task in tasks:
            save_page(self.folder / FILMS, task, self.folder / f"{task}.png")
        write_json(self.folder / RESULTS, result)


@contextlib.contextmanager
def evaluation(
    out: str | os.PathLike[str],
    settings: Mapping[str, Any],
    tasks: Sequence[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[Evaluation]:
    """The folder of an evaluation, until the block ends; one in which nothing was saved disappears.

    Args:
      out: a local folder; created if absent.
      settings: all that decides what the episodes are, as JSON values by name.
      tasks: of which there will be pages.
      resume: it may hold an evaluation to go on with.
      overwrite: remove the one that it holds.

    Raises:
      InputError: it is not empty and neither was said, it holds something else, or an evaluation with other settings.
    """
    if is_remote(out):
        raise InputError(f"--out {out} is an address; give a local folder, to which episodes are added one by one.")
    folder = Path(out).expanduser()
    new = not folder.exists()
    with resumable(epath.Path(folder), by=_BY, what=f"evaluating into {folder}", resume=resume, overwrite=overwrite):
        if any(child.name != MANIFEST for child in folder.iterdir()):
            _check_same(folder, settings)
        else:
            write_json(folder / SETTINGS, settings)
        pages = [f"{task}{kind}.png" for task in tasks for kind in ("", f"-{AGAINST}")]
        held = [SETTINGS, EPISODES, RESULTS, FILMS, AGAINST, COMPARISON, *pages]
        write_manifest(epath.Path(folder), holds=sorted({*held, *(child.name for child in folder.iterdir())}))
        found = Evaluation(folder, read_lines(folder / EPISODES))
        try:
            yield found
        finally:
            if not found.lines:
                shutil.rmtree(folder / FILMS, ignore_errors=True)
                for name in (SETTINGS, EPISODES, MANIFEST):
                    (folder / name).unlink(missing_ok=True)
                if new:
                    folder.rmdir()


def read_lines(file: Path) -> list[Line]:
    """The saved episodes; a last line that was cut off is taken away.

    Raises:
      InputError: a line is damaged, or an episode is there twice.
    """
    lines = [_line(text, f"{file}, line {number}") for number, text in enumerate(whole_lines(file), 1)]
    jobs = collections.Counter((line.episode.task, line.episode.number) for line in lines)
    twice = [f"{task} {number}" for (task, number), count in jobs.items() if count > 1]
    if twice:
        raise InputError(f"{file} has episode {twice[0]} twice; remove one of the lines.")
    return lines


def _line(text: bytes, where: str) -> Line:
    todo = "remove the line, and the episode will be played again"
    with blamed_on(where, todo):
        value = parse_json(text, where, todo=todo)
        latencies, seconds = tuple(map(float, value.pop("latencies"))), float(value.pop("seconds"))
        return Line(Episode(**value), seconds, latencies)


def _check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise unless the evaluation in a folder was asked with these settings."""
    if not (folder / SETTINGS).exists():
        raise InputError(f"{folder} has no {SETTINGS}, so it cannot be gone on with; choose another --out.")
    before, now = read_json_object(folder / SETTINGS), json.loads(json.dumps(settings))
    changed = differences(before, {name: now[name] for name in now if name in before or name not in _SINCE})
    if changed:
        raise InputError(f"--resume goes on with the same settings: {'; '.join(changed)}. Or begin in another --out.")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not the same in both, in words."""
    return [
        f"{name} was {_shown(before.get(name))}, is {_shown(now.get(name))}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
