"""Two policies that met the same episodes: which solved more, and how sure that is."""

from collections.abc import Mapping
from typing import Any

from clp_jax.errors import InputError
from clp_jax.evaluation.saving import differences
from clp_jax.evaluation.statistics import paired_difference, sign_test

_STARTS = ("env", "libero_suite", "seed", "max_steps")
"""Flags that decide what an episode is; policies may be asked in different ways, and that is what one may compare."""


def check_comparable(first: Mapping[str, Any], second: Mapping[str, Any], where: str) -> None:
    """Raise unless two results are of the same episodes.

    Args:
      first: flags, name of the suite and tasks of an evaluation.
      second: the same of another.
      where: its name in messages.

    Raises:
      InputError: the suite, or a flag that decides what an episode is, differs, or they have no task in common.
    """
    told = ({name: one["flags"].get(name) for name in _STARTS} | {"suite": one["suite"]} for one in (second, first))
    found = differences(*told)
    if found:
        raise InputError(f"--against {where} is of other episodes: {'; '.join(found)}. Give the same flags as there.")
    if not set(first["tasks"]) & set(second["tasks"]):
        raise InputError(
            f"--against {where} has other tasks: {', '.join(second['tasks'])}. Give some of them as --tasks."
        )


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Episodes that both played, per task and over all: who solved them, with the interval of the difference.

    Args:
      first: content of ``results.json``.
      second: that of the other policy.

    Returns:
      Plain numbers for JSON: ``difference`` is the first's rate minus the second's, ``p`` that of `sign_test`.
    """
    outcomes = [_outcomes(one) for one in (first, second)]
    common = {task: sorted(set(outcomes[0][task]) & set(outcomes[1].get(task, {}))) for task in outcomes[0]}
    pairs = {task: [tuple(one[task][number] for one in outcomes) for number in common[task]] for task in common}
    return {
        "tasks": {task: _row(some) for task, some in pairs.items() if some},
        "all": _row([pair for some in pairs.values() for pair in some]),
    }


def _outcomes(results: Mapping[str, Any]) -> dict[str, dict[int, bool]]:
    return {
        task: {row["number"]: row["success"] for row in found["per_episode"]}
        for task, found in results["tasks"].items()
    }


def _row(pairs: list[tuple[bool, bool]]) -> dict[str, Any]:
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    difference, low, high = paired_difference(only_first, only_second, len(pairs))
    return {
        "pairs": len(pairs),
        "first": sum(first for first, _ in pairs),
        "second": sum(second for _, second in pairs),
        "only_first": only_first,
        "only_second": only_second,
        "difference": difference,
        "low": low,
        "high": high,
        "p": sign_test(only_first, only_second),
    }
