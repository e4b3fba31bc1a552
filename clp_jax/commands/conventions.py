"""Whose conventions a command uses: a configuration's, those of the run that trained a checkpoint, or assumed ones."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from clp_jax.errors import InputError
from clp_jax.models import Architecture, configurations, family_of, family_of_kind, robots, why_unrecorded
from clp_jax.processing.conventions import (
    Configuration,
    Conventions,
    differences,
    robot_differences,
    with_keys_of,
)
from clp_jax.processing.robots import Robot, find_robot
from clp_jax.provenance import conventions_of, trained_with, was_trained

_VALUES = ("action_horizon", "max_token_len", "state_in_prompt", "asset_id")
_RECORD = "the checkpoint's clp.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """What the flags of a command say about conventions; the fields are the flags."""

    openpi_config: str | None = None
    data_config: str | None = None
    robot: str | None = None
    image: tuple[str, ...] = ()
    state_key: tuple[str, ...] = ()
    action_key: tuple[str, ...] = ()
    prompt: str | None = None
    action_horizon: int | None = None
    max_token_len: int | None = None
    state_in_prompt: bool | None = None
    asset_id: str | None = None

    @property
    def configuration(self) -> str | None:
        """The configuration that a flag names.

        Raises:
          InputError: two flags name one each.
        """
        if self.openpi_config is not None and self.data_config is not None:
            raise InputError("--openpi-config and --data-config each name a configuration; leave one of them out.")
        return self.openpi_config or self.data_config

    @property
    def names_robot(self) -> bool:
        """Whether a flag says something about a robot."""
        return bool(self.robot or self.image or self.state_key or self.action_key)


def told_by(flags: Any) -> Told:
    """What a command's flags say, those of them that it has."""
    names = [field.name for field in dataclasses.fields(Told) if hasattr(flags, field.name)]
    return Told(**{name: getattr(flags, name) for name in names})


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Conventions, and why these.

    Attributes:
      conventions: their robot is None if nobody named one.
      why: whose they are, for people.
      assumed: whether neither the user nor the checkpoint said all of it, so that the user must read it.
    """

    conventions: Conventions
    why: str
    assumed: bool = False

    def __str__(self) -> str:
        return f"{self.why}: {self.conventions}"


def choose_conventions(
    told: Told, architecture: Architecture, record: Mapping[str, Any] | None, *, new_run: bool = False
) -> Chosen:
    """The conventions for a checkpoint.

    Args:
      told: by the flags.
      architecture: of the checkpoint.
      record: the checkpoint's ``clp.json``, if it has one.
      new_run: whether a training begins, which may leave the conventions of the run before it.

    Raises:
      InputError: no such configuration or robot, one for another kind of model, or a flag that contradicts the
        configuration or the record.
    """
    recorded = conventions_of(record)
    if told.configuration is not None:
        return of_configuration(told, architecture, None if new_run else recorded)
    if recorded is not None and not new_run:
        return Chosen(_with_flags(told, recorded, _RECORD, architecture), "as trained, by clp.json")
    if recorded is not None and not told.names_robot:
        return Chosen(_with_flags(told, recorded, None, architecture), "as the checkpoint was trained")
    return _assumed(told, architecture, None if new_run else record)


def of_configuration(told: Told, architecture: Architecture | None, trained: Conventions | None = None) -> Chosen:
    """The conventions of the configuration that a flag names.

    Args:
      told: by the flags.
      architecture: of the checkpoint, if there is one.
      trained: with which a run trained it, if it recorded them.

    Raises:
      InputError: as `choose_conventions`.
    """
    named = configuration(told, architecture)
    found, whose = named.conventions, str(named)
    if named.names_parts and trained is not None and trained.config == found.config:
        found = trained  # with the columns that its data had
    elif trained is not None:
        _refuse(
            [
                f"{name} is {one} by {whose}, {other} by {_RECORD}"
                for name, one, other in differences(found, trained)
                if name != "asset_id"  # statistics may have been saved under another name
            ],
            _RECORD,
        )
        found = dataclasses.replace(found, asset_id=trained.asset_id or found.asset_id)
    elif named.names_parts and architecture is not None and found.robot is not None:
        lengths = family_of(architecture).lengths(architecture, len(found.robot.images))
        prompt = lengths.prompt if told.max_token_len is None else told.max_token_len
        found = dataclasses.replace(found, max_token_len=prompt)
    return Chosen(_with_flags(told, found, whose, architecture), whose)


def configuration(told: Told, architecture: Architecture | None) -> Configuration:
    """The configuration that a flag names.

    Raises:
      InputError: there is none, it belongs to another flag, or is for another kind of model than ``architecture``.
    """
    name, known = told.configuration, configurations()
    assert name is not None
    flag = "--openpi-config" if told.openpi_config is not None else "--data-config"
    of_flag = [other for other, entry in known.items() if entry.flag == flag]
    if (reason := why_unrecorded(name)) is not None:
        raise InputError(f"{flag} {name} has no record here: {reason}.")
    if name not in known:
        near = difflib.get_close_matches(name, of_flag, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(of_flag)}."
        raise InputError(f"{flag} {name!r} is not known here; {hint}")
    found = known[name]
    if found.flag != flag:
        raise InputError(f"{name} is {found.upstream}'s; give it with {found.flag}.")
    if architecture is not None and found.kind != architecture.kind:
        title = family_of_kind(found.kind).TITLES[found.kind]
        raise InputError(
            f"{flag} {name} is for a {title}, the checkpoint is a {family_of(architecture).TITLES[architecture.kind]}."
        )
    return found


def stands_for(robot: str | None, architecture: Architecture) -> Configuration | None:
    """The configuration that the robot's name alone stands for, with this kind of model; None without."""
    return next(iter(_configurations_of(robot, architecture)), None)


