"""Whether a run goes on is decided by what it computes, however its flags were once recorded."""

import pytest

from clp_jax.commands.finetune import _MAY_CHANGE
from clp_jax.errors import InputError
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


@pytest.mark.parametrize("flag", ["episodes", "weights", "state_key", "action_key", "long_prompts"])
def test_what_a_run_reads_may_not_change(flag):
    assert flag not in _MAY_CHANGE
