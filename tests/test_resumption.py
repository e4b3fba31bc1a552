"""Whether a run goes on is decided by what it computes, however its flags were once recorded."""

import dataclasses

import pytest

from clp_jax.commands.finetune import _MAY_CHANGE
from clp_jax.errors import InputError
from clp_jax.models.pi0 import CONFIGURATIONS
from clp_jax.plan import PrunePlan
from clp_jax.processing.conventions import Conventions
from clp_jax.training.resumption import Entry, check_same_run


def test_a_flag_of_several_values_that_was_recorded_as_none_is_the_empty_one_of_today():
    now = Entry("a", "1", "2", None, {"action_key": ()})
    before = now.to_json() | {"config": {"action_key": None}}
    assert check_same_run(before, now, may_change=(), defaults={}) is None
    with pytest.raises(InputError, match="action_key was u, is None"):
        check_same_run(before | {"config": {"action_key": "u"}}, now, may_change=(), defaults={})
    later = Entry("a", "1", "2", None, {"spelled": False})
    with pytest.raises(InputError, match="spelled was None, is False"):
        check_same_run(before | {"config": {"spelled": None}}, later, may_change=(), defaults={})


CONVENTIONS = CONFIGURATIONS["pi0_aloha_sim"].conventions
ENTRY = Entry("a", "1", "2", "p", {}, CONVENTIONS, "s")


def of_robot(**fields) -> Conventions:
    assert CONVENTIONS.robot is not None
    return dataclasses.replace(CONVENTIONS, robot=dataclasses.replace(CONVENTIONS.robot, **fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_fingerprint": "9"}, "source_fingerprint was 1, is 9"),
        ({"data_fingerprint": "9"}, "data_fingerprint was 2, is 9"),
        ({"statistics_fingerprint": "9"}, "statistics_fingerprint was s, is 9"),
        ({"teacher_fingerprint": "9"}, "teacher_fingerprint was None, is 9"),
        ({"held_out_fingerprint": "9"}, "held_out_fingerprint was None, is 9"),
        ({"conventions": dataclasses.replace(CONVENTIONS, action_horizon=49)}, "action_horizon was 50, is 49"),
        *(
            (
                {
                    "conventions": dataclasses.replace(
                        CONVENTIONS, robot=dataclasses.replace(CONVENTIONS.robot, **field)
                    )
                },
                rf"robot\.{name} was .*, is ",
            )
            for name, field in {
                "prompt": {"prompt": "push"},
                "prompt_from_task": {"prompt_from_task": True},
                "delta": {"delta": (True,) * 6},
                "units": {"units": "own"},
                "action_dim": {"action_dim": 7},
            }.items()
        ),
    ],
)
def test_a_run_does_not_go_on_with_other_content(change, message):
    with pytest.raises(InputError, match=message):
        check_same_run(ENTRY.to_json(), dataclasses.replace(ENTRY, **change), may_change=(), defaults={})


def test_a_run_goes_on_under_another_name_of_its_robot_and_with_repaired_pictures():
    same = dataclasses.replace(ENTRY, source="elsewhere", conventions=of_robot(name="mine"))
    assert check_same_run(ENTRY.to_json(), same, may_change=(), defaults={}) is None
    repaired = dataclasses.replace(ENTRY, pictures_fingerprint="q")
    note = check_same_run(ENTRY.to_json(), repaired, may_change=(), defaults={})
    assert note is not None and "its videos or pictures have changed since" in note


def test_a_run_from_before_held_out_data_were_recorded_goes_on():
    before = {name: value for name, value in ENTRY.to_json().items() if name != "held_out_fingerprint"}
    now = dataclasses.replace(ENTRY, held_out_fingerprint="9")
    assert check_same_run(before, now, may_change=(), defaults={}) is None


@pytest.mark.parametrize(
    "flag", ["episodes", "weights", "state_key", "action_key", "long_prompts", "evaluate_observations", "holdout_data"]
)
def test_what_a_run_reads_may_not_change(flag):
    assert flag not in _MAY_CHANGE


def test_depths_are_known_by_their_cuts_and_told_by_the_blocks_that_stay():
    """The whole model is always trained, and the order is by depth, whatever the flag says."""

    def entry(*words: str, keep: list[int]) -> Entry:
        cuts = [PrunePlan.of("pi0", {"vlm": 3, "action": 3}, {"vlm": keep, "action": keep}).to_json()]
        return dataclasses.replace(ENTRY, config={"depths": words}, cuts=cuts)

    before = entry("3", "2", keep=[0, 2]).to_json()
    assert check_same_run(before, entry("2", keep=[0, 2]), may_change=(), defaults={}) is None
    with pytest.raises(InputError, match=r"settings: cuts was vlm 0 2, action 0 2, is vlm 0 1, action 0 1\. Or"):
        check_same_run(before, entry("2", keep=[0, 1]), may_change=(), defaults={})
