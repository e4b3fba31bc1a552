"""A robot's state and actions may be dimensions of columns, joined: the same numbers, statistics and served parts."""

import dataclasses
import json

import lerobot_sets as sets
import numpy as np
import pytest
import toys
from lerobot_sets import ACTION, STATE, STILL, VIDEO
from recordings import GOLDEN
from served import robot_requests

from clp_jax.cli import main
from clp_jax.data import open_dataset
from clp_jax.data.recording import open_recording
from clp_jax.errors import InputError
from clp_jax.models.pi0.robots import DROID
from clp_jax.processing import columns, norm_stats
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.robots import Robot, find_robot, read_robot
from clp_jax.processing.tokenizer import load_tokenizer
from clp_jax.serving.requests import flat
from scripts.make_lerobot_toy import write

ROBOT = Robot(
    "toy", {"base_0_rgb": STILL}, state=(f"{STATE}[3:5]", "gripper", f"{STATE}[0]"), actions=(f"{ACTION}[1:]",)
)
ARCH = dataclasses.replace(toys.architecture("pi05"), vocab_size=512)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns") / "set"
    truth = write(folder, "v3.0", {STATE: 5, ACTION: 3, "gripper": 1}, {STILL: "image"})
    chosen = np.concatenate([truth[STATE][:, 3:5], truth["gripper"], truth[STATE][:, :1]], axis=1)
    return folder, chosen, truth[ACTION][:, 1:]


@pytest.mark.parametrize("text", ["", "[3]", "a[", "a[x]", "a[-1]", "a[1:2:3]", "a[1]b", "a[]"])
def test_what_names_no_column_is_refused(text):
    with pytest.raises(InputError, match="names no column; write key"):
        columns.part(text)


@pytest.mark.parametrize("text", ["a[3:3]", "a[4:2]", "a[:0]"])
def test_what_chooses_nothing_is_refused(text):
    with pytest.raises(InputError, match="chooses no dimension"):
        columns.part(text)


@pytest.mark.parametrize("text", ["a", "a.b/c", "a[4]", "a[4:6]", "a[4:]", "a[0:2]"])
def test_parts_are_written_as_they_are_read(text):
    assert str(columns.part(text)) == text


def test_chosen_dimensions_are_joined_in_the_robots_order(stored):
    folder, state, actions = stored
    recorded = open_recording(folder, ROBOT)
    np.testing.assert_array_equal(recorded.state, state)
    np.testing.assert_array_equal(recorded.actions, actions)
    assert (recorded.robot.action_dim, recorded.robot.widths) == (2, {STATE: 5, "gripper": 1, ACTION: 3})
    assert open_recording(folder, dataclasses.replace(ROBOT, state=(STATE,))).fingerprint() != recorded.fingerprint()


def test_statistics_and_inputs_are_of_the_chosen_dimensions(stored):
    folder, state, _ = stored
    tokenizer = load_tokenizer(GOLDEN / "tokenizer/tiny_spm.model")
    data = open_dataset(folder, ARCH, robot=ROBOT, tokenizer=tokenizer, action_horizon=2)
    assert data.norm_stats is not None
    np.testing.assert_allclose(data.norm_stats["state"].mean, state.mean(axis=0, dtype=np.float64), rtol=1e-6)
    assert (len(data.norm_stats["state"].mean), len(data.norm_stats["actions"].mean), data.action_dim) == (4, 2, 2)
    row = data.read(data.rows[:1])
    assert row["state"][0, :4].any() and not row["state"][0, 4:].any()
    assert not row["actions"][0, :, 2:].any()


def test_dimensions_that_a_column_lacks_are_refused(stored):
    robot = dataclasses.replace(ROBOT, actions=(f"{ACTION}[1:4]",))
    with pytest.raises(InputError, match=r"action has 3 dimensions, too few for action\[1:4\]"):
        open_recording(stored[0], robot)


def test_flags_choose_dimensions_too(stored, tmp_path):
    flags = ["--image", f"base_0_rgb={STILL}", "--state-key", *ROBOT.state, "--action-key", *ROBOT.actions]
    assert main(["norm-stats", "--data", str(stored[0]), *flags, "--out", str(tmp_path / "stats")]) == 0
    stats = norm_stats.load(tmp_path / "stats/set")
    assert [len(entry.mean) for entry in stats.values()] == [4, 2]
    assert main(["check", "--data", str(stored[0]), *flags]) == 0


def requests_of(robot, dims):
    architecture = dataclasses.replace(toys.architecture(), action_dim=32, vocab_size=512)
    return robot_requests(architecture, robot, {k: NormStats(np.zeros(d), np.ones(d)) for k, d in dims.items()})


def test_clients_send_whole_columns_and_get_the_chosen_actions():
    requests = requests_of(dataclasses.replace(ROBOT, action_dim=2), {"state": 4, "actions": 2})
    assert requests.keys == ("still", "state", "gripper", "prompt")
    request = {"still": np.zeros((6, 8, 3), np.uint8), "state": np.arange(5.0), "gripper": 9.0, "prompt": "go"}
    assert requests.inputs(flat(request))[1].tolist() == [3, 4, 9, 0]
    assert requests.actions(np.zeros((10, 32)), np.zeros(4)).shape == (10, 2)
    with pytest.raises(InputError, match=r"state has 4 dimensions, too few for state\[3:5\]"):
        requests.inputs(flat(request | {"state": np.arange(4.0)}))


