"""The plot: what a depth costs in loss, against what it saves."""

import os
from collections.abc import Mapping, Sequence

from clp_jax.advising.verdict import Verdict
from clp_jax.report.canvas import LIGHT

_KEPT, _BEST, _INK = (LIGHT[role] for role in ("kept", "removed", "ink"))


def draw(verdict: Verdict, axes: Mapping[str, Sequence[float]], title: str, path: str | os.PathLike[str]) -> None:
    """Write a PNG with one panel for each cost.

    Args:
      verdict: whose places are drawn.
      axes: by the label of a panel the cost of each place.
      title: above all.
      path: of the file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(axes), 3.9), layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    full = next(place.loss / place.ratio for place in verdict.places)
    for panel, (label, costs) in zip(panels, axes.items(), strict=True):
        for place, cost in zip(verdict.places, costs, strict=True):
            best = place is verdict.best
            low, high = (bound * full for bound in place.interval)
            panel.plot([cost, cost], [low, high], color=_BEST if best else _KEPT, linewidth=1.2)
            panel.plot(
                cost, place.loss, "*" if best else "o", color=_BEST if best else _KEPT, markersize=13 if best else 7
            )
            panel.annotate(
                place.candidate.depth, (cost, place.loss), (7, 5), textcoords="offset points", fontsize=8, color=_INK
            )
        panel.set_xlabel(label)
        panel.set_xlim(left=0)
        panel.margins(x=0.15, y=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out loss, with 95 % of its ratio to the full model's")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=150)
