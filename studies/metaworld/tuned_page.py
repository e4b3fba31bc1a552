"""The second round's part of ``RESULTS.md``."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from clp_jax.evaluation.statistics import wilson
from studies.metaworld import protocol
from studies.metaworld.tables import Rows, blocks, final_loss, header, row, success, success_difference

Found = dict[str, Any]
"""What `collect.collect_tuned` wrote."""


def text(found: Found) -> str:
    """The part in Markdown."""
    seconds = ", ".join(f"{depth} blocks {value:.3f} s" for depth, value in found["step_seconds"].items())
    rates = ", ".join(f"{rate:g}" for rate in protocol.TUNED_RATES)
    parts = [
        "\n".join(
            [
                "## Second round: every arm at its own learning rate",
                "",
                (
                    f"From the {found['base']} base; Python {found['conditions']['python']}, jax "
                    f"{found['conditions']['packages']['jax']}. Every arm was run with {rates} (beyond them where the "
                    f"first or last was best) and the seed {protocol.TUNING_RUN}; the rate with the least last loss on "
                    f"{protocol.TUNING_EPISODES} other demonstrations a task was then run with the seeds of the table. "
                    f"A step takes {seconds}, from which the steps of equal time follow. Ratios are geometric means "
                    "over the seeds; in brackets two standard errors."
                ),
            ]
        )
    ]
    for depth in protocol.TUNED_DEPTHS:
        parts += [_table(found, regime, depth) for regime in protocol.REGIMES if _reported(found, regime, depth)]
    parts += [_longer(found), _default(found)]
    return "\n\n".join(part for part in parts if part)


def chosen_rate(found: Found, regime: str, name: str) -> float | None:
    """Of an arm, by the runs on the tuning episodes; None before all rates that it takes were run."""
    runs = [run for run in _runs(found, regime, name) if run["seed"] == protocol.TUNING_RUN]
    losses = {run["rate"]: final_loss(run) for run in runs}
    return min(losses, key=lambda rate: losses[rate]) if protocol.next_rate(losses) is None else None


def reported_runs(found: Found, regime: str, name: str) -> list[dict[str, Any]]:
    """Runs of an arm that count, by seed."""
    rate = chosen_rate(found, regime, name)
    runs = [run for run in _runs(found, regime, name) if run["seed"] in protocol.SEEDS and run["rate"] == rate]
    return sorted(runs, key=lambda run: run["seed"])


def ratios(found: Found, regime: str, name: str, reference: str) -> list[float]:
    """Held-out losses of an arm divided by another's, seed by seed."""
    others = {run["seed"]: final_loss(run) for run in reported_runs(found, regime, reference)}
    runs = reported_runs(found, regime, name)
    return [final_loss(run) / others[run["seed"]] for run in runs if run["seed"] in others]


def _runs(found: Found, regime: str, name: str) -> list[dict[str, Any]]:
    return [run for run in found["runs"] if (run["regime"], run["name"]) == (regime, name)]


def _reported(found: Found, regime: str, depth: int) -> list[dict[str, Any]]:
    return [arm for arm in found["arms"][str(depth)] if reported_runs(found, regime, arm["name"])]