def test_a_part_with_a_key_of_its_own_is_sent_as_it_is():
    client = {f"{STATE}[3:5]": "wrist", f"{STATE}[0]": "lift", "gripper": "hand"}
    requests = requests_of(dataclasses.replace(ROBOT, client=client), {"state": 4, "actions": 2})
    assert requests.keys == ("still", "wrist", "hand", "lift", "prompt")
    request = {"still": np.zeros((6, 8, 3), np.uint8), "wrist": [3.0, 4.0], "hand": 9.0, "lift": 0.0, "prompt": "go"}
    assert requests.inputs(flat(request))[1].tolist() == [3, 4, 9, 0]
    with pytest.raises(InputError, match="wrist has 3 dimensions, robot 'toy' has 2"):
        requests.inputs(flat(request | {"wrist": [1.0, 2.0, 3.0]}))


def test_columns_of_other_widths_than_the_robots_are_refused(tmp_path):
    """DROID's seven joints and one gripper are not six and two."""
    request = {key: np.zeros((6, 8, 3), np.uint8) for key in DROID.images.values()} | {"prompt": "go"}
    requests = requests_of(DROID, {"state": 8, "actions": 8})
    requests.inputs(flat(request | {"joint_position": np.zeros(7), "gripper_position": 0.0}))
    with pytest.raises(InputError, match="joint_position has 6 dimensions, robot 'droid' has 7"):
        requests.inputs(flat(request | {"joint_position": np.zeros(6), "gripper_position": np.zeros(2)}))
    dims = {"joint_position": 6, "gripper_position": 2, "actions": 8}
    write(tmp_path / "set", "v3.0", dims, dict.fromkeys(DROID.images.values(), "image"))
    with pytest.raises(InputError, match=r"joint_position of .* has 6 dimensions, robot 'droid' has 7"):
        open_recording(tmp_path / "set", DROID)


MODALITY = {
    "state": {"arm": {"start": 3, "end": 5}, "hand": {"start": 0, "end": 1, "original_key": "gripper"}},
    "action": {"arm": {"start": 1, "end": 3, "absolute": False, "rotation_type": None}},
    "video": {"ego_view": {"original_key": STILL}, VIDEO: {}},
    "annotation": {"human.action.task_description": {}, "human.validity": {}},
}


def save(folder, value):
    (folder / "modality.json").write_text(json.dumps(value))
    return str(folder / "modality.json")


def test_modality_json_is_a_robot(tmp_path):
    robot = read_robot(save(tmp_path, MODALITY))
    assert robot.images == {"ego_view": STILL, VIDEO: VIDEO}
    assert (robot.state, robot.actions) == ((f"{STATE}[3:5]", "gripper[0]"), (f"{ACTION}[1:3]",))
    assert robot.task == "annotation.human.action.task_description"
    bare = {key: value for key, value in MODALITY.items() if key != "annotation"}
    assert read_robot(save(tmp_path, bare)).task == "task_index"


def test_videos_of_a_modality_json_that_the_model_does_not_know_are_named_by_flags(tmp_path):
    file, cameras = save(tmp_path, MODALITY), ("base_0_rgb", "left_wrist_0_rgb")
    assert find_robot(file, {}, cameras=cameras, images=[f"base_0_rgb={STILL}"]).images == {"base_0_rgb": STILL}
    with pytest.raises(InputError, match="has no camera; give --robot, or --image"):
        find_robot(file, {}, cameras=cameras)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": {"q": {"start": 0, "end": 4, "rotation_type": "quaternion"}}}, "state.q is of rotation type 'quat"),
        ({"action": {"q": {"start": 4, "end": 4}}}, "action.q goes from 4 to 4, which chooses nothing"),
        ({"action": {"q": {"start": 4}}}, "action.q.end must be a whole number, not null"),
        ({"action": {"q": [0, 4]}}, "action.q must be an object"),
        ({"annotation": {"a": {}, "b": {}}}, "annotations a, b could each be the task"),
        ({"action": {}}, "the robot has no actions"),
        ({"extra": 1}, "unknown key 'extra'"),
    ],
)
def test_modality_json_with_a_slip_is_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=f"modality.json: .*{message}"):
        find_robot(save(tmp_path, MODALITY | change), {})


def test_tasks_are_read_from_the_column_that_the_robot_names(tmp_path):
    folder = sets.make(tmp_path / "set", "v3.0")
    for file in sets.tables(folder):
        sets.edit_table(file, lambda t: t.append_column("other", [1 - t.column("task_index").to_numpy()]))
    robot = Robot("toy", {"base_0_rgb": STILL})
    other = dataclasses.replace(robot, task="other")
    numbers, texts = open_recording(folder, other)._prompts()
    usual, _ = open_recording(folder, robot)._prompts()
    assert (numbers == 1 - usual).all() and len(texts) == 2
    assert open_recording(folder, other).fingerprint() != open_recording(folder, robot).fingerprint()
    with pytest.raises(InputError, match="has no column absent"):
        open_recording(folder, dataclasses.replace(robot, task="absent"))
