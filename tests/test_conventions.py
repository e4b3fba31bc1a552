"""openpi's named configurations: what ours make of requests, rows and answers, beside recordings of openpi's own."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import toys
from recordings import GOLDEN, recording

from clp_jax.errors import InputError
from clp_jax.models import Lengths, family_of
from clp_jax.models.pi0 import CONFIGURATIONS
from clp_jax.models.pi0.processing import Processing
from clp_jax.processing.conventions import (
    Conventions,
    conventions_of_json,
    differences,
    robot_differences,
    with_keys_of,
)
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.robots import Robot
from clp_jax.processing.tokenizer import load_tokenizer
from clp_jax.serving.requests import RobotRequests, flat

FACTS = json.loads((GOLDEN / "golden_openpi_configs.json").read_text())
COLOURS = {"base": (200, 30, 60), "left": (10, 220, 90), "right": (70, 80, 240)}
"""Of the pictures that were shown to openpi's transforms."""
FLOAT32 = 1e-5
"""Rounding of float32, in which openpi computes training rows, around values of magnitude 1."""


def picture(camera: str) -> np.ndarray:
    return np.broadcast_to(np.uint8(COLOURS[camera]), (6, 8, 3)).copy()


def request(name: str) -> dict:
    """What openpi's clients send, without a prompt."""
    robot, g = FACTS[name]["robot"], recording("openpi_configs")
    state = g[f"{robot}/state"]
    if robot == "libero":
        images = {"observation/image": picture("base"), "observation/wrist_image": picture("left")}
        return {**images, "observation/state": state}
    if robot == "droid":
        cameras = {"exterior_image_1_left": picture("base"), "wrist_image_left": picture("left")}
        parts = {"joint_position": state[:7], "gripper_position": state[7:]}
        return {f"observation/{key}": value for key, value in (cameras | parts).items()}
    cameras = {"cam_high": "base", "cam_left_wrist": "left", "cam_right_wrist": "right", "cam_low": "base"}
    sent = {key: np.moveaxis(picture(camera), -1, 0) for key, camera in cameras.items()}
    return {"state": state, "images": {"cam_high": sent["cam_high"]} if "sim" in name else sent}


def robot_of(name: str) -> Robot:
    robot = CONFIGURATIONS[name].conventions.robot
    assert robot is not None
    return robot


@functools.cache
def requests_of(name: str) -> RobotRequests:
    """A π0-FAST's numbers go through a π0.5's chain, which normalises alike; its tokens have no processor here."""
    conventions, kind = CONFIGURATIONS[name].conventions, FACTS[name]["kind"].replace("pi0_fast", "pi05")
    vision = dataclasses.replace(toys.VISION, patch_size=112)  # 224 pixels
    architecture = dataclasses.replace(toys.architecture(kind), vision=vision, action_dim=32, vocab_size=512)
    g, robot = recording("openpi_configs"), FACTS[name]["robot"]
    stats = {
        key: NormStats(*(g[f"{robot}/norm_stats/{key}/{part}"] for part in ("mean", "std", "q01", "q99")))
        for key in ("state", "actions")
    }
    lengths = Lengths(conventions.action_horizon, conventions.max_token_len)
    tokenizer = load_tokenizer(GOLDEN / "tokenizer/tiny_spm.model")
    processing = family_of(architecture).processing(
        architecture, conventions.robot, stats, tokenizer, lengths, state_in_prompt=conventions.state_in_prompt
    )
    return RobotRequests(processing, architecture)


def assert_openpis(inputs: dict, name: str, way: str, keys: set[str]) -> None:
    """Every array that openpi made is ours; its black, masked cameras are left out here."""
    g = recording("openpi_configs")
    theirs = {key.removeprefix(f"{name}/{way}/"): g[key] for key in g if key.startswith(f"{name}/{way}/")}
    assert keys <= set(theirs)
    for key, value in theirs.items():
        camera = key.partition("/")[2]
        if camera and not theirs[f"image_mask/{camera}"]:
            assert key not in inputs
        elif key in ("state", "actions"):
            np.testing.assert_allclose(inputs[key], value, rtol=FLOAT32, atol=FLOAT32, err_msg=key)
        else:
            np.testing.assert_array_equal(inputs[key], value, err_msg=key)


NAMES = [name for name, facts in FACTS.items() if facts["kind"] != "pi0_fast"]


def test_every_configuration_of_openpi_has_its_record_and_every_record_its_row():
    assert set(CONFIGURATIONS) == set(FACTS)