def robot_told(
    told: Told,
    architecture: Architecture | None,
    *,
    start: Robot | None = None,
    known: Mapping[str, Robot] | None = None,
) -> Robot | None:
    """The robot that flags name, else the one to start with.

    Args:
      told: by the flags.
      architecture: of the checkpoint; without one, no camera is checked.
      start: what the flags change where they name none.
      known: robots by name; None takes what the names stand for, with this kind of model.

    Raises:
      InputError: as `find_robot`.
    """
    if not told.names_robot:
        return start
    known = _robots(architecture) if known is None else known
    cameras = None if architecture is None else family_of(architecture).robot_cameras(architecture)
    return find_robot(
        told.robot,
        known,
        cameras=cameras,
        start=start,
        images=told.image,
        state=told.state_key,
        actions=told.action_key,
    )


def _robots(architecture: Architecture | None) -> Mapping[str, Robot]:
    if architecture is None:
        return robots()
    found = {name: stands_for(name, architecture) for name in family_of(architecture).ROBOTS}
    named = {name: entry.conventions.robot for name, entry in found.items() if entry is not None}
    return family_of(architecture).ROBOTS | named


def _configurations_of(robot: str | None, architecture: Architecture) -> list[Configuration]:
    """Those of a robot and a kind of model, the one that the robot's name stands for first."""
    return [
        entry
        for entry in family_of(architecture).CONFIGURATIONS.values()
        if entry.kind == architecture.kind
        and entry.conventions.robot is not None
        and entry.conventions.robot.name == robot
    ]


