"""The plot: what fills a chip's memory, and what bounds the time."""

import os
from collections.abc import Sequence

from clp_jax.scale.chips import GIB
from clp_jax.scale.forecast import Forecast

_MEMORY = {
    "parameters": "#3b6fb6",
    "optimiser": "#7ba3d6",
    "average": "#b9d0ec",
    "teacher": "#c9a227",
    "inputs": "#8a8a8a",
    "activations": "#e58a3c",
}
_TIMES = {"compute": "#4d9a5b", "memory": "#9bc79a", "network": "#c45a5a"}


def draw(forecasts: Sequence[Forecast], title: str, path: str | os.PathLike[str]) -> None:
    """Write a PNG with one row per program, slice and model."""
    from matplotlib.figure import Figure

    rows = [one for one in forecasts if one.needed]
    figure = Figure(figsize=(12, 1.9 + 0.42 * max(len(rows), 1)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    labels = [f"{one.topology}  {one.model}\n{one.program}, {one.observations} obs." for one in rows]
    left.set_yticks(range(len(rows)), labels, fontsize=8)
    left.set_xlabel("GiB on one chip, of what a program may use")
    used = max((one.needed for one in rows), default=GIB) / GIB
    left.set_xlim(0, 1.35 * min(max(one.hbm for one in rows) / GIB, 1.5 * used) if rows else 1)
    right.set_xlabel("ms of one call: it takes longer than the longest bar")
    left.set_title("Memory", loc="left", fontsize=10)
    right.set_title("Time", loc="left", fontsize=10)
    right.margins(x=0.16)
    for y, one in enumerate(rows):
        _memory_bar(left, y, one)
        _time_bars(right, y, one)
    left.invert_yaxis()
    filled = {
        name: colour
        for name, colour in _MEMORY.items()
        if name == "activations" or any(one.held.get(name) for one in rows)
    }
    for axes, colours in ((left, filled), (right, _TIMES)):
        for name, colour in colours.items():
            axes.barh([0], [0], color=colour, label={"memory": "HBM"}.get(name, name))
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(colours), frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.savefig(path, dpi=150)


def _memory_bar(axes, y: int, one: Forecast) -> None:
    start = 0.0
    parts = {**one.held, "inputs": one.held.get("inputs", 0) + one.held.get("padding", 0)}
    for name, colour in _MEMORY.items():
        size = (one.activations if name == "activations" else parts.get(name, 0)) / GIB
        axes.barh(y, size, left=start, height=0.6, color=colour)
        start += size
    limit = one.hbm / GIB
    if limit < axes.get_xlim()[1]:
        axes.plot([limit, limit], [y - 0.4, y + 0.4], color="black", linewidth=1.5)
    text = f"{start:.1f} of {limit:.1f}" + ("" if one.fits else ": does not fit")
    beyond = limit if 0 <= limit - start < axes.get_xlim()[1] / 5 else start
    axes.annotate(text, (beyond, y), (4, 0), textcoords="offset points", va="center", fontsize=8)


def _time_bars(axes, y: int, one: Forecast) -> None:
    times = (one.compute_seconds, one.memory_seconds, one.network_seconds)
    for offset, seconds, colour in zip((-0.2, 0.0, 0.2), times, _TIMES.values(), strict=True):
        axes.barh(y + offset, 1e3 * seconds, height=0.2, color=colour)
    if any(times):
        axes.annotate(f"{1e3 * max(times):.0f}", (1e3 * max(times), y), (4, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