@pytest.mark.parametrize("name", FACTS)
def test_a_record_says_what_openpis_configuration_says(name):
    entry, facts = CONFIGURATIONS[name], FACTS[name]
    conventions = entry.conventions
    assert conventions.config == name
    assert entry.kind == facts["kind"]
    for field in ("action_horizon", "max_token_len", "state_in_prompt", "asset_id"):
        assert getattr(conventions, field) == facts[field], field
    assert (entry.trained_from == "rlds") == facts["rlds"]
    dims = {"libero": 7, "aloha": 14, "droid": 8}[facts["robot"]]
    assert robot_of(name).action_dim == dims
    if entry.kind == "pi0_fast":
        assert facts["action_dim"] == dims  # of a π0 the weights tell


@pytest.mark.parametrize("name", NAMES)
def test_a_request_becomes_openpis_model_input(name):
    requests, g = requests_of(name), recording("openpi_configs")
    inputs, _ = requests.inputs(flat(request(name) | {"prompt": str(g["asked"])}))
    assert_openpis(inputs, name, "asked", {"state", "tokenized_prompt", "image/base_0_rgb"})


@pytest.mark.parametrize("name", NAMES)
def test_a_request_without_a_prompt_has_openpis_default_or_is_refused_as_there(name):
    requests = requests_of(name)
    if FACTS[name]["unasked"] == "Prompt is required":
        with pytest.raises(InputError, match="lacks prompt"):
            requests.inputs(flat(request(name)))
    else:
        assert_openpis(requests.inputs(flat(request(name)))[0], name, "unasked", {"tokenized_prompt"})


@pytest.mark.parametrize("name", [n for n in NAMES if not FACTS[n]["rlds"] and "trained" not in FACTS[n]])
def test_a_row_becomes_openpis_training_input(name):
    processing, g = requests_of(name).processing, recording("openpi_configs")
    robot, of = processing.robot, FACTS[name]["robot"]
    assert robot.prompt_from_task == FACTS[name]["prompt_from_task"]
    shown = {"base_0_rgb": "base", "left_wrist_0_rgb": "left", "right_wrist_0_rgb": "right"}
    inputs = processing.inputs(
        state=g[f"{of}/state"],
        images={camera: picture(shown[camera]) for camera in robot.images},
        prompt=str(g["task"]) if robot.prompt_from_task else robot.prompt,
        actions=g[f"{of}/actions"][: processing.action_horizon],
    )
    assert_openpis(inputs, name, "trained", {"state", "actions", "tokenized_prompt"})


@pytest.mark.parametrize("name", [name for name in FACTS if FACTS[name]["kind"] == "pi0_fast"])
def test_numbers_of_a_fast_configuration_are_openpis(name):
    processing, g = requests_of(name).processing, recording("openpi_configs")
    of, dims = FACTS[name]["robot"], FACTS[name]["action_dim"]
    bare = dataclasses.replace(processing, robot=dataclasses.replace(processing.robot, images={}))
    inputs = bare.inputs(
        state=g[f"{of}/state"], images={}, prompt="go", actions=g[f"{of}/actions"][: bare.action_horizon]
    )
    if not FACTS[name]["rlds"]:
        np.testing.assert_allclose(
            inputs["actions"][:, :dims], g[f"{name}/trained/actions"], rtol=FLOAT32, atol=FLOAT32
        )
    known = g[f"{name}/asked/state"]
    np.testing.assert_allclose(inputs["state"][: len(known)], known, rtol=FLOAT32, atol=FLOAT32)
    masks = {key.rpartition("/")[2]: g[key].any() for key in g if key.startswith(f"{name}/asked/image/")}
    assert {camera for camera, seen in masks.items() if seen} == set(processing.robot.images)


@pytest.mark.parametrize("name", FACTS)
def test_the_models_answer_becomes_openpis_actions(name):
    requests, g = requests_of(name), recording("openpi_configs")
    answer = g["answer"][: FACTS[name]["action_horizon"]]
    found = requests.actions(answer, g[f"{FACTS[name]['robot']}/state"].astype(np.float64))
    np.testing.assert_allclose(found, g[f"{name}/answered"], rtol=FLOAT32, atol=FLOAT32)


