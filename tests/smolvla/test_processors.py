"""What the processors of a SmolVLA's policy folder say is done here, or refused; and what an export makes of it."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath
from smolvla_steps import change_steps, copy_policy, make_step, unnamed, without, write_side_files

from clp_jax.checkpoint import read_spec
from clp_jax.cli import main
from clp_jax.commands import finetune
from clp_jax.commands.conventions import Told, choose_conventions
from clp_jax.commands.finetune import Finetune
from clp_jax.errors import InputError
from clp_jax.loading import read_architecture
from clp_jax.models import smolvla
from clp_jax.outputs import MANIFEST
from clp_jax.processing import norm_stats
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.policy_files import POSTPROCESSOR, PREPROCESSOR, norm_stats_of, read_vectors, to_safetensors
from clp_jax.processing.robots import Robot

OF_ACTIONS = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
TOP, SIDE, WRIST = (f"observation.images.{name}" for name in ("top", "side", "wrist"))


@pytest.fixture
def folder(tmp_path):
    return copy_policy(tmp_path)


def change(file, name, **settings):
    """Changes the settings of the steps of a name."""
    content = json.loads(file.read_text())
    for step in content["steps"]:
        if step["registry_name"] == name:
            step["config"] |= settings
    file.write_text(json.dumps(content))


def read(folder):
    return read_architecture(read_spec(str(folder)), dtype="float32")


@pytest.mark.parametrize(
    ("file", "step", "settings", "message"),
    [
        (PREPROCESSOR, "tokenizer_processor", {"max_length": 4}, "cuts prompts at 4 tokens, .* config.json is 24"),
        (PREPROCESSOR, "tokenizer_processor", {"padding_side": "left"}, "padding_side of .* 'left'; only 'right'"),
        (PREPROCESSOR, "tokenizer_processor", {"truncation": False}, "truncation of .* False"),
        (PREPROCESSOR, "normalizer_processor", {"eps": 0.5}, "eps of normalizer_processor is 0.5; only 1e-08"),
        (POSTPROCESSOR, "unnormalizer_processor", {"eps": 0.5}, "eps of unnormalizer_processor is 0.5"),
        (PREPROCESSOR, "normalizer_processor", {"normalize_observation_keys": []}, "normalize_observation_keys of"),
        (PREPROCESSOR, "device_processor", {"float_dtype": "float16"}, "float_dtype of device_processor is 'float16'"),
        (PREPROCESSOR, "rename_observations_processor", {"rename_map": [TOP]}, "rename_map .*; map keys to names"),
        (
            PREPROCESSOR,
            "rename_observations_processor",
            {"rename_map": {"observation.a": TOP, "observation.b": TOP}},
            f"renames both observation.a and observation.b to {TOP}",
        ),
    ],
)
def test_settings_that_are_not_implemented(folder, file, step, settings, message):
    change(folder / file, step, **settings)
    with pytest.raises(InputError, match=message) as caught:
        read(folder)
    assert file in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "make", "message"),
    [
        (PREPROCESSOR, without("smolvla_new_line_processor"), "no steps smolvla_new_line_processor"),
        (PREPROCESSOR, lambda steps: [*steps, steps[-1]], "2 steps normalizer_processor"),
        (POSTPROCESSOR, without("unnormalizer_processor"), "no steps unnormalizer_processor"),
        (
            POSTPROCESSOR,
            lambda steps: [{"registry_name": "absolute_actions_processor", "config": {}}, *steps],
            "a step 'absolute_actions_processor', which clp_jax does not do; .* unnormalizer_processor",
        ),
        (PREPROCESSOR, lambda steps: [*steps, {"class": "my.Step"}], "a step 'my.Step'"),
    ],
)
def test_steps_that_are_not_those_of_a_smolvla(folder, file, make, message):
    change_steps(folder / file, make)
    with pytest.raises(InputError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("change_vectors", "message"),
    [
        (lambda x: x | {"action.mean": x["action.mean"] + 10}, r"have not the same action\.mean"),
        (lambda x: {k: v for k, v in x.items() if not k.startswith("action.")}, r"have not the same action\.mean"),
        (lambda x: x | {"action.std": np.ones(11, np.float32)}, r"action\.std has shape \[11\], config\.json says 8"),
    ],
)
def test_statistics_of_actions_are_the_same_before_and_after(folder, change_vectors, message):
    (folder / OF_ACTIONS).write_bytes(to_safetensors(change_vectors(read_vectors(folder / OF_ACTIONS))))
    with pytest.raises(InputError, match=message):
        read(folder)


def test_a_folder_lacks_both_processors_or_none(folder):
    (folder / POSTPROCESSOR).unlink()
    with pytest.raises(InputError, match=r"has no policy_postprocessor\.json, which lerobot saves with policy_prep"):
        read(folder)
    (folder / PREPROCESSOR).unlink()
    assert read(folder).robot_keys == ()


def test_statistics_that_are_gone_are_missed_where_they_are_needed(folder):
    (folder / OF_ACTIONS).unlink()
    architecture = read(folder)
    with pytest.raises(InputError, match=f"{POSTPROCESSOR} names {OF_ACTIONS}, which is not beside it"):
        smolvla.side_files(folder, depths=architecture.depths)


def test_what_the_preprocessor_renames_is_read_from_the_robots_key(folder):
    names = {TOP: SIDE, SIDE: TOP, "observation.hand": WRIST, "observation.joints": "observation.state"}
    names["joints"] = "observation.state"  # of which lerobot sees nothing: it is no observation
    change(folder / PREPROCESSOR, "rename_observations_processor", rename_map=names)
    robot = smolvla.own_robot(read(folder))
    assert robot.images == {TOP: SIDE, WRIST: "observation.hand", SIDE: TOP}
    assert robot.state == ("observation.joints",)


def export(checkpoint, out) -> int:
    words = ("--checkpoint", str(checkpoint), "--to", "lerobot", "--check", "bits", "--out", str(out))
    return main(["export", *words])


@pytest.mark.parametrize("renames", [True, False])
def test_an_export_renames_as_the_run_read(folder, tmp_path, renames):
    swapped = Robot("toy", {TOP: SIDE, SIDE: TOP, WRIST: WRIST}, state=("observation.joints",))
    if not renames:
        change_steps(folder / PREPROCESSOR, without("rename_observations_processor"))
    assert export(make_step(folder, tmp_path, swapped), tmp_path / "e") == 0
    assert _renamed(tmp_path / "e") == {SIDE: TOP, TOP: SIDE, "observation.joints": "observation.state"}
    robot = smolvla.own_robot(read(tmp_path / "e"))
    assert (robot.images, robot.state) == (swapped.images, swapped.state)


def test_a_step_is_served_with_the_keys_that_its_run_read(folder, tmp_path):
    """Not with the names of the model's cameras, which may be another's keys."""
    swapped = Robot("toy", {TOP: SIDE, SIDE: TOP, WRIST: WRIST}, state=("observation.joints",))
    spec = read_spec(str(make_step(folder, tmp_path, swapped)))
    architecture = read_architecture(spec, dtype="float32")
    assert choose_conventions(Told(), architecture, spec.plan_record).conventions.robot == swapped
    told = choose_conventions(Told(image=(f"{TOP}=front",)), architecture, spec.plan_record).conventions
    assert told.robot.images == {**swapped.images, TOP: "front"}


def test_a_resumed_run_keeps_the_schedule_that_it_began_with(folder):
    """lerobot's is as long as the run, whose number of steps may change."""
    architecture, flags = read(folder), {"checkpoint": "c", "data": ("d",), "out": "o"}
    begun, _ = finetune._with_defaults(Finetune(**flags, steps=4), architecture, None)
    assert begun.decay_steps == 4
    record = {"steps": [{"command": "finetune", "config": dataclasses.asdict(begun)}]}
    longer, text = finetune._with_defaults(Finetune(**flags, steps=9), architecture, record)
    assert (longer.decay_steps, longer.warmup_steps) == (begun.decay_steps, begun.warmup_steps)
    assert "decay steps 4" in text and text.endswith("as the run began")
    given, text = finetune._with_defaults(Finetune(**flags, steps=9, decay_steps=8), architecture, record)
    assert given.decay_steps == 8 and "decay steps" not in text


