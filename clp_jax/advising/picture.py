"""The plot: what a depth costs in loss, against what it saves."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from clp_jax.advising.verdict import Verdict
from clp_jax.report.canvas import LIGHT, new_figure


def draw(verdict: Verdict, costs: Mapping[str, Sequence[float]], title: str) -> Figure:
    """One panel for each cost; the advised depth is a star.

    Args:
      verdict: whose places are drawn.
      costs: by the label of a panel that of each place.
      title: above all.
    """
    full = next(place.loss / place.ratio for place in verdict.places)
    figure = new_figure(3.4 * len(costs), 3.6)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for panel, (label, values) in zip(panels, costs.items(), strict=True):
        for place, value in zip(verdict.places, values, strict=True):
            best = place is verdict.best
            colour, mark, size = (LIGHT["removed"], "*", 13) if best else (LIGHT["kept"], "o", 7)
            panel.plot([value, value], [full * bound for bound in place.interval], color=colour, linewidth=1.2)
            panel.plot(value, place.loss, mark, color=colour, markersize=size)
            panel.annotate(place.candidate.depth, (value, place.loss), (7, 5), textcoords="offset points")
        panel.set_xlabel(label)
        panel.set_xlim(0, 1.25 * max(values))
    panels[0].set_ylabel("held-out loss")
    figure.suptitle(f"{title}\nLines: 95 % of the ratio to the whole model's loss", x=0.01, ha="left", fontsize=9)
    return figure
