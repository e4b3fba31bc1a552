"""Names that every policy folder of lerobot 0.6 uses, and what a family says of such a folder."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from clp_jax.models.family import Lengths
from clp_jax.processing import columns
from clp_jax.processing.robots import Robot

STATE, ACTION = "observation.state", "action"
"""Features of every policy."""

OBSERVATION = "observation."
"""How keys begin of what lerobot takes for an observation."""

PREFIX = "model."
"""Of every tensor of a policy."""


class Wanted(NamedTuple):
    """What a policy folder is made from, beside the weights.

    Attributes:
      source: the checkpoint, for messages.
      folder: where the files are that say what shapes do not, if there are any.
      assets: where norm stats are, if there are any.
      asset_id: which norm stats; None where there is one.
      lengths: chunk and prompt.
      num_steps: Euler steps.
      robot: whose observations the policy is to read, if that is known.
      dtype: of the weights; None where they are stored in several.
    """

    source: epath.Path
    folder: epath.Path | None
    assets: epath.Path | None
    asset_id: str | None
    lengths: Lengths
    num_steps: int
    robot: Robot | None
    dtype: str | None


class PolicyFiles(NamedTuple):
    """What stands in a policy folder beside the weights, by the names of the files.

    Attributes:
      contents: of JSON files.
      tensors: of safetensors files.
      copies: files that are taken over as they are, from where.
    """

    contents: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, Mapping[str, np.ndarray]]
    copies: Mapping[str, epath.Path]


RENAME = "rename_observations_processor"
"""The step that gives a robot's keys the names of a policy's inputs."""


def step(name: str, **config: Any) -> dict[str, Any]:
    """One step of a processor."""
    return {"registry_name": name, "config": config}


def robot_keys(robot: Robot, prefix: str = "") -> dict[str, str]:
    """The robot's key of each input of a policy that lerobot can rename: cameras, and a state that is one column.

    Args:
      robot: whose observations the policy is to read.
      prefix: of the cameras in the policy's names.
    """
    state = {STATE: robot.state[0]} if _is_column(robot.state) else {}
    return {prefix + camera: key for camera, key in robot.images.items()} | state


def renames(keys: Mapping[str, str]) -> dict[str, str]:
    """``rename_map`` of lerobot's first step for a robot's keys by the policy's names.

    >>> renames({"observation.images.top": "observation.images.front", "observation.state": "joints"})
    {'observation.images.front': 'observation.images.top'}
    """
    return {key: name for name, key in keys.items() if key != name and key.startswith(OBSERVATION)}


def what_no_rename_does(robot: Robot, prefix: str = "") -> tuple[str, ...]:
    """What of the robot's observations lerobot cannot bring into a policy's form, one sentence each."""
    found = []
    if robot.state and not _is_column(robot.state):
        parts = ", ".join(robot.state)
        found.append(f"lerobot's processors do not put the state together: give it {parts} in this order as {STATE}.")
    keys = robot_keys(robot, prefix)
    unread = [f"{key} as {name}" for name, key in keys.items() if not key.startswith(OBSERVATION)]
    if unread:
        found.append(f"lerobot reads keys that begin with {OBSERVATION} alone: give it {', '.join(unread)}.")
    several = [key for key in keys.values() if key.startswith(OBSERVATION) and list(keys.values()).count(key) > 1]
    for key in dict.fromkeys(several):
        names = " and ".join(name for name, other in keys.items() if other == key)
        found.append(f"lerobot gives a key one name: {key} is to be {names}, so give it twice.")
    return tuple(found)


def _is_column(state: Sequence[str]) -> bool:
    """Whether a robot's state is one column as it is."""
    return len(state) == 1 and columns.part(state[0]) == columns.Part(state[0])
