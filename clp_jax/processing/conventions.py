"""What a run and whoever serves it must agree on and no weight tells, as one record."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from clp_jax.editable_json import json_object, typed
from clp_jax.errors import InputError
from clp_jax.processing.robots import Robot, robot_of_json

LONGEST = 2**14
"""Actions of a chunk or tokens of a prompt; more would fill any memory, and no robot or model has them."""

Upstream = Literal["openpi", "Isaac-GR00T"]
"""Who names configurations."""

_FLAGS: dict[Upstream, str] = {"openpi": "--openpi-config", "Isaac-GR00T": "--data-config"}


@dataclasses.dataclass(frozen=True)
class Conventions:
    """How a robot's numbers and words become a model's, and back.

    Attributes:
      robot: cameras, columns, units, relative actions, prompt; None where data were model-ready.
      action_horizon: actions of a chunk.
      max_token_len: tokens of a prompt, padding included.
      state_in_prompt: whether the prompt spells the state; None where nobody knows.
      asset_id: name of the statistics in a checkpoint's assets; None leaves it to the checkpoint.
      config: name of the upstream configuration whose conventions these are; None for one's own.
    """

    robot: Robot | None
    action_horizon: int
    max_token_len: int
    state_in_prompt: bool | None = None
    asset_id: str | None = None
    config: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values, which `conventions_of_json` reads."""
        value = dataclasses.asdict(self)
        if self.robot is not None:
            fields = dataclasses.asdict(self.robot).items()
            value["robot"] = {
                key: list(item) if isinstance(item, tuple) else item for key, item in fields if item is not None
            }
        return value

    def __str__(self) -> str:
        spelled = {True: ", the state in the prompt", False: ", no state in the prompt", None: ""}
        parts = [f"{self.action_horizon} actions, {self.max_token_len} tokens{spelled[self.state_in_prompt]}"]
        if self.robot is not None:
            relative = " ".join(map(str, _relative(self.robot.delta)))
            parts.append(f"actions {relative} relative to the state" if relative else "actions as they are")
            parts += [f"units of {self.robot.units}"] if self.robot.units != "own" else []
            parts += [f"state {_spelled(self.robot.state_modes)}"] if self.robot.state_modes else []
            parts += [f"actions {_spelled(self.robot.action_modes)}"] if self.robot.action_modes else []
            parts += [f"images and prompts of {self.robot.processor}"] if self.robot.processor is not None else []
            parts += [f"prompt {self.robot.prompt!r}"] if self.robot.prompt is not None else []
        parts += [f"statistics {self.asset_id}"] if self.asset_id is not None else []
        return "; ".join(parts)


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A configuration that upstream names.

    Attributes:
      kind: of the model that it is for.
      conventions: all of it.
      trained_from: the form of data that upstream's training reads; others than "lerobot" are not read here.
      upstream: whose name it is.
      names_parts: whether its robot names parts of a data set's ``meta/modality.json`` in place of columns; then the
        prompt is as long as the model has it.
    """

    kind: str
    conventions: Conventions
    trained_from: str = "lerobot"
    upstream: Upstream = "openpi"
    names_parts: bool = False

    @property
    def flag(self) -> str:
        """The flag of commands that takes its name."""
        return _FLAGS[self.upstream]

    def __str__(self) -> str:
        return f"{self.upstream}'s {self.conventions.config}"


def conventions_of_json(value: Any) -> Conventions:
    """The inverse of `Conventions.to_json`.

    Raises:
      InputError: a field is missing, unknown or of the wrong type.
    """
    names = [field.name for field in dataclasses.fields(Conventions)]
    value = json_object(value, "conventions", names[:3], names[3:])
    for name in ("action_horizon", "max_token_len"):
        if not 1 <= typed(value[name], int, f"conventions.{name}") <= LONGEST:
            raise InputError(f"conventions.{name} is {value[name]}, expected at least 1 and at most {LONGEST}")
    for name in ("asset_id", "config"):
        if value.get(name) is not None:
            typed(value[name], str, f"conventions.{name}")
    if not isinstance(value.get("state_in_prompt"), bool | None):
        raise InputError(f"conventions.state_in_prompt is {value['state_in_prompt']!r}, expected true, false or null")
    robot = None if value["robot"] is None else robot_of_json(value["robot"], "conventions.robot")
    return Conventions(**value | {"robot": robot})


def differences(one: Conventions, other: Conventions) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of everything that two records say and say differently.

    What is None is not said. Keys of columns and of requests are not compared: they name what the robot's fields mean.
    """
    for name in ("action_horizon", "max_token_len", "state_in_prompt", "asset_id"):
        yield from _unequal(name, getattr(one, name), getattr(other, name))
    if one.robot is not None and other.robot is not None:
        yield from robot_differences(one.robot, other.robot)


def robot_differences(one: Robot, other: Robot) -> Iterator[tuple[str, Any, Any]]:
    """As `differences`, of what two robots mean to a model."""
    yield from _unequal("cameras", sorted(one.images), sorted(other.images))
    yield from _unequal("delta", _relative(one.delta), _relative(other.delta))
    for name in ("state_modes", "action_modes"):
        yield from _unequal(name, getattr(one, name) or None, getattr(other, name) or None)
    for name in ("units", "processor", "action_dim", "prompt"):
        yield from _unequal(name, getattr(one, name), getattr(other, name))


def with_keys_of(robot: Robot, other: Robot) -> Robot:
    """The robot, reading the other's columns and requests."""
    keys: Mapping[str, Any] = {
        name: getattr(other, name) for name in ("images", "state", "actions", "widths", "task", "client")
    }
    return dataclasses.replace(robot, **keys)


def _unequal(name: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    if one is not None and other is not None and one != other:
        yield name, one, other


def _spelled(modes: tuple[str, ...]) -> str:
    """The modes of parts, those of neighbours that are alike once.

    >>> _spelled(("min_max", "min_max", "quaternion>rotation_6d", ""))
    '2 min_max, quaternion>rotation_6d, as it is'
    """
    runs = [(mode or "as it is", len(list(run))) for mode, run in itertools.groupby(modes)]
    return ", ".join(mode if count == 1 else f"{count} {mode}" for mode, count in runs)


def _relative(delta: tuple[bool, ...]) -> list[int]:
    """The dimensions that are relative: a mask may be shorter than the actions."""
    return [i for i, moved in enumerate(delta) if moved]