def test_a_record_is_read_back_from_json():
    for entry in CONFIGURATIONS.values():
        assert conventions_of_json(json.loads(json.dumps(entry.conventions.to_json()))) == entry.conventions
    assert conventions_of_json(Conventions(None, 3, 5).to_json()) == Conventions(None, 3, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"robot": 3}, "conventions.robot must be an object"),
        ({"action_horizon": 0}, "action_horizon is 0, expected at least 1"),
        ({"action_horizon": 10**9}, "action_horizon is 1000000000, expected at least 1 and at most 16384"),
        ({"max_token_len": "48"}, "max_token_len must be a whole number"),
        ({"state_in_prompt": 1}, "state_in_prompt is 1, expected true"),
        ({"asset_id": ["a"]}, "asset_id must be text"),
        ({"horizon": 3}, "unknown key 'horizon'"),
    ],
)
def test_a_damaged_record_is_refused(change, message):
    value = CONFIGURATIONS["pi0_libero"].conventions.to_json() | change
    with pytest.raises(InputError, match=message):
        conventions_of_json(value)


def test_records_differ_by_what_they_mean_and_not_by_the_names_of_columns():
    one = CONFIGURATIONS["pi0_libero"].conventions
    renamed = dataclasses.replace(
        one.robot, name="mine", images={"base_0_rgb": "a", "left_wrist_0_rgb": "b"}, delta=(True,) * 6
    )
    assert list(differences(one, dataclasses.replace(one, robot=renamed, asset_id=None))) == []
    other = CONFIGURATIONS["pi05_libero"].conventions
    found = {name: (a, b) for name, a, b in differences(one, other)}
    assert found == {"action_horizon": (50, 10), "max_token_len": (48, 200), "delta": ([0, 1, 2, 3, 4, 5], [])}
    fewer = dataclasses.replace(other, robot=dataclasses.replace(other.robot, images={"base_0_rgb": "a"}))
    assert [name for name, _, _ in differences(other, fewer)] == ["cameras"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("units", {"units": "own"}),
        ("action_dim", {"action_dim": 7}),
        ("prompt", {"prompt": "push"}),
        ("state_modes", {"state_modes": ("min_max",)}),
        ("action_modes", {"action_modes": ("mean_std",)}),
        ("processor", {"processor": "lerobot"}),
    ],
)
def test_robots_differ_by_everything_that_means_something_to_a_model(name, change):
    one = dataclasses.replace(
        robot_of("pi0_aloha_towel"), state_modes=("mean_std",), action_modes=("min_max",), processor="isaac"
    )
    assert [found for found, _, _ in robot_differences(one, dataclasses.replace(one, **change))] == [name]


def test_a_robot_with_the_keys_of_another_reads_its_columns_and_keeps_its_own_meaning():
    one, keys = robot_of("pi0_aloha_towel"), {"images": {"base_0_rgb": "a"}, "state": ("s",), "actions": ("a",)}
    keys |= {"widths": {"s": 14}, "task": "task_number", "client": {"a": "b"}}
    other = dataclasses.replace(robot_of("pi0_libero"), **keys)
    assert with_keys_of(one, other) == dataclasses.replace(one, **keys)


def test_a_state_that_is_wider_than_the_model_is_only_spelled():
    state_stats = NormStats(*np.full((4, 34), [[0.0], [1.0], [-1.0], [1.0]]))
    stats = {"state": state_stats, "actions": NormStats(*np.ones((4, 8)))}
    architecture = dataclasses.replace(toys.architecture("pi05"), action_dim=32, vocab_size=512)
    tokenizer = load_tokenizer(GOLDEN / "tokenizer/tiny_spm.model")
    robot = Robot("wide", {"base_0_rgb": "image"}, state=("state",), action_dim=8)
    processing = Processing(robot, architecture, stats, tokenizer, 10, 200, True)
    values = {"state": np.linspace(-1, 1, 34), "image": np.zeros((8, 8, 3), np.uint8), "prompt": "go"}
    requests = RobotRequests(processing, architecture)
    inputs, state = requests.inputs(values)
    assert len(state) == 34
    described = family_of(architecture).inputs(architecture, Lengths(10, 200), requests.cameras)
    assert inputs["state"].shape == described["state"].shape
    spelled, _ = tokenizer("go", 200, values["state"] * 2 / (2 + 1e-6))
    np.testing.assert_array_equal(inputs["tokenized_prompt"], spelled)
    small = dataclasses.replace(toys.architecture(), action_dim=32, vocab_size=512)
    projected = RobotRequests(dataclasses.replace(processing, architecture=small, state_in_prompt=False), small)
    with pytest.raises(InputError, match="the robot's state have 34 dimensions, the model at most 32"):
        projected.inputs(values)
