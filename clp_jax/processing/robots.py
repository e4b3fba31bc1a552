"""Robots as data: which column of a data set goes where, and what a robot's numbers mean to the model."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from clp_jax.editable_json import json_object, typed
from clp_jax.errors import InputError
from clp_jax.files import read_json
from clp_jax.processing import columns, modality, transforms

Units = Literal["own", "aloha"]

Processor = Literal["isaac", "lerobot"]
"""Whose handling of images and instructions: two programs that train the same model may differ in it."""


@dataclasses.dataclass(frozen=True)
class Robot:
    """What the pipeline has to know about a robot.

    Attributes:
      name: in messages.
      images: per camera of the model the data set's key; the model runs without the others.
      state: its parts, perhaps none, in order: keys of the data set's columns, or some dimensions as ``key[0:7]``.
      actions: its parts, likewise.
      delta: per action dimension whether the model sees it relative to the state; missing dimensions are absolute.
      units: ``aloha``: joints and grippers are converted to those that π0 was trained with (openpi's adapt_to_pi).
      state_modes: how each part of the state reaches the model, in the words of the model's upstream; none leaves it to
        the kind of model.
      action_modes: likewise of the actions.
      processor: whose handling of images and instructions; None leaves it to the kind of model.
      action_dim: dimensions of the actions; None leaves it to the data set.
      widths: dimensions that columns must have, by key; columns that are not named may have any number.
      task: key of the column with the number of each row's task.
      prompt: where a request has none, and a data set no tasks.
      prompt_from_task: whether the tasks of a data set are its prompts; if not, ``prompt`` is the one of every row.
      client: per key of the data set the one that openpi's clients send to a server, where it is another. Clients send
        whole columns, of which the server chooses; a part ``key[0:7]`` that has an entry of its own is sent as it is.
    """

    name: str
    images: Mapping[str, str]
    state: tuple[str, ...] = ("observation.state",)
    actions: tuple[str, ...] = ("action",)
    delta: tuple[bool, ...] = ()
    units: Units = "own"
    state_modes: tuple[str, ...] = ()
    action_modes: tuple[str, ...] = ()
    processor: Processor | None = None
    action_dim: int | None = None
    widths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    task: str = "task_index"
    prompt: str | None = None
    prompt_from_task: bool = True
    client: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """The data set's columns that state and actions are parts of."""
        return columns.keys(*self.state, *self.actions)

    def check_plain(self, kind: str) -> None:
        """Raise an `InputError` if the robot says how parts reach the model, for a kind that has one way alone."""
        if self.state_modes or self.action_modes or self.processor is not None:
            raise InputError(
                f"robot {self.name!r} has state_modes, action_modes or a processor, of which a {kind} knows none; "
                "leave them out of the robot file."
            )


def mask(*counts: int) -> tuple[bool, ...]:
    """Runs of True, and of False for negative numbers.

    >>> mask(2, -1)
    (True, True, False)
    """
    return tuple(value for count in counts for value in [count > 0] * abs(count))


def find_robot(
    name: str | None,
    known: Mapping[str, Robot],
    *,
    cameras: Sequence[str] | None = None,
    start: Robot | None = None,
    images: Sequence[str] = (),
    state: Sequence[str] = (),
    actions: Sequence[str] = (),
) -> Robot:
    """The robot of these flags.

    Args:
      name: one of the known, or a ``.json`` file with the fields of `Robot`; None is ``start`` with what the other
        arguments say.
      known: robots by name.
      cameras: those of the model; None does not check them.
      start: what a checkpoint says of its robot; a robot with nothing if None.
      images: ``camera=key`` each, on top of the robot's.
      state: parts of the state, instead of the robot's.
      actions: parts of the actions, instead of the robot's.

    Raises:
      InputError: no such robot, a broken file, an unknown camera.

    >>> own = Robot("own", {"base_0_rgb": "top"})
    >>> find_robot("own", {"own": own}, images=["left_wrist_0_rgb=wrist"]).images
    {'base_0_rgb': 'top', 'left_wrist_0_rgb': 'wrist'}
    """
    if name is None:
        robot = start or Robot("own", {})
    elif name in known:
        robot = known[name]
    elif name.endswith(".json"):
        robot = read_robot(name, cameras)
    else:
        listed = f"choose one of {', '.join(known)}, or give" if known else "give"
        raise InputError(f"there is no robot {name!r}; {listed} a .json file.")
    pairs = {camera: key for camera, _, key in (text.partition("=") for text in images)}
    if not all(camera and key for camera, key in pairs.items()):
        raise InputError(f"--image is written camera=key, for example base_0_rgb=observation.images.top, not {images}.")
    robot = dataclasses.replace(
        robot,
        images={**robot.images, **pairs},
        state=tuple(state) or robot.state,
        actions=tuple(actions) or robot.actions,
    )
    try:
        return _checked(robot, cameras)
    except InputError as error:
        raise InputError(f"{name}: {error}" if name is not None and name.endswith(".json") else str(error)) from None


def read_robot(path: str | os.PathLike[str], cameras: Sequence[str] | None = None) -> Robot:
    """A robot from a JSON file with the fields of `Robot`, or from a data set's ``meta/modality.json``.

    Args:
      path: the file; ``delta`` in it may be counts as for `mask`.
      cameras: those of the model, of which a modality.json may know some; None takes all of its videos.

    Raises:
      InputError: the file is missing or broken, or a field is unknown or of the wrong type.
    """
    content = read_json(path, finite=True)
    try:
        if isinstance(content, dict) and "video" in content:
            return Robot(Path(path).name, **modality.robot_fields(content, cameras))
        return robot_of_json({"name": Path(path).name} | typed(content, dict, "the robot"), "the robot")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def with_modality(robot: Robot, path: str | os.PathLike[str]) -> Robot:
    """A robot that names parts and videos of a data set's ``meta/modality.json``, with the columns that they are.

    Clients go on to send these names.

    Args:
      robot: as a configuration has it, see `modality.names_parts`.
      path: the file.

    Raises:
      InputError: the file is missing or broken, or lacks something that the robot names.
    """
    content = read_json(path, finite=True)
    try:
        named = {name: getattr(robot, name) for name in ("images", "state", "actions", "task")}
        modes = {name: getattr(robot, name) for name in ("state_modes", "action_modes")}
        return dataclasses.replace(robot, **modality.columns_of(content, **named, **modes))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def robot_of_json(value: Any, where: str) -> Robot:
    """A robot from JSON values by the names of its fields; ``delta`` may be counts as for `mask`.

    Args:
      value: from a file.
      where: its name in messages.

    Raises:
      InputError: a field is missing, unknown or of the wrong type.
    """
    known = [field.name for field in dataclasses.fields(Robot)]
    value = json_object(value, where, ["name", "images"], known)
    fields: dict[str, Any] = dict(value)
    for key, wanted in (("name", str), ("units", str), ("task", str), ("prompt", str), ("action_dim", int)):
        if key in value:
            typed(value[key], wanted, key)
    if not isinstance(value.get("prompt_from_task", True), bool):
        raise InputError(f"prompt_from_task must be true or false, not {value['prompt_from_task']!r}")
    fields |= {name: _pairs(value[name], name, str) for name in ("images", "client") if name in value}
    fields |= {"widths": _pairs(value["widths"], "widths", int)} if "widths" in value else {}
    lists = ("state", "actions", "state_modes", "action_modes")
    fields |= {name: _texts(value[name], name) for name in lists if name in value}
    fields |= {"delta": _delta(typed(value["delta"], list, "delta"))} if "delta" in value else {}
    if fields.get("units", "own") not in get_args(Units):
        raise InputError(f"units {fields['units']!r} are unknown; give {' or '.join(get_args(Units))}.")
    if fields.get("processor") not in (None, *get_args(Processor)):
        raise InputError(f"processor {fields['processor']!r} is unknown; give {' or '.join(get_args(Processor))}.")
    if fields.get("prompt") is None and not fields.get("prompt_from_task", True):
        raise InputError("prompt_from_task is false, and there is no prompt to take instead")
    return Robot(**fields)


def _pairs(value: Any, name: str, wanted: type) -> dict[str, Any]:
    """Key to value; keys that begin with "_" are comments."""
    pairs = {key: typed(item, wanted, f"{name}.{key}") for key, item in typed(value, dict, name).items()}
    return {key: item for key, item in pairs.items() if not key.startswith("_")}


def _texts(value: Any, name: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else typed(value, list, name)
    return tuple(typed(text, str, f"a key of {name}") for text in texts)


def _delta(values: list[Any]) -> tuple[bool, ...]:
    """As written, or from counts as for `mask`."""
    if all(isinstance(value, bool) for value in values):
        return tuple(values)
    if any(isinstance(value, bool) for value in values):
        raise InputError("delta mixes counts with true and false")
    if 0 in values:  # a count of none means nothing, but a list of 0 and 1 looks like true and false
        raise InputError("delta holds a count of 0; write true and false per dimension, or counts as [6, -1]")
    return mask(*(typed(value, int, "a count of delta") for value in values))


def _checked(robot: Robot, cameras: Sequence[str] | None) -> Robot:
    unknown = [] if cameras is None else sorted(set(robot.images) - set(cameras))
    if unknown:
        raise InputError(f"{', '.join(unknown)} is no camera of the model; it has {', '.join(cameras or ())}.")
    columns.keys(*robot.state, *robot.actions)  # raises where one is not written as it should be
    if not robot.state and (any(robot.delta) or robot.units != "own"):
        raise InputError("a robot without state has absolute actions in its own units; leave out delta and units.")
    if not robot.actions:
        raise InputError("the robot has no actions; name their column in actions.")
    if not robot.images:
        raise InputError("the robot has no camera; give --robot, or --image base_0_rgb=<the data set's key>.")
    return robot


def to_model_units(
    robot: Robot, state: Float[np.ndarray, "*n d"], actions: Float[np.ndarray, "*m adim"] | None = None
) -> tuple[Float[np.ndarray, "*n d"], Float[np.ndarray, "*m adim"] | None]:
    """State and absolute actions in the units that the model knows; not normalised."""
    if robot.units == "aloha":
        state = transforms.aloha_state_to_pi(state)
        actions = None if actions is None else transforms.aloha_actions_to_pi(actions)
    return state, actions
