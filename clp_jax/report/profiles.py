"""Curves over the blocks of a group: similarity to the predecessor, its four variants, the cost of removing more."""

from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from clp_jax import selection
from clp_jax.report.canvas import LIGHT, new_figure
from clp_jax.report.scales import SMALLEST, distance, limits, logarithmic
from clp_jax.report.view import GroupView, own
from clp_jax.similarity import VARIANTS

_WIDTH = 11.2
_REMOVED: dict[str, Any] = {"marker": "s", "color": LIGHT["removed"], "linestyle": "none", "markersize": 6, "zorder": 4}
_KEPT: dict[str, Any] = {
    "marker": "o",
    "markerfacecolor": LIGHT["paper"],
    "markeredgecolor": LIGHT["kept"],
    "linestyle": "none",
    "markersize": 5,
    "zorder": 4,
}
_ANCHOR: dict[str, Any] = _KEPT | {"marker": "D"}
_TWIN: dict[str, Any] = {"marker": "o", "color": LIGHT["ink"], "linestyle": "none", "markersize": 4, "zorder": 4}
_JOINED: dict[str, Any] = {"color": LIGHT["muted"], "linestyle": "--", "linewidth": 0.9}
_INTERVAL: dict[str, Any] = {"color": LIGHT["muted"], "linewidth": 2.2, "alpha": 0.55}


def profile(view: GroupView) -> Figure:
    """Per tower: CKA of each block's output to its input, interval, threshold, twin runs; cosine and residual."""
    figure = new_figure(_WIDTH, 0.6 + 2.9 * len(view.towers))
    grid = figure.add_gridspec(2 * len(view.towers), 2, width_ratios=(1.75, 1))
    for row, tower in enumerate(view.towers):
        axes = figure.add_subplot(grid[2 * row : 2 * row + 2, 0])
        _similarity(axes, view, tower)
        upper = figure.add_subplot(grid[2 * row, 1], sharex=axes)
        lower = figure.add_subplot(grid[2 * row + 1, 1], sharex=axes)
        cosine = distance(view.blocks(tower, "cosine"))
        residual = np.maximum(view.blocks(tower, "residual"), SMALLEST)
        for beside, curve, name in ((upper, cosine, "cosine"), (lower, residual, "relative residual")):
            _marked(beside, view, curve)
            logarithmic(beside, *limits(curve), alike=name == "cosine")
            beside.set_title(f"{tower}: {name}")
        upper.tick_params(labelbottom=False)
        for bottom in (axes, lower):
            bottom.set_xlabel("block")
    figure.legend(handles=_legend(view), loc="outside upper left", ncols=6)
    return figure


def variants(view: GroupView) -> Figure:
    """The same curve under every variant of CKA; the others behind it in grey."""
    figure = new_figure(_WIDTH, 0.5 + 1.75 * len(view.towers))
    panels = figure.subplots(len(view.towers), len(VARIANTS), sharex=True, sharey="row", squeeze=False)
    for row, (tower, similarity) in zip(panels, view.towers.items(), strict=True):
        curves = [distance(own(similarity.evidence(*variant).similarity)) for variant in VARIANTS]
        for axes, variant, curve in zip(row, VARIANTS, curves, strict=True):
            for other in curves:
                axes.plot(other, color=LIGHT["unread"], linewidth=0.9)
            _marked(axes, view, curve, small=True)
            used = variant == (view.options.states, view.options.estimator)
            axes.set_title(f"{tower}: {', '.join(variant)}{' (used)' if used else ''}", size=9)
        logarithmic(row[0], *limits(np.stack(curves)), alike=True)
    for axes in panels[-1]:
        axes.set_xlabel("block")
    return figure