def test_an_export_of_a_policy_renames_as_it_did(folder, tmp_path):
    names = {"observation.front": TOP, "observation.x": "observation.of_others"}
    change(folder / PREPROCESSOR, "rename_observations_processor", rename_map=names)
    assert export(folder, tmp_path / "e") == 0
    assert _renamed(tmp_path / "e") == names


def test_a_step_that_names_none_of_its_runs_statistics_is_not_exported(folder, tmp_path, capsys):
    """Earlier versions saved such steps where the policy that they began from had none."""
    for name in (PREPROCESSOR, POSTPROCESSOR):
        change_steps(folder / name, unnamed)
    stats = {name: NormStats(np.arange(n) + 1.0, np.arange(n) + 2.0) for name, n in (("state", 6), ("actions", 8))}
    step = make_step(folder, tmp_path, Robot("toy", {TOP: TOP}))
    assert export(step, tmp_path / "untrained") == 0  # of a policy without any
    norm_stats.save(epath.Path(step / "assets" / "toy"), stats)
    (step / MANIFEST).unlink(missing_ok=True)
    assert export(step, tmp_path / "e") == 2
    assert "names no statistics, though the run had some" in capsys.readouterr().err


def _renamed(folder) -> dict:
    steps = json.loads((folder / PREPROCESSOR).read_text())["steps"]
    (found,) = [step for step in steps if step["registry_name"] == "rename_observations_processor"]
    return found["config"]["rename_map"]