def _table(found: Found, regime: str, depth: int) -> str:
    chosen = protocol.REGIMES[regime]
    lines = [
        (
            f"### {depth} of {protocol.DEPTH} blocks, {regime}: {chosen.episodes} demonstrations a task, "
            f"{chosen.steps} steps"
        ),
        "",
        *header(
            [
                *(
                    "arm",
                    "blocks that stay",
                    "rate",
                    "steps",
                    "held-out loss",
                    "to the full",
                    "to the full in its time",
                ),
                *("success (95 %)", "points to the full in its time (95 %)", "seeds"),
            ]
        ),
    ]
    arms = _reported(found, regime, depth)
    for arm in sorted(arms, key=lambda arm: _mean_loss(found, regime, arm["name"])):
        name, runs = arm["name"], reported_runs(found, regime, arm["name"])
        solved, episodes = success(runs)
        rate, low, high = wilson(solved, episodes) if episodes else (0, 0, 0)
        losses = [final_loss(run) for run in runs]
        in_its_time = f"full-{depth}" if arm["in_time_of"] == depth else "full"
        lines.append(
            row(
                [
                    arm["label"],
                    blocks(arm["mask"], depth),
                    f"{runs[0]['rate']:g}",
                    max(int(step) for step in runs[0]["held_out_loss"]) + 1,
                    f"{np.mean(losses):.4f}" + (f" ±{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""),
                    _ratio(ratios(found, regime, name, "full")),
                    "" if name == "full" else _ratio(ratios(found, regime, name, in_its_time)),
                    f"{rate:.0%} ({low:.0%}-{high:.0%})" if episodes else "",
                    "" if name in ("full", in_its_time) else _points(runs, reported_runs(found, regime, in_its_time)),
                    len(runs),
                ]
            )
        )
    return "\n".join(lines)


def _mean_loss(found: Found, regime: str, name: str) -> float:
    return float(np.mean([final_loss(run) for run in reported_runs(found, regime, name)]))


def _ratio(values: Sequence[float]) -> str:
    if not values:
        return ""
    logs = np.log(values)
    text = f"{np.exp(logs.mean()):.3f}"
    if len(values) < 2 or not logs.any():
        return text
    error = 2 * logs.std(ddof=1) / np.sqrt(len(logs))
    return f"{text} ({np.exp(logs.mean() - error):.3f}-{np.exp(logs.mean() + error):.3f})"


def _points(runs: Rows, others: Rows) -> str:
    """Difference of success in points, seed by seed and start by start."""
    theirs = {run["seed"]: run for run in others if "solved" in run}
    pairs = [(run, theirs[run["seed"]]) for run in runs if "solved" in run and run["seed"] in theirs]
    if not pairs:
        return ""
    difference, low, high = (100 * x for x in success_difference(pairs))
    return f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"


def _longer(found: Found) -> str:
    """Ten times the steps, of the full model and of half of it."""
    depth, suffix = protocol.TUNED_DEPTHS[0], f"-x{protocol.LONGER}"
    arms = [arm for arm in found["arms"][str(depth)] if _runs(found, "rich", f"{arm['name']}{suffix}")]
    if not arms:
        return ""
    runs = {arm["label"]: _runs(found, "rich", f"{arm['name']}{suffix}")[0] for arm in arms}
    steps = sorted({int(step) for run in runs.values() for step in run["held_out_loss"]})
    lines = [
        f"### {protocol.LONGER} times the steps, rich, one seed",
        "",
        *header(["steps", *runs]),
    ]
    for step in steps:
        losses = [run["held_out_loss"].get(str(step)) for run in runs.values()]
        lines.append(row([step + 1, *("" if loss is None else f"{loss:.4f}" for loss in losses)]))
    return "\n".join(lines)


def _default(found: Found) -> str:
    """What was fixed beforehand about the default of a given depth, and what came of it."""
    settings = {}
    for regime in protocol.REGIMES:
        for depth in protocol.TUNED_DEPTHS:
            names = {arm["label"]: arm["name"] for arm in found["arms"][str(depth)]}
            values = ratios(found, regime, names["jumps"], names["clp"]) if {"jumps", "clp"} <= set(names) else []
            if len(values) > 1:
                settings[regime, depth] = values
    if not settings:
        return ""
    told = ", ".join(f"{_ratio(values)} with {depth} blocks, {regime}" for (regime, depth), values in settings.items())
    left = len(protocol.REGIMES) * len(protocol.TUNED_DEPTHS) - len(settings)
    better = "they do" if protocol.jumps_is_the_better_default(settings) else "they do not"
    outcome = f"{left} of the settings have not been run, so the default stays" if left else better
    return "\n".join(
        [
            "### The default of a given depth",
            "",
            (
                f"Held-out loss of `jumps` to that of `clp`: {told}. It was fixed beforehand that `jumps` takes the "
                "place of the paper's rule if all settings lie below 1 by two standard errors: "
                f"{outcome}."
            ),
        ]
    )
