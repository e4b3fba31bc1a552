"""``clp check``: everything that is wrong or odd in a LeRobot data set, before anything is trained on it."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clp_jax.commands.conventions import configuration, robot_told, told_by
from clp_jax.commands.data_flags import RobotFlags, robot_in_set
from clp_jax.commands.results import print_json
from clp_jax.data.proof import Check as Checked
from clp_jax.data.proof import check_set
from clp_jax.data.proof.findings import Finding
from clp_jax.data.recording import open_recording
from clp_jax.data.recordings import checked_sources
from clp_jax.errors import InputError
from clp_jax.processing.robots import Robot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check(RobotFlags):
    """Prove that LeRobot data sets are whole, and list all that has to be repaired; nothing is written."""

    data: tuple[str, ...]
    """LeRobot data set: folder or hub id; or several."""
    prompt: str | None = None
    """Prompt that training will use instead of the data set's tasks, whose texts may then be absent."""
    json: bool = False
    """Print JSON instead of tables."""


def run(config: Check) -> None:
    """Run the command."""
    console = Console(quiet=config.json)
    told = told_by(config)
    named = None if told.configuration is None else configuration(told, None).conventions.robot
    robot = robot_told(told, None, start=named)
    robot = None if robot is None else robot_in_set(robot, config.data)
    found = []
    for source, episodes in checked_sources(config.data, (), config.episodes):
        checks = _check(config, source, episodes, robot)
        _print(console, source, checks)
        found.append((source, checks))
    if config.json:
        print_json([{"data": source, "checks": [_to_json(check) for check in checks]} for source, checks in found])
    if wrong := sum(_faults(checks) for _, checks in found):
        listed = " and ".join(source for source, checks in found if _faults(checks))
        raise InputError(f"{listed} has {wrong} {'fault' if wrong == 1 else 'faults'} to repair, listed above.")


def _check(config: Check, source: str, episodes: str | None, robot: Robot | None) -> Sequence[Checked]:
    """What was looked at in one data set, and what is wrong with it."""
    checks = check_set(
        source,
        columns=None if robot is None else robot.columns,
        cameras=None if robot is None else tuple(dict.fromkeys(robot.images.values())),
        task="task_index" if robot is None else robot.task,
        episodes=episodes,
        prompt=config.prompt if config.prompt is not None else (robot.prompt if robot else None),
        tolerance=config.timestamp_tolerance,
    )
    if robot is None:
        return checks
    if _faults(checks):
        reason = "it is compared with what was read, which has to be repaired first."
        return (*checks, Checked(f"robot {robot.name}", "dimensions", unmade=reason))
    return (*checks, _fits(source, robot, episodes, config.timestamp_tolerance))


def _faults(checks: Sequence[Checked]) -> int:
    return sum(finding.fatal for check in checks for finding in check.findings)


def _to_json(check: Checked) -> dict[str, object]:
    findings = [{"to_repair": finding.fatal, "text": finding.text} for finding in check.findings]
    return {"checked": check.name, "of": check.amount, "findings": findings, "not_checked": check.unmade}


def _fits(source: str, robot: Robot, episodes: str | None, tolerance: float | None) -> Checked:
    """Whether the columns are as wide as the robot needs them."""
    try:
        open_recording(source, robot, episodes=episodes, pictures=False, tolerance=tolerance)
    except InputError as error:
        return Checked(f"robot {robot.name}", "dimensions", (Finding(str(error)),))
    return Checked(f"robot {robot.name}", "dimensions")


def _print(console: Console, source: str, checks: Sequence[Checked]) -> None:
    table = Table()
    for column in ("checked", "of", "found"):
        table.add_column(column)
    for check in checks:
        wrong, odd = (sum(finding.fatal is fatal for finding in check.findings) for fatal in (True, False))
        found = (
            "[yellow]not checked[/]"
            if check.unmade
            else "[red]to repair[/]"
            if wrong
            else "[yellow]odd[/]"
            if odd
            else "[green]good[/]"
        )
        table.add_row(escape(check.name), escape(check.amount), found)
    console.print(table)
    for check in checks:
        for finding in check.findings:
            kind = "[red]to repair:[/]" if finding.fatal else "[yellow]note:[/]"
            console.print(f"{kind} {escape(finding.text)}", soft_wrap=True)
    for check in checks:
        if check.unmade is not None:
            console.print(f"[yellow]not checked:[/] {escape(f'{check.name}: {check.unmade}')}", soft_wrap=True)
    if not _faults(checks):
        console.print(f"{escape(source)} is whole.")
