"""Curves of a fine-tuning in the course of its steps, and of another run behind them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clp_jax.report.canvas import LIGHT, new_figure
from clp_jax.report.scales import limits, logarithmic
from clp_jax.training.held_out import HELD_OUT_AT
from clp_jax.training.logs import Curve

HELD_OUT, STEP_SECONDS, DATA_SECONDS = "held_out_loss", "step_seconds", "data_seconds"
STEPS = "training steps"
_MOST = 250
"""Points of a curve; of more neighbours are averaged."""
_WIDE = 5.0
"""Largest over smallest value from which on an axis is logarithmic."""
_HOURS = 7200.0
"""Seconds from which on time is in hours."""
_THIS: dict[str, Any] = {"color": LIGHT["kept"]}
_OTHER: dict[str, Any] = {"color": LIGHT["removed"], "linestyle": "--"}
_LEFT: dict[str, Any] = {"ha": "right", "va": "center", "size": 8}

Log = Mapping[str, Curve]
"""Curves of a run by the names of their scalars."""


def training_loss(log: Log) -> Curve | None:
    """The task's loss, which compares with the held-out one also where a teacher has a part in the whole loss."""
    return log.get("task_loss", log.get("loss"))


def held_out_at(log: Log) -> list[tuple[str, Curve]]:
    """Held-out losses of the smaller depths that a run trains, by the names of these, in the order of its log."""
    return [(name.removeprefix(HELD_OUT_AT), curve) for name, curve in log.items() if name.startswith(HELD_OUT_AT)]


def losses(run: Log, other: Log | None, names: tuple[str, str], *, by_time: bool) -> Figure:
    """Training and held-out loss of a run.

    Args:
      run: its curves.
      other: those of a run to compare with.
      names: of the two, for the legend.
      by_time: over the time of training steps, in place of their number.
    """
    logs = [(log, look, name) for log, look, name in ((other, _OTHER, names[1]), (run, _THIS, names[0])) if log]
    in_hours = any(np.max(_seconds_of(log), initial=0.0) > _HOURS for log, _, _ in logs)
    unit, size = ("hours", 3600) if in_hours else ("minutes", 60)
    figure, axes = _panel(
        "loss by time" if by_time else "loss by step", f"{unit} of training steps" if by_time else "step"
    )
    shown = []
    for log, look, name in logs:
        trained, held = training_loss(log), log.get(HELD_OUT)
        if trained is not None:
            thin = _thinned(trained)
            where = seconds(log, thin.steps) / size if by_time else thin.steps
            axes.plot(where, thin.values, alpha=0.45, linewidth=0.9, label=f"{name}: training", **look)
            shown.append(thin.values)
        if held is not None:
            mark = "o" if look is _THIS else "s"
            where = seconds(log, held.steps) / size if by_time else held.steps
            axes.plot(where, held.values, linewidth=1.5, marker=mark, markersize=3.5, label=f"{name}: held out", **look)
            shown.append(held.values)
        for depth, cut in held_out_at(log):
            where = seconds(log, cut.steps) / size if by_time else cut.steps
            axes.plot(where, cut.values, linewidth=1.0, marker=".", markersize=4, **look)
            axes.annotate(f"at {depth}", (where[0], cut.values[0]), (-5, 0), textcoords="offset points", **_LEFT)
            shown.append(cut.values)
    _scale(axes, np.concatenate(shown) if shown else np.zeros(0))
    if shown:
        figure.legend(loc="outside lower left", ncols=2)
    return figure


def scalar(run: Log, other: Log | None, name: str, title: str) -> Figure:
    """One scalar of both runs over their steps."""
    figure, axes = _panel(title)
    shown = []
    for log, look in ((other, _OTHER), (run, _THIS)):
        if log and name in log:
            thin = _thinned(log[name])
            axes.plot(thin.steps, thin.values, linewidth=1.2, **look)
            shown.append(thin.values)
    if name != "learning_rate":  # which ends near zero
        _scale(axes, np.concatenate(shown) if shown else np.zeros(0))
    return figure


def seconds(log: Log, steps: np.ndarray) -> np.ndarray:
    """How long the training steps up to these took, by what was measured between two entries; NaN if nothing was."""
    if STEP_SECONDS not in log:
        return np.full(len(steps), np.nan)
    return np.interp(steps, np.r_[-1, log[STEP_SECONDS].steps], np.r_[0.0, _seconds_of(log)])


def parts_of_time(log: Log) -> dict[str, float]:
    """Seconds that a run took so far, by what it did; what nothing was measured of is left out."""
    within = {STEPS: STEP_SECONDS, "of these, waiting for data": DATA_SECONDS}
    between = {"held-out losses": "held_out_seconds", "saving, before training goes on": "save_seconds"}
    found = {what: float(_seconds_of(log, name)[-1]) for what, name in within.items() if name in log}
    return found | {what: float(log[name].values.sum()) for what, name in between.items() if name in log}


def _seconds_of(log: Log, name: str = STEP_SECONDS) -> np.ndarray:
    """Their sum at each entry that has the mean of a step; steps that were not measured are taken to be alike."""
    if name not in log:
        return np.zeros(0)
    return np.cumsum(log[name].values * np.diff(log[name].steps, prepend=-1))


def _panel(title: str, below: str = "step") -> tuple[Figure, Axes]:
    figure = new_figure(5.4, 3.2)
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(below)
    return figure, axes


def _thinned(curve: Curve) -> Curve:
    parts = min(len(curve.steps), _MOST)
    return Curve(*(np.array([part.mean() for part in np.array_split(values, parts)]) for values in curve))


def _scale(axes: Axes, values: np.ndarray) -> None:
    """Logarithmic where values are of several sizes."""
    known = values[np.isfinite(values)]
    if len(known) and known.min() > 0 and known.max() > _WIDE * known.min():
        logarithmic(axes, *limits(known), alike=False)
