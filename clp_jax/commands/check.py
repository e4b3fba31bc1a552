"""``clp check``: everything that is wrong or odd in a LeRobot data set, before anything is trained on it."""

import dataclasses

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clp_jax.commands.data_flags import RobotFlags
from clp_jax.data.proof import Check as Checked
from clp_jax.data.proof import check_set
from clp_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check(RobotFlags):
    """Prove that a LeRobot data set is whole, and list all that has to be repaired; nothing is written."""

    data: str
    """LeRobot data set: folder or hub id."""
    prompt: str | None = None
    """Prompt that training will use instead of the data set's tasks, whose texts may then be absent."""


def run(config: Check) -> None:
    """Run the command."""
    console = Console()
    robot = config.find_robot(None)
    checks = check_set(
        config.data,
        columns=None if robot is None else robot.columns,
        cameras=None if robot is None else tuple(dict.fromkeys(robot.images.values())),
        task="task_index" if robot is None else robot.task,
        prompt=config.prompt or (robot.prompt if robot else None),
        tolerance=config.timestamp_tolerance,
    )
    _print(console, checks)
    wrong = sum(finding.fatal for check in checks for finding in check.findings)
    if wrong:
        raise InputError(f"{config.data} has {wrong} {'fault' if wrong == 1 else 'faults'} to repair, listed above.")
    console.print(f"{escape(config.data)} is whole.")


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
