"""One attack: damage a copy, use it, and say what came of it."""

import contextlib
import dataclasses
import hashlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attack.mutations import copied, damage

from clp_jax import cli
from clp_jax.errors import InputError

OK, REFUSED = "ok", "refused"
TRACEBACK, HANG, HALF, SILENT = "TRACEBACK", "HANG", "HALF OUTPUT", "SILENT DIFFERENCE"
OUTCOMES = (OK, REFUSED, TRACEBACK, HANG, HALF, SILENT)
SECONDS = 20.0
"""A tiny input that takes longer hangs."""


class Hang(BaseException):
    """The time is over; nobody who catches ``Exception`` stops it."""


class Silent(Exception):
    """Damage passed for something else without a word."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What is attacked.

    Attributes:
      source: file or folder to damage copies of.
      use: uses a damaged copy, perhaps writes the given folder; raises InputError where it refuses, `Silent` where it
        should have.
      damage: damages a copy in place and says how.
      command: the words after ``clp`` that do the same, for a process of its own; None if there are none.
      whole: whether the files hold check sums: what is written must then be the same as from the undamaged copy, which
        `prove` has seen.
      seconds: after which it hangs; a process of its own has five times as long, for it begins with its imports.
      rounds: at most so many attacks, where one takes long; None for as many as are asked for.
    """

    source: Path
    use: Callable[[Path, Path], Any]
    damage: Callable[[random.Random, Path], str] = damage
    command: Callable[[Path, Path], list[str]] | None = None
    whole: bool = False
    seconds: float = SECONDS
    rounds: int | None = None


def by_command(source: Path, words: Callable[[Path, Path], list[str]], **options: Any) -> Target:
    """A target that a command line uses."""
    return Target(source, lambda damaged, out: run_command(words(damaged, out)), command=words, **options)


@dataclasses.dataclass(frozen=True)
class Attack:
    """What was done and what came of it: one of `OUTCOMES`, and the message or the traceback."""

    how: str
    outcome: str
    message: str


def attack(target: Target, seed: str, work: Path, *, as_process: bool = False) -> Attack:
    """Damages a copy as the seed says and uses it.

    Args:
      target: what is attacked.
      seed: of everything that is drawn.
      work: an empty folder.
      as_process: run the target's command in a process of its own.
    """
    rng = random.Random(seed)
    damaged, out = work / "source" / target.source.name, work / "outputs" / "out"
    damaged.parent.mkdir(parents=True)
    out.parent.mkdir()
    how = target.damage(rng, copied(target.source, damaged))
    try:
        if as_process and target.command is not None:
            _run_process(target.command(damaged, out), 5 * target.seconds)
        else:
            with time_limit(target.seconds):
                target.use(damaged, out)
        outcome, message = OK, ""
    except InputError as error:
        outcome, message = REFUSED, str(error)
    except Hang:
        outcome, message = HANG, traceback.format_exc()
    except Silent as error:
        outcome, message = SILENT, str(error)
    except BaseException:  # noqa: BLE001 - whatever escapes is what is looked for
        outcome, message = TRACEBACK, traceback.format_exc()
    left = sorted(path.name for path in out.parent.iterdir())
    if outcome == REFUSED and (left or not message.strip()):
        outcome, message = HALF, f"left {left} after: {message}"
    elif outcome == OK and left not in ([], [out.name]):
        outcome, message = HALF, f"left {left} beside the output"
    elif outcome == OK and target.whole and content_of(out) != _CLEAN[target.source]:
        outcome, message = SILENT, "what was written is not what the undamaged copy gives"
    for path in (damaged.parent, out.parent):
        shutil.rmtree(path, ignore_errors=True)
    return Attack(how, outcome, message)


def run_command(words: list[str]) -> str:
    """Runs a command line in this process and returns what it printed.

    Raises:
      InputError: it ended with an error of one line (further lines are its indented list).
      AssertionError: it ended otherwise.
    """
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = cli.main(words)
    return judged(code, stdout.getvalue(), stderr.getvalue())


def _run_process(words: list[str], seconds: float) -> str:
    command = [sys.executable, "-m", "clp_jax", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise Hang from None
    return judged(done.returncode, done.stdout, done.stderr)


def judged(code: int, stdout: str, stderr: str) -> str:
    """What a command that ended well printed.

    Raises:
      InputError: it ended with an error of one line (further lines are its indented list).
      AssertionError: it ended otherwise.
    """
    if code == 0:
        return stdout
    lines = stderr.strip().split("\n")
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    clear = code in (1, 2) and len(errors) == 1 and all(line.startswith("  ") for line in lines[errors[0] + 1 :])
    assert clear and "Traceback" not in stderr, f"exit code {code}: {stderr}"
    assert not any(name in lines[errors[0]] for name in ("Error(", "Exception(")), lines[errors[0]]
    raise InputError(lines[errors[0]])


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `Hang` in the main thread when the time is over."""

    def over(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def content_of(folder: Path) -> str:
    """A digest of the arrays that a checkpoint holds: what its readers get."""
    import numpy as np

    from clp_jax.checkpoint import read_params, read_spec
    from clp_jax.trees import flatten

    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(read_params(read_spec(folder))).items()):
        digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


_CLEAN: dict[Path, str] = {}
"""By source the digest of what the undamaged copy gives."""


def prove(target: Target, work: Path) -> None:
    """Uses the undamaged source, which must be fine, or a refusal means nothing.

    Args:
      target: to prove.
      work: a folder that does not exist.
    """
    if target.whole and target.source in _CLEAN:
        return
    work.mkdir()
    target.use(target.source, work / "out")
    if target.whole:
        _CLEAN[target.source] = content_of(work / "out")


def leave(code: int) -> None:
    """Ends the program although threads may hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
