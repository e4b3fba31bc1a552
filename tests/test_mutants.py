"""The deliberate faults apply to today's code, and the program that tries them tells what becomes of each."""

import ast
import collections
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mutants
from mutants.faults import MUTANTS
from mutants.mutant import Mutant, StaleError, faults
from mutants.running import copy_tracked, judge_all

ROOT = Path(mutants.__file__).parent.parent


def test_every_fault_has_a_name_of_its_own():
    assert [name for name, times in collections.Counter(mutant.name for mutant in MUTANTS).items() if times > 1] == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_fault_applies_to_the_code_and_its_tests_are_there(mutant):
    source = (ROOT / mutant.file).read_text()
    assert source.count(mutant.text) == 1, f"{mutant.text!r} occurs {source.count(mutant.text)} times in {mutant.file}"
    assert mutant.replacement != mutant.text
    ast.parse(source.replace(mutant.text, mutant.replacement))
    for test in (test for test in mutant.tests if test.startswith("tests/")):
        file, _, name = test.partition("::")
        found = (ROOT / file).read_text()
        assert re.search(rf"^def {re.escape(name.split('[')[0])}\(", found, re.MULTILINE) or not name, test


@pytest.fixture
def repository(tmp_path):
    """A repository of one function and one test of it, with a file that git does not track."""
    root = tmp_path / "repository"
    (root / "tests").mkdir(parents=True)
    (root / "sums.py").write_text("def add(a, b, unread=1):\n    return a + b\n")
    (root / "tests" / "test_sums.py").write_text(
        "import sums\n\n\ndef test_add():\n    assert sums.add(1, 2) == 3\n\n\ndef test_other():\n    pass\n"
    )
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=root, check=True)
    (root / "untracked.txt").write_text("")
    return root


@pytest.mark.slow
def test_a_fault_is_killed_or_survives_or_is_stale_and_the_source_stays(repository, tmp_path):
    clean, before = tmp_path / "clean", (repository / "sums.py").read_text()
    copy_tracked(repository, clean)
    assert not (clean / "untracked.txt").exists()
    chosen = [
        *faults("sums.py", "tests/test_sums.py", ("sign", "a + b", "a - b"), ("unread", "unread=1", "unread=2")),
        *faults("sums.py", "tests/test_sums.py", ("gone", "a * b", "a"), ("twice", "a", "b")),
        *faults("sums.py", "tests/test_sums.py::test_gone", ("test-is-gone", "a + b", "a - b")),
        *faults("sums.py", "tests/test_sums.py::test_other", ("other-test", "a + b", "a - b")),
    ]
    outcomes = {one.mutant.name: one for one in judge_all(chosen, clean, tmp_path / "scratch", jobs=2)}
    assert {name: one.verdict for name, one in outcomes.items()} == {
        "sign": "killed",
        "unread": "SURVIVED",
        "gone": "STALE",
        "twice": "STALE",
        "test-is-gone": "STALE",
        "other-test": "SURVIVED",
    }
    assert outcomes["gone"].detail == "its text occurs 0 times in sums.py"
    assert (repository / "sums.py").read_text() == (clean / "sums.py").read_text() == before
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_file_that_is_gone_makes_a_fault_stale(tmp_path):
    with pytest.raises(StaleError, match=r"occurs 0 times in gone\.py"):
        Mutant("x", "gone.py", "a", "b", ()).apply(tmp_path)


def test_command_lists_faults_and_refuses_names_that_there_are_not():
    def run(*args):
        command = [sys.executable, "-m", "mutants", *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    listed = run("--list", "fast-*")
    assert listed.returncode == 0
    assert "fast-slot" in listed.stdout
    assert "ema-one-step-late" not in listed.stdout
    refused = run("fats-slot")
    assert (refused.returncode, refused.stderr.strip()) == (2, "error: no fault is named fats-slot; --list names all.")
