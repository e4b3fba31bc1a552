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
_NOTHING = np.zeros(0)


def profile(view: GroupView) -> Figure:
    """Per tower: CKA of each block's output to its input, interval, threshold, twin runs; cosine and residual."""
    figure = new_figure(_WIDTH, 0.6 + 2.9 * len(view.towers))
    grid = figure.add_gridspec(2 * len(view.towers), 2, width_ratios=(1.75, 1))
    for row, tower in enumerate(view.towers):
        known = view.known(tower)
        axes = figure.add_subplot(grid[2 * row : 2 * row + 2, 0])
        _similarity(axes, view, tower)
        axes.set_title(f"{tower}: CKA to the predecessor ({view.reading.states}, {view.reading.estimator})")
        axes.set_xlabel("block")
        for part, (name, what) in enumerate((("cosine", "cosine"), ("residual", "relative residual"))):
            beside = figure.add_subplot(grid[2 * row + part, 1], sharex=axes)
            _marked(beside, view, own(getattr(known, name)))
            beside.set_title(f"{tower}: {what}")
            _zoom(beside, own(getattr(known, name)))
            _write_first(beside, own(getattr(known, name))[0])
            beside.tick_params(labelbottom=part == 1)
            beside.set_xlabel("block" if part == 1 else "")
    figure.legend(handles=_legend(view), loc="outside upper left", ncols=6)
    return figure


def variants(view: GroupView) -> Figure:
    """The same curve under every variant of CKA; the others behind it in grey."""
    figure = new_figure(_WIDTH, 0.5 + 1.75 * len(view.towers))
    panels = figure.subplots(len(view.towers), len(VARIANTS), sharex=True, sharey="row", squeeze=False)
    for row, (tower, similarity) in zip(panels, view.towers.items(), strict=True):
        curves = [own(similarity.evidence(*variant).similarity) for variant in VARIANTS]
        for axes, variant, curve in zip(row, VARIANTS, curves, strict=True):
            for other in curves:
                axes.plot(range(1, view.depth), other[1:], color=LIGHT["unread"], linewidth=0.9)
            _marked(axes, view, curve, small=True)
            chosen = variant == (view.reading.states, view.reading.estimator)
            axes.set_title(f"{tower}: {', '.join(variant)}{' (used)' if chosen else ''}", size=9)
        _zoom(row[0], np.stack(curves))
        for axes, curve in zip(row, curves, strict=True):
            _write_first(axes, curve[0])
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
    curve, (low, high) = own(view.known(tower).similarity), view.interval(tower)
    axes.vlines(np.arange(view.depth), low, high, **_INTERVAL)
    if len(view.towers) > 1:
        axes.plot(range(1, view.depth), own(view.evidence.similarity)[1:], **_JOINED)
    _marked(axes, view, curve)
    tau = view.twins.get("tau")
    if tau is not None:
        axes.axhline(tau, color=LIGHT["ink"], linewidth=0.8, linestyle=(0, (6, 3)))
        place: dict[str, Any] = {
            "xycoords": ("axes fraction", "data"),
            "textcoords": "offset points",
            "ha": "right",
            "va": "top",
        }
        axes.annotate(f"τ = {tau:.4f}", (1, tau), (0, -3), **place)
    _zoom(axes, curve, np.concatenate([low[1:], high[1:], [] if tau is None else [tau]]), bottom=0.3)
    _write_first(axes, curve[0])
    _runs(axes, view)


def _marked(axes: Axes, view: GroupView, curve: Float[np.ndarray, " depth"], *, small: bool = False) -> None:
    """A line over the blocks, with removed and kept blocks told apart by shape and colour."""
    blocks = np.arange(view.depth)
    axes.plot(blocks[1:], curve[1:], color=LIGHT["kept"], linewidth=1)  # the first block is often off the scale
    gone = np.isin(blocks, view.removed)
    for where, look in ((~gone, _KEPT), (gone, _REMOVED)):
        (marks,) = axes.plot(blocks[where], curve[where], **look)
        if small:
            marks.set_markersize(3)
    axes.set_xlim(-0.6, view.depth - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8 if small else 19))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4 if small else 5))


def _zoom(axes: Axes, curves: np.ndarray, also: np.ndarray = _NOTHING, *, bottom: float = 0.12) -> None:
    """Limits that suit all blocks but the first, which reads the embeddings and is often far off.

    Args:
      axes: whose limits to set.
      curves: values by block (last axis), NaN where unknown.
      also: further values to show.
      bottom: room below the smallest value, as a share of the range.
    """
    wanted = np.concatenate([curves[..., 1:].ravel(), also])
    wanted = wanted[np.isfinite(wanted)] if np.isfinite(curves[..., 1:]).sum() > 1 else curves[np.isfinite(curves)]
    if len(wanted):
        room = max(float(np.ptp(wanted)), 1e-4)
        axes.set_ylim(wanted.min() - bottom * room, wanted.max() + 0.12 * room)


def _write_first(axes: Axes, value: float) -> None:
    """The first block's value where it is off the scale."""
    low, high = axes.get_ylim()
    if value < low or value > high:
        height, text = (0.16, f"↓ {value:.3f}") if value < low else (0.84, f"↑ {value:.3f}")
        look: dict[str, Any] = {"ha": "left", "va": "center", "size": 8, "color": LIGHT["muted"]}
        axes.annotate(text, (-0.4, height), xycoords=("data", "axes fraction"), **look)


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
        label = f"towers joined ({view.reading.couple})"
        marks.append(Line2D([], [], label=label, **_JOINED))
    if view.twins.get("runs"):
        marks.append(Line2D([], [], label="anchor of a twin run", **_ANCHOR))
        marks.append(Line2D([], [], label="its twins", **_TWIN))
    return marks
