"""The page of the study says what its committed results say."""

import json
from pathlib import Path

import pytest

from studies.metaworld import page

FOLDER = Path(page.__file__).parent


@pytest.fixture(scope="module")
def found():
    return json.loads((FOLDER / "results.json").read_text())


def test_every_number_of_the_page_comes_from_the_results(found):
    pytest.importorskip("scipy", reason="needs scipy")
    assert page.text(found) == (FOLDER / "RESULTS.md").read_text()


def test_pairs_are_the_same_starts():
    """Two tasks' worth of starts: the arm gains one, loses one, gains one."""
    tasks = page.protocol.NEW_TASKS

    def run(name, seed, loss, *solved):
        numbers = dict(zip(tasks, solved, strict=True))
        return {"regime": "scarce", "name": name, "seed": seed, "episodes": 2, "solved": numbers, "held_out_loss": loss}

    found = {
        "arms": {"9": {"clp": "a", "other": "b"}},
        "runs": [
            run("a", 0, {"9": 0.2}, [0], [0], [], [1]),
            run("b", 0, {"0": 0.9, "9": 0.1}, [0, 1], [], [1], [1]),
            run("b", 1, {"9": 7.0}, [0, 1], [0, 1], [0, 1], [0, 1]),
        ],
    }
    difference, low, high = page.paired_success(found, "other", "clp")
    assert difference == 1 / 8 and low < difference < high
    assert page.paired_loss(found, "other", "clp", "scarce", 9) == pytest.approx(0.5)
    assert page.paired_loss(found, "none", "clp", "scarce", 9) is None
