"""What an evaluation found, as plain numbers for JSON and a table."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from clp_jax.evaluation.rollouts import Episode
from clp_jax.evaluation.statistics import wilson


def summary(tasks: Sequence[str], episodes: Sequence[Episode], latencies: Sequence[float]) -> dict[str, Any]:
    """Per task and over all of them: counts, success rate with its 95 % interval, steps; and how long answers took.

    Args:
      tasks: in the order of the result.
      episodes: in any order.
      latencies: seconds of each answer.
    """
    of = {task: sorted((e for e in episodes if e.task == task), key=lambda e: e.number) for task in tasks}
    milliseconds = 1e3 * np.array(latencies)
    return {
        "tasks": {
            task: _counts(some)
            | {"per_episode": [{"number": e.number, "success": e.success, "steps": e.steps} for e in some]}
            for task, some in of.items()
        },
        "all": _counts(episodes),
        "latency": {
            "requests": len(latencies),
            "p50_ms": float(np.quantile(milliseconds, 0.5)),
            "p99_ms": float(np.quantile(milliseconds, 0.99)),
        },
    }


def _counts(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Steps to success are the median over solved episodes; None if there are none."""
    solved = [episode.steps for episode in episodes if episode.success]
    return {
        "successes": len(solved),
        "episodes": len(episodes),
        **wilson(len(solved), len(episodes))._asdict(),
        "steps": sum(episode.steps for episode in episodes),
        "steps_to_success": statistics.median(solved) if solved else None,
    }
