"""The pictures of the page."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from studies.metaworld import protocol
from studies.metaworld.page import depth_of, runs_of
from studies.metaworld.tables import final_loss


def ratings(found: dict[str, Any], file: Path) -> None:
    """How similar each block's output is to its input, on the new tasks and on those of pre-training."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), sharex=True)
    for axis, (key, label) in zip(
        axes, {"similarity": "CKA", "cosine": "cosine", "residual": "relative residual"}.items(), strict=True
    ):
        for data, line in (("scarce", "-"), ("base", "--")):
            for tower, colour in (("vlm", "tab:blue"), ("action", "tab:orange")):
                values = [np.nan if x is None else x for x in found["ratings"][data][tower][key]]
                name = f"{tower}, {'new' if data == 'scarce' else 'base'} tasks"
                axis.plot(values, line, color=colour, label=name, marker=".")
        axis.set_xlabel("block")
        axis.set_title(label)
    axes[0].legend(fontsize=7)
    _save(figure, file)


def curves(found: dict[str, Any], file: Path) -> None:
    """Held-out loss against the time of fine-tuning, for the arms of the main depth."""
    regimes = [name for name in protocol.REGIMES if any(run["regime"] == name for run in found["runs"])]
    figure, axes = plt.subplots(1, len(regimes), figsize=(6 * len(regimes), 4), squeeze=False)
    arms = found["arms"][str(protocol.DEPTHS[0])]
    shown = [arm for arm in arms if not arm.startswith("random") and "(base tasks)" not in arm] + ["random 1"]
    seconds = {
        depth: np.median([run["seconds_per_step"] for run in found["runs"] if depth_of(run["name"]) == depth])
        for depth in {depth_of(run["name"]) for run in found["runs"]}
    }
    for axis, regime in zip(axes[0], regimes, strict=True):
        drawn = set()
        for arm in shown:
            runs = runs_of(found, regime, arms[arm])
            if not runs or arms[arm] in drawn:
                continue
            drawn.add(arms[arm])
            steps = sorted(int(step) for step in runs[0]["held_out_loss"])
            mean = [np.mean([run["held_out_loss"][str(step)] for run in runs]) for step in steps]
            axis.plot((np.array(steps) + 1) * seconds[depth_of(arms[arm])], mean, marker=".", label=arm)
        axis.set(title=regime, xlabel="seconds of fine-tuning on one core", ylabel="held-out loss", yscale="log")
        axis.legend(fontsize=7)
    _save(figure, file)


def masks(found: dict[str, Any], file: Path) -> None:
    """Final loss of the random masks, and where the criteria's own choices lie among them."""
    first = {r["name"]: r for r in found["runs"] if (r["regime"], r["seed"]) == ("scarce", protocol.SEEDS[0])}
    final = sorted(final_loss(first[row["name"]]) for row in found["masks"] if row["name"] in first)
    figure, axis = plt.subplots(figsize=(9, 4))
    axis.plot(final, np.arange(1, len(final) + 1) / len(final), drawstyle="steps-post", color="grey", label="random")
    shared: dict[str, list[str]] = {}
    for arm, name in found["arms"][str(protocol.DEPTHS[0])].items():
        if not arm.startswith("random") and name in first:
            shared.setdefault(name, []).append(arm)
    colours = plt.get_cmap("tab20")
    for i, (name, labels) in enumerate(shared.items()):
        label = ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
        axis.axvline(final_loss(first[name]), color=colours(i % 20), label=label)
    axis.set(xlabel="held-out loss after fine-tuning", ylabel="share of random masks at most this", xscale="log")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)