def _with_flags(told: Told, base: Conventions, whose: str | None, architecture: Architecture | None) -> Conventions:
    """The conventions with what the flags add: keys of columns, and what the conventions leave open.

    Args:
      told: by the flags.
      base: the conventions.
      whose: they are, where a flag may not contradict them; None where it may.
      architecture: of the checkpoint.
    """
    given = {name: value for name in _VALUES if (value := getattr(told, name)) is not None}
    wrong = [
        f"{name} is {value} by the flags, {getattr(base, name)} by {whose}"
        for name, value in given.items()
        if getattr(base, name) not in (None, value)
    ]
    own = None if architecture is None else family_of(architecture).own_robot(architecture)
    robot = robot_told(told, architecture, start=own if base.robot is None else base.robot)
    if robot is not None and told.names_robot and own is None and base.robot is not None and whose is not None:
        named = f"--robot {told.robot}" if told.robot else "the flags"
        found = robot_differences(robot, base.robot)
        wrong += [f"{name} is {one} by {named}, {other} by {whose}" for name, one, other in found]
        robot = with_keys_of(base.robot, robot)
    if robot is not None and told.prompt is not None:
        if whose is not None and robot.prompt not in (None, told.prompt):
            wrong.append(f"prompt is {told.prompt!r} by the flags, {robot.prompt!r} by {whose}")
        robot = _with_prompt(robot, told.prompt)
    if whose is not None:
        _refuse(wrong, whose)
    return dataclasses.replace(base, robot=robot, **given)


def _assumed(told: Told, architecture: Architecture, record: Mapping[str, Any] | None) -> Chosen:
    """What flags say, then the record of a run that wrote no conventions, then upstream."""
    family = family_of(architecture)
    unrecorded, own = was_trained(record), family.own_robot(architecture)
    standard = None if unrecorded else stands_for(told.robot, architecture)
    robot = robot_told(told, architecture, start=own, known=family.UNRECORDED_ROBOTS if unrecorded else None)
    if robot is not None and told.prompt is not None:
        robot = _with_prompt(robot, told.prompt)
    lengths = family.lengths(architecture, None if robot is None else len(robot.images))
    values = {"action_horizon": lengths.horizon, "max_token_len": lengths.prompt}
    if standard is not None:
        values |= {name: getattr(standard.conventions, name) for name in _VALUES[:3]}
    values |= trained_with(record)
    values |= {name: value for name in _VALUES if (value := getattr(told, name)) is not None}
    conventions = Conventions(robot, **values)
    if own is not None:
        return Chosen(conventions, "by the checkpoint's own files")
    if unrecorded:
        return Chosen(conventions, "as trained, by what an earlier version recorded")
    return Chosen(conventions, _why_assumed(told, conventions, standard, architecture), assumed=robot is not None)


def _why_assumed(
    told: Told, conventions: Conventions, standard: Configuration | None, architecture: Architecture
) -> str:
    if conventions.robot is None:
        return "model-ready"
    if standard is None:
        named = f"robot {told.robot} is" if told.robot else "the flags are"
        upstreams = sorted({entry.upstream for entry in family_of(architecture).CONFIGURATIONS.values()})
        whose = f" of {' or '.join(upstreams)}" if upstreams else ""
        return f"assumed, as {named} of no configuration{whose} with this kind of model"
    changed = [name for name, _, _ in differences(conventions, standard.conventions)]
    others = [entry.conventions for entry in _configurations_of(told.robot, architecture)]
    others = [str(other.config) for other in others if any(differences(other, standard.conventions))]
    exceptions = f" but for {', '.join(changed)}" if changed else ""
    alternatives = f" (not {', '.join(others)}: choose with --openpi-config)" if others else ""
    return f"assumed for --robot {told.robot}, as in openpi's {standard.conventions.config}{exceptions}{alternatives}"


def _with_prompt(robot: Robot, prompt: str) -> Robot:
    return dataclasses.replace(robot, prompt=prompt, prompt_from_task=False)


def _refuse(contradictions: list[str], whose: str | None) -> None:
    """Raise on contradictions between flags and a configuration or record, of which only flags can be left out."""
    todo = "Leave the flags out, for it was trained so." if whose == _RECORD else "Leave one of the two out."
    if contradictions:
        raise InputError(f"{'; '.join(contradictions)}. {todo}")
