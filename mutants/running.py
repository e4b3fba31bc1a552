"""Runs the tests of faults in throw-away copies of the repository."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from mutants.mutant import Mutant, StaleError

Verdict = Literal["killed", "SURVIVED", "STALE"]

_PASSED, _FAILED = 0, 1
"""Exit codes of pytest; the others say that it could not run the tests."""


class Outcome(NamedTuple):
    """How the tests took a fault.

    Attributes:
      mutant: the fault.
      verdict: ``killed`` if a test failed, ``SURVIVED`` if none did, ``STALE`` if the fault or its tests are not there.
      seconds: that it took.
      detail: why it is stale, or what pytest said.
    """

    mutant: Mutant
    verdict: Verdict
    seconds: float
    detail: str


def copy_tracked(root: Path, target: Path) -> None:
    """Copy the files that git tracks, as they are in the working tree, into a new folder.

    Raises:
      CalledProcessError: ``root`` is no git repository.
    """
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    for name in listed.rstrip("\0").split("\0"):
        if (root / name).is_file():  # or it was deleted, and that is not committed yet
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def run_tests(root: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit code and last lines of pytest in a copy, whose code comes before any that is installed."""
    # An exported coverage or wider search path must not lead out of the copy.
    environment = os.environ | {"PYTHONPATH": str(root), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, "\n".join(done.stdout.splitlines()[-30:])


def joined(mutants: Sequence[Mutant]) -> list[tuple[str, ...]]:
    """All tests of some faults in few runs of pytest: one, and one for each choice by ``-k``, which is of a whole run.

    >>> joined([Mutant("", "", "", "", tests) for tests in (("b", "a"), ("b", "-k", "x"), ("b",))])
    [('a', 'b'), ('b', '-k', 'x')]
    """
    chosen = {mutant.tests for mutant in mutants if "-k" in mutant.tests}
    plain = {test for mutant in mutants if "-k" not in mutant.tests for test in mutant.tests}
    return [tests for tests in (tuple(sorted(plain)), *sorted(chosen)) if tests]


def judge(mutant: Mutant, clean: Path, scratch: Path) -> Outcome:
    """Run the tests of a fault in a copy of a copy.

    Args:
      mutant: the fault.
      clean: a copy without faults, in which these tests pass; its compiled files are used again.
      scratch: folder for the copy, which is removed afterwards.
    """
    start = time.perf_counter()
    root = scratch / mutant.name
    try:
        shutil.copytree(clean, root)
        mutant.apply(root)
        code, detail = run_tests(root, mutant.tests)
        verdicts: dict[int, Verdict] = {_PASSED: "SURVIVED", _FAILED: "killed"}
        verdict = verdicts.get(code, "STALE")
    except StaleError as error:
        verdict, detail = "STALE", str(error)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return Outcome(mutant, verdict, time.perf_counter() - start, detail)


def judge_all(mutants: Sequence[Mutant], clean: Path, scratch: Path, *, jobs: int) -> Iterator[Outcome]:
    """Yields the outcome of each fault in their order, ``jobs`` of them tested at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda mutant: judge(mutant, clean, scratch), mutants)
