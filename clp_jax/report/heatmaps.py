"""The CKA matrix of one tower, with the blocks that go marked along its axes."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from clp_jax.report.canvas import LIGHT, new_figure
from clp_jax.report.scales import alike_label, distance, limits, ticks
from clp_jax.report.view import GroupView

_COLOURS = "YlGnBu_r"  # dark = alike, so that the orange marks stand out where twins are
_SIDE = 5.6


def colour_range(views: tuple[GroupView, ...]) -> tuple[float, float]:
    """Smallest and largest known 1 - CKA between different states: the colours that all matrices share."""
    known = [view.known(tower).similarity for view in views for tower in view.towers]
    return limits(np.concatenate([distance(matrix[~np.eye(len(matrix), dtype=bool)]) for matrix in known]))


def heat_map(view: GroupView, tower: str, colours: tuple[float, float]) -> Figure:
    """CKA between all states of a tower [depth + 1, depth + 1], coloured by the logarithm of 1 - CKA.

    A band at the top and on the left has one cell per block, at the index of the state after that block. Cells of
    removed blocks are orange, and their own entry of the matrix is framed.
    """
    matrix, read = view.known(tower).similarity, view.towers[tower].read
    states = len(matrix)
    figure = new_figure(_SIDE, _SIDE + 0.35)
    axes = figure.add_subplot()
    image = axes.imshow(distance(matrix), cmap=_COLOURS, norm=LogNorm(*colours, clip=True), interpolation="none")
    for state in np.flatnonzero(~read):
        for corner, width, height in (((state - 0.5, -0.5), 1, states), ((-0.5, state - 0.5), states, 1)):
            axes.add_patch(Rectangle(corner, width, height, facecolor=LIGHT["unread"], edgecolor="none"))
    _bands(axes, view, states)
    for block in view.removed:
        for corner in ((block + 0.5, block - 0.5), (block - 0.5, block + 0.5)):
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=LIGHT["removed"], linewidth=1.3))
    _state_axes(axes, states)
    axes.set_title(f"{tower}: CKA of hidden states ({view.options.states}, {view.options.estimator})", pad=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.75, aspect=30, pad=0.02)
    at = ticks(*colours)
    bar.set_ticks(at, labels=[alike_label(value) for value in at])
    bar.minorticks_off()
    bar.ax.invert_yaxis()
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    figure.legend(handles=_legend(has_unread=not read.all()), loc="outside lower center", ncols=3)
    return figure


def _bands(axes: Axes, view: GroupView, states: int) -> None:
    thickness, gap = 0.05 * states, 0.012 * states
    edge = -0.5 - gap - thickness
    points = _SIDE * 72 * 0.72 / states  # about the width of a cell
    for block in range(view.depth):
        gone = block in view.removed
        look: dict[str, Any] = {
            "facecolor": LIGHT["removed" if gone else "wash"],
            "edgecolor": LIGHT["paper"],
            "linewidth": 0.5,
        }
        for corner, size, centre in (
            ((block + 0.5, edge), (1, thickness), (block + 1, edge + thickness / 2)),
            ((edge, block + 0.5), (thickness, 1), (edge + thickness / 2, block + 1)),
        ):
            axes.add_patch(Rectangle(corner, *size, **look))
            if points >= 9:
                text: dict[str, Any] = {
                    "color": LIGHT["paper" if gone else "muted"],
                    "weight": "bold" if gone else "normal",
                }
                axes.text(*centre, str(block), size=min(7.5, points * 0.5), ha="center", va="center_baseline", **text)
    axes.set_xlim(edge, states - 0.5)
    axes.set_ylim(states - 0.5, edge)


def _state_axes(axes: Axes, states: int) -> None:
    ticks = range(0, states, math.ceil(states / 20))
    names = ["in" if state == 0 else str(state) for state in ticks]
    axes.set_xticks(list(ticks), names)
    axes.set_yticks(list(ticks), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("state: in = tower's input, i = residual stream after block i - 1")


def _legend(*, has_unread: bool) -> list[Patch]:
    marks = [
        Patch(facecolor=LIGHT["removed"], label="removed block"),
        Patch(facecolor=LIGHT["wash"], edgecolor=LIGHT["rule"], label="kept block"),
    ]
    return marks + ([Patch(facecolor=LIGHT["unread"], label="state that is not compared")] if has_unread else [])
