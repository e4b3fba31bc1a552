"""Robots from names, flags and files."""

import json

import pytest

from clp_jax.errors import InputError
from clp_jax.models.pi0 import CAMERAS, ROBOTS
from clp_jax.models.pi0.robots import LIBERO
from clp_jax.processing.robots import Robot, mask
from clp_jax.processing.robots import find_robot as find_any_robot


def find_robot(name, **given):
    return find_any_robot(name, ROBOTS, cameras=CAMERAS, **given)


def test_robots_have_openpis_keys_and_masks():
    assert ROBOTS["libero"].images == {"base_0_rgb": "image", "left_wrist_0_rgb": "wrist_image"}
    assert ROBOTS["aloha"].delta == (True,) * 6 + (False,) + (True,) * 6 + (False,)
    assert mask(6, -1, 6, -1) == ROBOTS["aloha"].delta
    assert ROBOTS["droid"].state == ("joint_position", "gripper_position")


def test_flags_change_a_robot():
    robot = find_robot("libero", images=["right_wrist_0_rgb=third"], state=["a", "b"], actions=["c"])
    assert robot.images == {**LIBERO.images, "right_wrist_0_rgb": "third"}
    assert (robot.state, robot.actions) == (("a", "b"), ("c",))
    assert find_robot(None, images=["base_0_rgb=x"]) == Robot("own", {"base_0_rgb": "x"})


def test_robot_from_a_file(tmp_path):
    file = tmp_path / "my.json"
    value = {"images": {"base_0_rgb": "top"}, "state": ["q", "grip"], "actions": "u", "delta": [2, -1], "_why": "arm"}
    file.write_text(json.dumps(value))
    assert find_robot(str(file)) == Robot("my.json", {"base_0_rgb": "top"}, ("q", "grip"), ("u",), (True, True, False))
    file.write_text(json.dumps(value | {"client": {"top": "images/cam_high"}}))
    assert find_robot(str(file)).client == {"top": "images/cam_high"}
    file.write_text(json.dumps(value | {"delta": [True, False]}))
    assert find_robot(str(file)).delta == (True, False)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"images": {"base_0_rgb": "top"}, "sate": "q"}, "my.json: .*unknown key 'sate'"),
        ({"state": "q"}, "my.json: .*'images' is missing"),
        ({"images": {"top": "top"}}, "my.json: top is no camera of the model"),
        ({"images": {"base_0_rgb": 3}}, "images.base_0_rgb must be text"),
        ({"images": {"base_0_rgb": "top"}, "client": {"top": 1}}, "client.top must be text"),
        ({"images": {"base_0_rgb": "top"}, "delta": [1, True]}, "mixes counts"),
        ({"images": {"base_0_rgb": "top"}, "delta": ["x"]}, "must be a whole number"),
        ({"images": {"base_0_rgb": "top"}, "state": 3}, "state must be"),
        ({"images": {"base_0_rgb": "top"}, "actions": ["u[0:2"]}, "my.json: 'u.0:2' names no column"),
        ({"images": {"base_0_rgb": "top"}, "actions": []}, "the robot has no actions"),
        ({"images": {"base_0_rgb": "top"}, "widths": {"q": "7"}}, "widths.q must be a whole number"),
        ({"images": {"base_0_rgb": "top"}, "units": "franka"}, "units 'franka' are unknown"),
        (
            {"images": {"base_0_rgb": "top"}, "processor": "openpi"},
            "processor 'openpi' is unknown; give isaac or lerobot",
        ),
        ({"images": {"base_0_rgb": "top"}, "state_modes": [3]}, "state_modes"),
        ({"images": {"base_0_rgb": "a"}, "delta": [1, 1, 0, 1]}, "a count of 0; write true and false"),
    ],
)
def test_file_with_a_slip_is_refused(tmp_path, value, message):
    file = tmp_path / "my.json"
    file.write_text(json.dumps(value))
    with pytest.raises(InputError, match=message):
        find_robot(str(file))


@pytest.mark.parametrize(
    ("name", "images", "message"),
    [
        ("liberto", [], "there is no robot 'liberto'; choose one of libero"),
        ("libero", ["base_0_rgb"], "written camera=key"),
        ("libero", ["cam=key"], "cam is no camera of the model"),
        (None, [], "has no camera"),
    ],
)
def test_flags_with_a_slip_are_refused(name, images, message):
    with pytest.raises(InputError, match=message):
        find_robot(name, images=images)