def cost_curve(view: GroupView, costs: Float[np.ndarray, " sizes"]) -> Figure:
    """Cost of the cheapest jumps by number of removed blocks, a little beyond the plan, and the plan's own."""
    figure = new_figure(5.4, 2.9)
    axes = figure.add_subplot()
    chosen = len(view.removed)
    shown = costs[: max(chosen, len(costs) // 2) + max(2, len(costs) // 6)]
    axes.plot(np.where(np.isfinite(shown), shown, np.nan), color=LIGHT["kept"], marker="o", markersize=3.5, linewidth=1)
    beside: dict[str, Any] = {"textcoords": "offset points", "size": 8.5}
    if np.isfinite(view.plan_cost()):
        axes.plot([chosen], [view.plan_cost()], **_REMOVED)
        axes.annotate("plan", (chosen, view.plan_cost()), (-6, 6), ha="right", **beside)
    knee = selection.knee(costs)
    if knee:
        axes.axvline(knee, color=LIGHT["muted"], linestyle=":", linewidth=1)
        axes.annotate("knee", (knee, 0.98), (4, 0), xycoords=("data", "axes fraction"), va="top", **beside)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("removed blocks")
    axes.set_title(f"{view.name}: sum of 1 - CKA over jumps (rms, debiased)")
    return figure


def _similarity(axes: Axes, view: GroupView, tower: str) -> None:
    curve, interval = distance(view.blocks(tower, "similarity")), distance(view.interval(tower))
    tau = view.twins.get("tau")
    level = np.array([np.nan if tau is None else tau])
    axes.vlines(np.arange(view.depth), *interval, **_INTERVAL)
    if len(view.towers) > 1:
        axes.plot(distance(own(view.evidence.similarity)), **_JOINED)
    _marked(axes, view, curve)
    axes.set_title(f"{tower}: CKA to the predecessor ({view.options.states}, {view.options.estimator})")
    logarithmic(axes, *limits(np.concatenate([curve, *interval, distance(level)])), alike=True, room_below=0.25)
    if tau is not None:
        axes.axhline(distance(level)[0], color=LIGHT["ink"], linewidth=0.8, linestyle=(0, (6, 3)))
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "left", "va": "center", "size": 8.5}
        axes.annotate(" τ", (1, distance(level)[0]), **place)
    _runs(axes, view)


def _marked(axes: Axes, view: GroupView, curve: Float[np.ndarray, " depth"], *, small: bool = False) -> None:
    """A line over the blocks, with removed and kept blocks told apart by shape and colour."""
    axes.plot(curve, color=LIGHT["kept"], linewidth=1)
    blocks = np.arange(view.depth)
    gone = np.isin(blocks, view.removed)
    for where, look in ((~gone, _KEPT), (gone, _REMOVED)):
        (marks,) = axes.plot(blocks[where], curve[where], **look)
        if small:
            marks.set_markersize(3)
    axes.set_xlim(-0.6, view.depth - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8 if small else 19))


def _runs(axes: Axes, view: GroupView) -> None:
    """Runs of twins along the bottom: the anchor, which stays, and its twins."""
    across = axes.get_xaxis_transform()
    for run in view.twins.get("runs", ()):
        blocks = [run["anchor"], *run["twins"]]
        axes.plot([blocks[0], blocks[-1]], [0.06, 0.06], transform=across, color=LIGHT["muted"], linewidth=3, alpha=0.5)
        axes.plot(blocks[:1], [0.06], transform=across, **_ANCHOR)
        axes.plot(blocks[1:], [0.06] * len(blocks[1:]), transform=across, **_TWIN)


def _legend(view: GroupView) -> list[Line2D]:
    marks = [Line2D([], [], label="kept", **_KEPT), Line2D([], [], label="removed", **_REMOVED)]
    if view.intervals:
        marks.append(Line2D([], [], label="95 % interval (episodes)", **_INTERVAL))
    if len(view.towers) > 1:
        label = f"towers joined ({view.options.couple})"
        marks.append(Line2D([], [], label=label, **_JOINED))
    if view.twins.get("runs"):
        marks.append(Line2D([], [], label="anchor of a twin run", **_ANCHOR))
        marks.append(Line2D([], [], label="its twins", **_TWIN))
    return marks
