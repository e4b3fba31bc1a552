"""Whose conventions hold: those of a configuration, of the record of a run, or assumed ones; nothing contradicts."""

import dataclasses
import json
from typing import Any

import pytest
import smolvla_recordings
import toys

from clp_jax.commands.conventions import Told, choose_conventions, told_by
from clp_jax.commands.data_flags import DataFlags
from clp_jax.errors import InputError
from clp_jax.models.pi0 import CONFIGURATIONS
from clp_jax.processing.conventions import Conventions
from clp_jax.processing.robots import mask

PI0, PI05, FAST = (
    dataclasses.replace(toys.architecture(kind), dtype="float32") for kind in ("pi0", "pi05", "pi0_fast")
)


def chosen(architecture=PI0, record=None, *, new_run=False, **told) -> Any:
    return choose_conventions(Told(**told), architecture, record, new_run=new_run)


def record_of(conventions: Conventions | None, **config) -> dict:
    """``clp.json`` after a fine-tuning and a pruning; None is one of before conventions were recorded."""
    step = {"command": "finetune", "config": config}
    step |= {} if conventions is None else {"conventions": json.loads(json.dumps(conventions.to_json()))}
    return {"steps": [step, {"command": "prune"}]}


TRAINED = record_of(CONFIGURATIONS["pi0_libero"].conventions)


def test_flags_are_told_by_every_command_that_has_them():
    flags = DataFlags(openpi_config="pi0_libero", state_key=("a",), prompt="go")
    assert told_by(flags) == Told(openpi_config="pi0_libero", state_key=("a",), prompt="go")


@pytest.mark.parametrize("name", [name for name, entry in CONFIGURATIONS.items() if entry.kind != "pi0_fast"])
def test_a_configuration_says_everything(name):
    architecture = {"pi0": PI0, "pi05": PI05}[CONFIGURATIONS[name].kind]
    found = chosen(architecture, openpi_config=name)
    assert found.conventions == CONFIGURATIONS[name].conventions
    assert not found.assumed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pi05_base", "pi05_base has no record here: it is a checkpoint and no configuration"),
        ("debug", "made-up observations of no robot"),
        ("paligemma_vq_droid", "its tokenizer of actions is not here"),
        ("paligemma_fast_droid", "openpi itself cannot build it"),
        ("pi05_liberо", "is not known here; did you mean pi05_libero"),  # noqa: RUF001 - a Cyrillic letter
    ],
)
def test_a_name_without_a_record_says_why(name, message):
    with pytest.raises(InputError, match=message):
        chosen(PI05, openpi_config=name)


