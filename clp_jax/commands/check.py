"""``clp check``: everything that is wrong or odd in a LeRobot data set, before anything is trained on it."""

import dataclasses

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clp_jax.commands.conventions import configuration, robot_told, told_by
from clp_jax.commands.data_flags import RobotFlags, robot_in_set
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


def run(config: Check) -> None:
    """Run the command."""
    console = Console()
    told = told_by(config)
    named = None if told.configuration is None else configuration(told, None).conventions.robot
    robot = robot_told(told, None, start=named)
    robot = None if robot is None else robot_in_set(robot, config.data)
    wrong = [
        _check(config, source, episodes, robot, console)
        for source, episodes in checked_sources(config.data, (), config.episodes)
    ]
    if sum(wrong):
        listed = " and ".join(source for source, count in zip(config.data, wrong, strict=True) if count)
        raise InputError(
            f"{listed} has {sum(wrong)} {'fault' if sum(wrong) == 1 else 'faults'} to repair, listed above."
        )


def _check(config: Check, source: str, episodes: str | None, robot: Robot | None, console: Console) -> int:
    """Shows what is wrong with one data set; returns the number of faults."""
    checks = check_set(
        source,
        columns=None if robot is None else robot.columns,
        cameras=None if robot is None else tuple(dict.fromkeys(robot.images.values())),
        task="task_index" if robot is None else robot.task,
        episodes=episodes,
        prompt=config.prompt or (robot.prompt if robot else None),
        tolerance=config.timestamp_tolerance,
    )
    if robot is not None and not any(finding.fatal for check in checks for finding in check.findings):
        checks = (*checks, _fits(source, robot, episodes, config.timestamp_tolerance))
    _print(console, checks)
    wrong = sum(finding.fatal for check in checks for finding in check.findings)
    if not wrong:
        console.print(f"{escape(source)} is whole.")
    return wrong


def _fits(source: str, robot: Robot, episodes: str | None, tolerance: float | None) -> Checked:
    """Whether the columns are as wide as the robot needs them."""
    try:
        open_recording(source, robot, episodes=episodes, pictures=False, tolerance=tolerance)
    except InputError as error:
        return Checked(f"robot {robot.name}", "dimensions", (Finding(str(error)),))
    return Checked(f"robot {robot.name}", "dimensions")


def _print(console: Console, checks: tuple[Checked, ...]) -> None:
    table = Table()
    for column in ("checked", "of", "found"):
        table.add_column(column)
    for check in checks:
        wrong, odd = (sum(finding.fatal is fatal for finding in check.findings) for fatal in (True, False))
        found = "[red]to repair[/]" if wrong else "[yellow]odd[/]" if odd else "[green]good[/]"
        table.add_row(escape(check.name), escape(check.amount), found)
    console.print(table)
    for check in checks:
        for finding in check.findings:
            kind = "[red]to repair:[/]" if finding.fatal else "[yellow]note:[/]"
            console.print(f"{kind} {escape(finding.text)}", soft_wrap=True)
