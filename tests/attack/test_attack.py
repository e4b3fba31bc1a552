"""The short form of ``make attack``: a few attacks on every target, the same in every run."""

import faulthandler
from pathlib import Path

import pytest
from attack.messages import served_policies, sound_request
from attack.running import OK, REFUSED, SECONDS, attack, prove
from attack.targets import targets

pytestmark = pytest.mark.slow

ROUNDS = 2
SLOW = {"messages", "export-record", "race-prune", "race-export", "race-analyse", "race-finetune", "killed-finetune"}
"""They compile a model for every attack or before the first, or start processes."""
NAMES = sorted(targets(Path()).keys() - SLOW)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sources")


def test_the_requests_that_are_damaged_are_sound_before():
    for policy in served_policies():
        policy.prepare(sound_request(policy))


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_answered_in_one_line_or_does_no_harm(tmp_path, sources, name):
    target = targets(sources)[name]()
    prove(target, tmp_path / "clean")
    faulthandler.dump_traceback_later(10 * SECONDS, exit=True)
    for number in range(ROUNDS):
        found = attack(target, f"{name} test {number}", tmp_path / f"{number}")
        assert found.outcome in (OK, REFUSED), f"{found.how}: {found.outcome}: {found.message}"
    faulthandler.cancel_dump_traceback_later()
