"""Every criterion at the same depth: which blocks it removes, and the loss that leaves before any fine-tuning."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from clp_jax.findings import Choice, Findings
from clp_jax.report.canvas import LIGHT, new_figure
from clp_jax.report.view import GroupView


def ranked(findings: Findings) -> list[Choice]:
    """The choices, smallest loss first (after healing, where they were healed), those without a loss last."""

    def loss(choice: Choice) -> float:
        found = choice.loss if choice.healed is None else choice.healed.loss
        return found if math.isfinite(found) else math.inf

    return sorted(findings.choices, key=loss)


def ratio(loss: float, full_loss: float) -> float:
    """Loss relative to the unpruned model; NaN if either is unknown."""
    return loss / full_loss if math.isfinite(loss) and math.isfinite(full_loss) and full_loss > 0 else math.nan


def pruned_groups(findings: Findings, views: tuple[GroupView, ...]) -> list[tuple[GroupView, str]]:
    """The groups from which some criterion removes anything, each with one tower's name, which stands for all."""
    named = [(view, next(iter(view.towers))) for view in views]
    return [(view, tower) for view, tower in named if any(choice.plan.removed(tower) for choice in findings.choices)]


def comparison(findings: Findings, groups: list[tuple[GroupView, str]]) -> Figure:
    """Grid of removed blocks per criterion beside their losses, for a slide; ``groups`` from `pruned_groups`."""
    choices = ranked(findings)
    blocks = sum(view.depth for view, _ in groups)
    figure = new_figure(min(4.2 + 0.26 * blocks, 18), 1.2 + 0.3 * len(choices))
    widths = [0.26 * view.depth for view, _ in groups]
    *grids, losses = figure.subplots(1, len(groups) + 1, sharey=True, width_ratios=[*widths, 2.6], squeeze=False)[0]
    for axes, (view, tower) in zip(grids, groups, strict=True):
        _grid(axes, view, tower, choices)
    grids[0].set_yticks(range(len(choices)), [_name(findings, choice) for choice in choices])
    _losses(losses, findings, choices)
    return figure


def _grid(axes: Axes, view: GroupView, tower: str, choices: list[Choice]) -> None:
    for row, choice in enumerate(choices):
        for block in range(view.depth):
            gone = block in choice.plan.removed(tower)
            colour, hatch = (LIGHT["removed"], "////") if gone else (LIGHT["wash"], None)
            look: dict[str, Any] = {"facecolor": colour, "edgecolor": LIGHT["paper"], "hatch": hatch, "linewidth": 0.5}
            axes.add_patch(Rectangle((block - 0.45, row - 0.38), 0.9, 0.76, **look))
    axes.set_xlim(-0.6, view.depth - 0.4)
    axes.set_ylim(len(choices) - 0.4, -0.6)
    axes.set_xticks(range(0, view.depth, math.ceil(view.depth / 24)))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{view.name}: removed blocks")


def _losses(axes: Axes, findings: Findings, choices: list[Choice]) -> None:
    values = np.array([choice.loss for choice in choices])
    if np.isfinite(findings.full_loss):
        axes.axvline(findings.full_loss, color=LIGHT["kept"], linewidth=1)
    axes.plot(values, np.arange(len(values)), marker="s", color=LIGHT["removed"], linestyle="none", markersize=5)
    for row, choice in enumerate(choices):
        times = ratio(choice.loss, findings.full_loss)
        texts = [f"{choice.loss:#.4g}" if math.isfinite(choice.loss) else "not measured"]
        texts += [f"{times:.3f}x"] if math.isfinite(times) else []
        for place, text in zip((1.05, 1.45), texts, strict=False):
            weight = "bold" if choice.criterion == findings.plan.criterion else "normal"
            axes.annotate(text, (place, row), xycoords=("axes fraction", "data"), va="center", size=8, weight=weight)
    if (values > 0).any():
        axes.set_xscale("log")
    axes.tick_params(axis="x", which="both", labelbottom=False, length=0)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("zero-shot loss (log), line: unpruned")


def _name(findings: Findings, choice: Choice) -> str:
    return f"{choice.criterion} (plan)" if choice.criterion == findings.plan.criterion else choice.criterion
