"""Robots as data: which column of a data set goes where, and what a robot's numbers mean to the model.

The mappings are openpi's: LIBERO (policies/libero_policy.py), ALOHA (aloha_policy.py) and DROID (droid_policy.py) at
commit 15a9616, with their data configurations. METAWORLD fits the sets that lerobot publishes.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from clp_jax.editable_json import json_object, read_json, typed
from clp_jax.errors import InputError
from clp_jax.models import CAMERAS

Units = Literal["own", "aloha"]


@dataclasses.dataclass(frozen=True)
class Robot:
    """What the pipeline has to know about a robot.

    Attributes:
      name: in messages.
      images: per camera of the model the data set's key; the model runs without the others.
      state: keys of the state's parts, in order.
      actions: key of the actions.
      delta: per action dimension whether the model sees it relative to the state; missing dimensions are absolute.
      units: ``aloha``: joints and grippers are converted to those that π0 was trained with (openpi's adapt_to_pi).
      action_dim: dimensions of the actions; None leaves it to the data set.
      prompt: where the data set has no tasks.
      client: per key of the data set the one that openpi's clients send to a server, where it is another.
    """

    name: str
    images: Mapping[str, str]
    state: tuple[str, ...] = ("observation.state",)
    actions: str = "action"
    delta: tuple[bool, ...] = ()
    units: Units = "own"
    action_dim: int | None = None
    prompt: str | None = None
    client: Mapping[str, str] = dataclasses.field(default_factory=dict)


def mask(*counts: int) -> tuple[bool, ...]:
    """Runs of True, and of False for negative numbers.

    >>> mask(2, -1)
    (True, True, False)
    """
    return tuple(value for count in counts for value in [count > 0] * abs(count))


LIBERO = Robot(
    "libero",
    {"base_0_rgb": "image", "left_wrist_0_rgb": "wrist_image"},
    state=("state",),
    actions="actions",
    action_dim=7,
)
"""openpi's LIBERO sets, whose actions are differences already."""

ALOHA = Robot(
    "aloha",
    {
        "base_0_rgb": "observation.images.cam_high",
        "left_wrist_0_rgb": "observation.images.cam_left_wrist",
        "right_wrist_0_rgb": "observation.images.cam_right_wrist",
    },
    delta=mask(6, -1, 6, -1),
    units="aloha",
    action_dim=14,
)
"""Real ALOHA."""

ALOHA_SIM = dataclasses.replace(
    ALOHA,
    name="aloha-sim",
    images={"base_0_rgb": "observation.images.top"},
    prompt="Transfer cube",
    client={"observation.images.top": "images/cam_high"},
)
"""lerobot's simulated ALOHA sets: one camera."""

DROID = Robot(
    "droid",
    {"base_0_rgb": "exterior_image_1_left", "left_wrist_0_rgb": "wrist_image_left"},
    state=("joint_position", "gripper_position"),
    actions="actions",
    action_dim=8,
)
"""Own data in DROID's form, with joint velocities as actions."""

METAWORLD = Robot("metaworld", {"base_0_rgb": "observation.image"}, action_dim=4)
"""lerobot's MetaWorld sets: one camera, position and gripper as state and action."""

ROBOTS = {robot.name: robot for robot in (LIBERO, ALOHA, ALOHA_SIM, DROID, METAWORLD)}


def find_robot(
    name: str | None,
    *,
    images: Sequence[str] = (),
    state: Sequence[str] = (),
    actions: str | None = None,
) -> Robot:
    """The robot of these flags.

    Args:
      name: one of `ROBOTS`, or a ``.json`` file with the fields of `Robot`; None is a robot with nothing but what the
        other arguments say.
      images: ``camera=key`` each, on top of the robot's.
      state: keys of the state, instead of the robot's.
      actions: key of the actions, instead of the robot's.

    Raises:
      InputError: no such robot, a broken file, an unknown camera.

    >>> find_robot("metaworld", images=["left_wrist_0_rgb=observation.wrist"]).images
    {'base_0_rgb': 'observation.image', 'left_wrist_0_rgb': 'observation.wrist'}
    """
    if name is None:
        robot = Robot("own", {})
    elif name in ROBOTS:
        robot = ROBOTS[name]
    elif name.endswith(".json"):
        robot = read_robot(name)
    else:
        raise InputError(f"there is no robot {name!r}; choose one of {', '.join(ROBOTS)}, or give a .json file.")
    pairs = {camera: key for camera, _, key in (text.partition("=") for text in images)}
    if not all(camera and key for camera, key in pairs.items()):
        raise InputError(f"--image is written camera=key, for example base_0_rgb=observation.images.top, not {images}.")
    robot = dataclasses.replace(
        robot,
        images={**robot.images, **pairs},
        state=tuple(state) or robot.state,
        actions=actions or robot.actions,
    )
    return _checked(robot)


def read_robot(path: str | os.PathLike[str]) -> Robot:
    """A robot from a JSON file with the fields of `Robot`; ``delta`` may be counts as for `mask`.

    Raises:
      InputError: the file is missing or broken, or a field is unknown or of the wrong type.
    """
    try:
        value = json_object(
            read_json(path),
            "the robot",
            ["images"],
            ["name", "state", "actions", "delta", "units", "action_dim", "prompt", "client"],
        )
        fields: dict[str, Any] = {"name": Path(path).name} | value
        for key, wanted in (("name", str), ("actions", str), ("units", str), ("prompt", str), ("action_dim", int)):
            if key in value:
                typed(value[key], wanted, key)
        fields |= {name: _pairs(value[name], name) for name in ("images", "client") if name in value}
        fields |= {"state": _texts(value["state"])} if "state" in value else {}
        fields |= {"delta": _delta(typed(value["delta"], list, "delta"))} if "delta" in value else {}
        if fields.get("units", "own") not in get_args(Units):
            raise InputError(f"units {fields['units']!r} are unknown; give {' or '.join(get_args(Units))}.")
        return _checked(Robot(**fields))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _pairs(value: Any, name: str) -> dict[str, str]:
    """Key to text; keys that begin with "_" are comments."""
    pairs = {key: typed(item, str, f"{name}.{key}") for key, item in typed(value, dict, name).items()}
    return {key: item for key, item in pairs.items() if not key.startswith("_")}


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(
        typed(key, str, "a key of state")
        for key in ([value] if isinstance(value, str) else typed(value, list, "state"))
    )


def _delta(values: list[Any]) -> tuple[bool, ...]:
    """As written, or from counts as for `mask`."""
    if all(isinstance(value, bool) for value in values):
        return tuple(values)
    if any(isinstance(value, bool) for value in values):
        raise InputError("delta mixes counts with true and false")
    return mask(*(typed(value, int, "a count of delta") for value in values))


def _checked(robot: Robot) -> Robot:
    unknown = sorted(set(robot.images) - set(CAMERAS))
    if unknown:
        raise InputError(f"{', '.join(unknown)} is no camera of the model; it has {', '.join(CAMERAS)}.")
    if not robot.images:
        raise InputError("the robot has no camera; give --robot, or --image base_0_rgb=<the data set's key>.")
    return robot