def test_an_export_says_what_lerobot_does_not_do_with_observations(folder, tmp_path, capsys):
    parts = Robot("toy", {TOP: TOP, SIDE: TOP, WRIST: "hand"}, state=("arm[0:5]", "gripper"))
    assert export(make_step(folder, tmp_path, parts), tmp_path / "e") == 0
    out, card = " ".join(capsys.readouterr().out.split()), (tmp_path / "e" / "README.md").read_text()
    for sentence in (
        "give it arm[0:5], gripper in this order as observation.state",
        f"lerobot reads keys that begin with observation. alone: give it hand as {WRIST}.",
        f"{TOP} is to be {TOP} and {SIDE}, so give it twice",
    ):
        assert sentence in out and sentence in card


@pytest.mark.parametrize("named", [(PREPROCESSOR, POSTPROCESSOR), (PREPROCESSOR,), ()])
def test_new_statistics_reach_both_processors(folder, named):
    """lerobot leaves actions of which it has no statistics normalised, without a word."""
    for name in {PREPROCESSOR, POSTPROCESSOR} - set(named):
        change_steps(folder / name, unnamed)
    stats = {name: NormStats(np.arange(n) + 1.0, np.arange(n) + 2.0) for name, n in (("state", 6), ("actions", 8))}
    written = folder.parent / "written"
    write_side_files(folder, written, stats)
    found = norm_stats_of(written)
    for name, wanted in stats.items():
        np.testing.assert_array_equal(found[name].mean, wanted.mean)
        np.testing.assert_array_equal(found[name].std, wanted.std)
    (step,) = [s for s in json.loads((written / POSTPROCESSOR).read_text())["steps"] if "state_file" in s]
    assert step["state_file"] == OF_ACTIONS
    np.testing.assert_array_equal(read_vectors(written / OF_ACTIONS)["action.mean"], stats["actions"].mean)
