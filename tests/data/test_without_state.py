"""A robot without state: fine where the model reads none, refused where it does."""

import dataclasses
import json

import numpy as np
import pytest
import toys
from lerobot_sets import ACTION, STILL
from recordings import GOLDEN
from served import robot_requests

from clp_jax.cli import main
from clp_jax.data import open_dataset
from clp_jax.errors import InputError
from clp_jax.processing import norm_stats
from clp_jax.processing.robots import Robot, find_robot
from clp_jax.processing.tokenizer import load_tokenizer
from clp_jax.serving.requests import flat
from scripts.make_lerobot_toy import TASKS, write

ROBOT = Robot("blind", {"base_0_rgb": STILL}, state=())
PI05 = dataclasses.replace(toys.architecture("pi05"), vocab_size=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stateless") / "set"
    write(folder, "v3.0", {ACTION: 3}, {STILL: "image"})
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GOLDEN / "tokenizer/tiny_spm.model")


def test_a_pi05_learns_and_acts_without_state(folder, tokenizer):
    data = open_dataset(folder, PI05, robot=ROBOT, tokenizer=tokenizer, action_horizon=2)
    assert set(data.norm_stats) == {"actions"}
    row = data.read(data.rows[:1])
    assert not row["state"].any()
    ids, _ = tokenizer(TASKS[0], row["tokenized_prompt"].shape[1])
    np.testing.assert_array_equal(row["tokenized_prompt"][0], ids)  # no "State:" in it
    requests = robot_requests(PI05, dataclasses.replace(ROBOT, action_dim=3), data.norm_stats)
    assert requests.keys == ("still", "prompt")
    inputs, state = requests.inputs(flat({"still": np.zeros((6, 8, 3), np.uint8), "prompt": "go"}))
    assert (inputs["state"].shape, state.shape) == ((6,), (0,))
    assert requests.actions(np.zeros((2, 6)), state).shape == (2, 3)


@pytest.mark.parametrize(
    ("architecture", "spelled"),
    [(PI05, True), (dataclasses.replace(toys.architecture(), vocab_size=512), None)],
)
def test_a_model_that_reads_the_state_needs_one(folder, tokenizer, architecture, spelled):
    with pytest.raises(InputError, match=r"robot 'blind' has no state, which a π0 reads, and a π0.5 with"):
        open_dataset(folder, architecture, robot=ROBOT, tokenizer=tokenizer, state_in_prompt=spelled)


def test_a_file_says_so_and_statistics_are_of_the_actions_alone(folder, tmp_path):
    file = tmp_path / "robot.json"
    file.write_text(json.dumps({"images": {"base_0_rgb": STILL}, "state": []}))
    flags = ["--data", str(folder), "--robot", str(file)]
    assert main(["norm-stats", *flags, "--out", str(tmp_path / "stats")]) == 0
    assert set(norm_stats.load(tmp_path / "stats/set")) == {"actions"}
    assert main(["check", *flags]) == 0


@pytest.mark.parametrize("change", [{"delta": [2, -1]}, {"units": "aloha"}])
def test_relative_actions_need_a_state(tmp_path, change):
    file = tmp_path / "robot.json"
    file.write_text(json.dumps({"images": {"base_0_rgb": STILL}, "state": []} | change))
    with pytest.raises(InputError, match="a robot without state has absolute actions in its own units"):
        find_robot(str(file), {})
