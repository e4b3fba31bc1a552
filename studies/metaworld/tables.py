"""What the tables of both rounds share."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from studies.metaworld import protocol

Rows = list[dict[str, Any]]
"""Runs as `collect` writes them."""


def success(runs: Rows, tasks: Iterable[str] = protocol.NEW_TASKS) -> tuple[int, int]:
    """Solved episodes and all of them, over runs and tasks."""
    done = [run for run in runs if "solved" in run]
    tasks = tuple(tasks)
    return sum(len(run["solved"][task]) for run in done for task in tasks), sum(
        run["episodes"] * len(tasks) for run in done
    )


def success_difference(pairs: Iterable[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[float, float, float]:
    """How much more often the first of each pair succeeds than the second, from the same starts of the same tasks.

    Returns:
      Difference of the rates, and 95 % of a bootstrap over the starts of all tasks. What the pairs differ in stays.
    """
    rows = [_outcomes(one) - _outcomes(other) for one, other in pairs if "solved" in one and "solved" in other]
    differences = np.array(rows)
    rng = np.random.default_rng(0)
    starts = rng.integers(0, differences.shape[1], (2000, differences.shape[1]))
    low, high = np.quantile(differences.mean(axis=0)[starts].mean(axis=1), [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


def _outcomes(run: dict[str, Any]) -> np.ndarray:
    """1 for every start that was solved, task by task."""
    numbers = np.arange(run["episodes"])
    return np.concatenate([np.isin(numbers, run["solved"][task]) for task in protocol.NEW_TASKS]).astype(float)


def final_loss(run: dict[str, Any]) -> float:
    """Held-out loss after the last step."""
    return run["held_out_loss"][max(run["held_out_loss"], key=int)]


def blocks(mask: Sequence[int] | None, depth: int) -> str:
    """The blocks of an arm in words.

    >>> blocks((0, 1, 5), 3), blocks(None, 9), blocks(range(18), 9)
    ('0 1 5', '9 new', 'all')
    """
    if mask is None:
        return f"{depth} new"
    return "all" if len(mask) == protocol.DEPTH else " ".join(map(str, mask))


def header(names: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [row(names), row(["---"] * len(names))]


def row(cells: Sequence[Any]) -> str:
    """A line of a table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"