CONTRADICTIONS = {
    "action_horizon is 50 by the flags, 10 by openpi's pi05_libero": {"action_horizon": 50},
    "max_token_len is 48 by the flags, 200 by": {"max_token_len": 48},
    "state_in_prompt is True by the flags, False by": {"state_in_prompt": True},
    "asset_id is mine by the flags, physical-intelligence/libero by": {"asset_id": "mine"},
    "cameras is .* by --robot aloha, .*delta is .*units is aloha by --robot aloha, own by": {"robot": "aloha"},
    "cameras is .*'right_wrist_0_rgb'.* by the flags": {"image": ("right_wrist_0_rgb=third",)},
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_a_flag_that_contradicts_a_configuration_is_refused_with_both_values(message):
    with pytest.raises(InputError, match=message):
        chosen(PI05, openpi_config="pi05_libero", **CONTRADICTIONS[message])


def test_a_prompt_that_contradicts_a_configurations_own_is_refused():
    with pytest.raises(InputError, match="prompt is 'stack' by the flags, 'Transfer cube' by openpi's pi0_aloha_sim"):
        chosen(openpi_config="pi0_aloha_sim", prompt="stack")
    told = chosen(openpi_config="pi0_libero", prompt="stack").conventions.robot
    assert (told.prompt, told.prompt_from_task) == ("stack", False)


def test_flags_that_agree_with_a_configuration_or_rename_columns_are_welcome():
    robot: Any = CONFIGURATIONS["pi05_libero"].conventions.robot
    keys = {"image": ("base_0_rgb=front",), "state_key": ("q",), "action_key": ("u",)}
    found = chosen(PI05, openpi_config="pi05_libero", robot="libero", action_horizon=10, state_in_prompt=False, **keys)
    renamed = dataclasses.replace(robot, images=robot.images | {"base_0_rgb": "front"}, state=("q",), actions=("u",))
    assert found.conventions == dataclasses.replace(CONFIGURATIONS["pi05_libero"].conventions, robot=renamed)


def test_a_robot_that_leaves_open_what_a_configuration_says_changes_nothing_of_it():
    towel = chosen(openpi_config="pi0_aloha_towel", robot="aloha").conventions
    assert towel == CONFIGURATIONS["pi0_aloha_towel"].conventions


@pytest.mark.parametrize(
    ("architecture", "name", "message"),
    [
        (PI0, "pi05_libero", "--openpi-config pi05_libero is for a π0.5, the checkpoint is a π0"),
        (PI0, "pi0_libera", "'pi0_libera' is not known here; did you mean pi0_libero"),
        (PI0, "qqq", "known are pi0_aloha, pi05_aloha"),
        (smolvla_recordings.architecture(), "pi0_libero", "is for a π0, the checkpoint is a SmolVLA"),
    ],
)
def test_a_configuration_that_is_not_for_the_checkpoint_is_refused(architecture, name, message):
    with pytest.raises(InputError, match=message):
        chosen(architecture, openpi_config=name)


@pytest.mark.parametrize(
    ("robot", "architecture", "name"),
    [
        ("libero", PI0, "pi0_libero"),
        ("libero", PI05, "pi05_libero"),
        ("aloha", PI0, "pi0_aloha"),
        ("aloha", PI05, "pi05_aloha"),
        ("aloha-sim", PI0, "pi0_aloha_sim"),
        ("droid", PI0, "pi0_droid"),
        ("droid", PI05, "pi05_droid"),
    ],
)
def test_a_robot_alone_stands_for_openpis_configuration_and_says_so(robot, architecture, name):
    found = chosen(architecture, robot=robot)
    standard = dataclasses.replace(CONFIGURATIONS[name].conventions, config=None, asset_id=None)
    assert found.conventions == standard
    assert found.assumed
    assert f"assumed for --robot {robot}, as in openpi's {name}" in str(found)


def test_what_else_a_robot_could_mean_and_what_flags_change_is_said():
    droid = str(chosen(PI05, robot="droid", action_horizon=20))
    assert "pi05_droid but for action_horizon (not pi05_droid_finetune, " in droid
    assert "20 actions, 200 tokens, the state in the prompt" in droid
    metaworld = chosen(PI05, robot="metaworld")
    assert metaworld.assumed
    assert "of no configuration of openpi with this kind of model: 50 actions, 200 tokens" in str(metaworld)
    nobody = chosen(PI0)
    assert (nobody.conventions, nobody.assumed) == (Conventions(None, 50, 48), False)


def test_a_record_holds_without_flags_and_against_none():
    found = chosen(record=TRAINED)
    assert found.conventions == CONFIGURATIONS["pi0_libero"].conventions
    assert str(found).startswith("as trained, by clp.json: 50 actions, 48 tokens")
    assert chosen(record=TRAINED, robot="libero").conventions == found.conventions
    assert chosen(record=TRAINED, openpi_config="pi0_libero").conventions == found.conventions
    for told, message in (
        (
            {"action_horizon": 10},
            "action_horizon is 10 by the flags, 50 by the checkpoint's clp.json. Leave the flags out",
        ),
        ({"robot": "metaworld"}, "cameras is .* by --robot metaworld, .* by the checkpoint's clp.json"),
        ({"openpi_config": "pi0_aloha"}, "delta is .* by openpi's pi0_aloha, .* by the checkpoint's clp.json"),
    ):
        with pytest.raises(InputError, match=message):
            chosen(record=TRAINED, **told)


def test_statistics_of_a_record_keep_their_name_under_a_configuration():
    trained = dataclasses.replace(CONFIGURATIONS["pi0_libero"].conventions, asset_id="my/set", config=None)
    assert chosen(record=record_of(trained), openpi_config="pi0_libero").conventions.asset_id == "my/set"


def test_a_new_run_takes_over_what_the_checkpoint_was_trained_with_or_leaves_it():
    horizon = chosen(record=TRAINED, new_run=True, action_horizon=10).conventions
    assert horizon == dataclasses.replace(CONFIGURATIONS["pi0_libero"].conventions, action_horizon=10)
    assert chosen(record=TRAINED, new_run=True, robot="aloha").conventions.robot.units == "aloha"
    assert chosen(record=TRAINED, new_run=True, openpi_config="pi0_aloha").conventions.config == "pi0_aloha"


def test_a_run_on_model_ready_data_records_its_lengths_and_leaves_the_robot_open():
    record = record_of(Conventions(None, 7, 12))
    assert chosen(record=record).conventions == Conventions(None, 7, 12)
    found = chosen(record=record, robot="libero").conventions
    assert (found.action_horizon, found.max_token_len, found.robot.delta) == (7, 12, mask(6, -1))


def test_runs_from_before_conventions_were_recorded_mean_what_they_meant():
    libero = chosen(record=record_of(None, action_horizon=10), robot="libero")
    assert (libero.conventions.robot.delta, libero.conventions.action_horizon) == ((), 10)
    assert chosen(record=record_of(None), robot="droid").conventions.action_horizon == 50
    assert chosen(record=record_of(None), robot="aloha-sim").conventions.robot.delta == mask(6, -1, 6, -1)
    assert chosen(record=record_of(None, action_horizon=10), action_horizon=5).conventions.action_horizon == 5
    assert chosen(record=record_of(None), new_run=True, robot="aloha-sim").conventions.robot.delta == ()


def test_a_damaged_record_is_named():
    record = record_of(CONFIGURATIONS["pi0_libero"].conventions)
    record["steps"][0]["conventions"]["robot"]["delta"] = "yes"
    with pytest.raises(InputError, match=r"the checkpoint's clp\.json is damaged: delta must be a list"):
        chosen(record=record)


def test_a_checkpoint_that_describes_its_robot_is_believed():
    architecture = smolvla_recordings.architecture()
    found = chosen(architecture)
    assert found.conventions.robot is not None
    assert "by the checkpoint's own files" in str(found)
