"""``report.html`` of a run of ``finetune``: how far it is, its curves, and what was done before it."""

import dataclasses
import datetime
import html
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from clp_jax.errors import InputError
from clp_jax.history import REPORT, Step, length_of, steps_of
from clp_jax.outputs import write_whole
from clp_jax.plan import PrunePlan
from clp_jax.provenance import conventions_of, healing, versions
from clp_jax.report.canvas import inline_svg, style
from clp_jax.report.curves import (
    HELD_OUT,
    STEP_SECONDS,
    STEPS,
    Log,
    held_out_at,
    losses,
    parts_of_time,
    scalar,
    seconds,
    training_loss,
)
from clp_jax.report.document import card, change_of, document, link
from clp_jax.report.tables import compact, cut_strips, cuts_of, settings_list, table
from clp_jax.training.logs import LOG_FILE, Curve, read_log
from clp_jax.training.saving import saved_record

_ROWS = 12
"""Held-out losses in the table; of more, so many evenly spaced ones and the lowest."""
_SAME = ("data_fingerprint", "statistics_fingerprint", "conventions")
_SAME_FLAGS = (
    "holdout_ratio",
    "holdout_data",
    "evaluate_observations",
    "seed",
    "weights",
    "episodes",
    "action_samples",
)
"""Flags that decide which observations are held out."""


@dataclasses.dataclass(frozen=True)
class RunView:
    """What a page shows of a run.

    Attributes:
      folder: of the run.
      record: content of the ``clp.json`` of its steps.
      log: its curves.
    """

    folder: epath.Path
    record: Mapping[str, Any]
    log: Log

    @property
    def entry(self) -> Mapping[str, Any]:
        """What the fine-tuning read and was told."""
        return self.record["steps"][-1]

    @property
    def plan(self) -> PrunePlan:
        """From the original model to the one that is trained."""
        return PrunePlan.from_json(self.record["plan"])

    @property
    def name(self) -> str:
        """For a legend: the folder, and how deep the model is."""
        depths = {f"{len(tower.keep)} of {tower.depth}" for tower in self.plan.towers.values() if tower.removed}
        return f"{self.folder.name} ({', '.join(sorted(depths)) or 'all'} blocks)"


def write_run_report(folder: str | os.PathLike[str], record: Mapping[str, Any], other: RunView | None = None) -> None:
    """Write the page of a run into its folder; it embeds its figures and loads nothing.

    Args:
      folder: of the run, with its ``metrics.jsonl``.
      record: content of the ``clp.json`` of its steps.
      other: a run to compare with, whose log is read again; where that is gone, it stays as it was.
    """
    run = RunView(epath.Path(folder), record, read_log(folder))
    if other is not None:
        other = dataclasses.replace(other, log=read_log(other.folder) or other.log)
    write_whole(run.folder / REPORT, run_page(run, other))


def read_run(folder: str | os.PathLike[str]) -> RunView:
    """Another run, which may be going on.

    Raises:
      InputError: there is no run of ``clp finetune`` that saved a step and logged.
    """
    path = epath.Path(folder).expanduser()
    record = saved_record(path)
    log = read_log(path)
    if record is None or not log or (record.get("steps") or [{}])[-1].get("command") != "finetune":
        raise InputError(f"{folder} is no run of clp finetune with a saved step and {LOG_FILE}; give another folder.")
    return RunView(path, record, log)


def run_before(record: Mapping[str, Any]) -> RunView | None:
    """The run whose saved step was pruned to make the model of a run, if it is still there and of the same data.

    Args:
      record: content of the run's ``clp.json``.
    """
    pruned = [step for step in steps_of(record) if step.removed is not None]
    item = epath.Path(pruned[-1].source if pruned and pruned[-1].source else "")
    for folder in item.parents[:2]:
        before = saved_record(folder) if (folder / LOG_FILE).exists() else None
        log = {} if before is None else read_log(folder)
        if before is not None and log and not _unlike(record["steps"][-1], before["steps"][-1]):
            return RunView(folder, before, log)
    return None


def run_page(run: RunView, other: RunView | None) -> str:
    """The page of a run, perhaps beside another.

    Args:
      run: what the page is about.
      other: what it is compared with, such as the full model's run.
    """
    title = f"Fine-tuning of {run.plan.kind}"
    parts = [
        _header(title, run),
        _warnings(run, other),
        _headline(run, other),
        _figures(run, other),
        _held_out(run, other),
        _time(run),
        _before(run),
        _settings(run),
    ]
    return document(title, parts)


def _header(title: str, run: RunView) -> str:
    done = 1 + max((int(curve.steps[-1]) for curve in run.log.values()), default=-1)
    now = datetime.datetime.now(datetime.UTC)
    return (
        f"<header><h1>{html.escape(title)}</h1><p><code>{html.escape(os.fspath(run.folder))}</code></p>"
        f"<p><b>{done:,} of {run.entry['config']['steps']:,} steps</b>, as of {now:%Y-%m-%d %H:%M} UTC. "
        f"The same numbers are in <code>{LOG_FILE}</code> and TensorBoard.</p></header>"
    )


def _warnings(run: RunView, other: RunView | None) -> str:
    unlike = [] if other is None else _unlike(run.entry, other.entry)
    if not unlike:
        return ""
    return (
        '<aside class="warnings"><h2>The held-out losses do not compare</h2><p>They are of other observations, or of '
        f"other noise: the two runs differ in {html.escape(', '.join(unlike))}.</p></aside>"
    )


def _unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What decides a held-out loss and is not the same in the entries of two runs."""
    found = [name.replace("_fingerprint", "") for name in _SAME if one.get(name) != other.get(name)]
    flags = [entry.get("config") or {} for entry in (one, other)]
    return found + [f"--{name.replace('_', '-')}" for name in _SAME_FLAGS if flags[0].get(name) != flags[1].get(name)]


def _headline(run: RunView, other: RunView | None) -> str:
    cards = []
    for group, tower in cuts_of(run.plan):
        cards.append(
            card(f"blocks, {'+'.join(group)}", change_of(str(tower.depth), str(len(tower.keep))), "original to now")
        )
    for name, curve in (("held-out loss", run.log.get(HELD_OUT)), ("training loss", training_loss(run.log))):
        if curve is not None:
            lowest = int(np.argmin(curve.values))
            note = f"first to last; lowest {curve.values[lowest]:.4g} after step {curve.steps[lowest]:,}"
            cards.append(card(name, change_of(compact(curve.values[0]), compact(curve.values[-1])), note))
    if (seconds := _step_seconds(run)) is not None:
        value, note = f"<b>{compact(seconds, 3)}</b> s", f"median, {_rate(run, seconds)}"
        if other is not None and (before := _step_seconds(other)) is not None:
            value = change_of(compact(before, 3), f"{compact(seconds, 3)} s")
            note = f"median, {other.name} to this run: {seconds / before:.2f} times"
        cards.append(card("training step", value, note))
    return f'<section class="cards">{"".join(cards)}</section>'


def _step_seconds(run: RunView) -> float | None:
    return float(np.median(run.log[STEP_SECONDS].values)) if STEP_SECONDS in run.log else None


def _rate(run: RunView, seconds: float) -> str:
    rate = f"{run.entry['config']['batch_size'] / seconds:.3g} observations a second"
    share = run.log.get("mfu")
    return rate if share is None else f"{rate}, {np.median(share.values):.0%} of the chips' peak"


def _figures(run: RunView, other: RunView | None) -> str:
    behind = None if other is None else other.log
    names = (run.name, "" if other is None else other.name)
    drawings = []
    for title, draw in (
        ("loss by step", lambda: losses(run.log, behind, names, by_time=False)),
        ("loss by time", lambda: losses(run.log, behind, names, by_time=True)),
        ("learning rate", lambda: scalar(run.log, behind, "learning_rate", "learning rate")),
        ("norm of the gradient", lambda: scalar(run.log, behind, "grad_norm", "norm of the gradient")),
        ("seconds of a step", lambda: scalar(run.log, behind, STEP_SECONDS, "seconds of a training step")),
    ):
        if title == "loss by time" and STEP_SECONDS not in run.log:
            continue
        with style(title):
            drawings.append(f"<figure>{inline_svg(draw(), title)}</figure>")
    against = ""
    if other is not None:
        page = other.folder / REPORT
        against = f" Dashed: {link(page if page.exists() else other.folder, run.folder, other.name)}."
    return (
        "<section><h2>Curves</h2><p>Held-out losses are of the same observations, noise and times at every step. Time "
        f"counts training steps alone, not compiling, evaluating and saving.{against}</p>"
        f"<div class=matrices>{''.join(drawings)}</div></section>"
    )


def _held_out(run: RunView, other: RunView | None) -> str:
    curve = run.log.get(HELD_OUT)
    if curve is None:
        return ""
    spent, best = seconds(run.log, curve.steps), int(np.argmin(curve.values))
    even = np.linspace(0, len(curve.steps) - 1, min(len(curve.steps), _ROWS)).round().astype(int)
    chosen = np.union1d(even, [best])
    cuts = held_out_at(run.log)
    head = ["step", "time of<br>training steps", "held-out loss", *(f"at {depth}" for depth, _ in cuts)]
    head += [] if other is None else [html.escape(other.name), "ratio"]
    rows = []
    for i in chosen:
        row = [f"{curve.steps[i]:,}", _clock(spent[i]), compact(curve.values[i])]
        row += [compact(_value_at(cut, int(curve.steps[i]))) for _, cut in cuts]
        if other is not None:
            same = _value_at(other.log.get(HELD_OUT), int(curve.steps[i]))
            row += [compact(same), compact(curve.values[i] / same)]
        rows.append(row)
    marked = [bool(i == best) for i in chosen]
    return f"<section><h2>Held-out loss</h2>{table(head, rows, marked=marked, name='readings')}</section>"


def _time(run: RunView) -> str:
    parts = parts_of_time(run.log)
    step = parts.get(STEPS)
    if not step:
        return ""
    rows = [[html.escape(what), _clock(value), f"{value / step:.1%}"] for what, value in parts.items()]
    head = ["", "time", "of the time of<br>training steps"]
    return (
        "<section><h2>Where the time went</h2><p>Data are read ahead of the devices: waiting for them costs nothing "
        "until it takes as long as a step. Compiling is not counted, nor is the writing of a saved step while training "
        f"goes on.</p>{table(head, rows, marked=[False] * len(rows), name='time')}</section>"
    )


def _value_at(curve: Curve | None, step: int) -> float:
    """NaN where nothing was logged."""
    found = np.zeros(0) if curve is None else curve.values[curve.steps == step]
    return float(found[0]) if len(found) else np.nan


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds))) if np.isfinite(seconds) else compact(None)


def _before(run: RunView) -> str:
    items = "".join(f"<li>{_told(step, run)}</li>" for step in steps_of(run.record))
    conventions = conventions_of(run.record)
    said = "" if conventions is None else f"<h3>Conventions</h3><p>{html.escape(str(conventions))}</p>"
    return f"<section><h2>What was done</h2><ol>{items}</ol>{said}</section>"


def _told(step: Step, run: RunView) -> str:
    source = "" if step.source is None else f" from <code>{html.escape(step.source)}</code>"
    data = "" if step.data is None else f" on <code>{html.escape(step.data)}</code>"
    if step.plan is None:
        length = f" for {length}" if (length := length_of(step)) else ""
        cuts = ["; ".join(f"{html.escape(tower)} {len(kept)}" for tower, kept in cut.items()) for cut in step.cuts]
        return f"Fine-tuned{source}{data}{length}{''.join(f', in turn with its cut to {cut}' for cut in cuts)}."
    plan = PrunePlan.from_json(step.plan)
    chosen = f", chosen by <b>{html.escape(plan.criterion)}</b>{data}"
    report = "" if step.report is None else f" {link(step.report, run.folder, 'Report behind the choice')}."
    healed = "" if step.healed is None else f" {html.escape(f'H{healing(step.healed, step.healed_on)[1:]}')}."
    return f"Pruned{source}{chosen}.{healed}{report}{cut_strips(plan)}"


def _settings(run: RunView) -> str:
    config = {name: value for name, value in run.entry["config"].items() if value is not None and value != []}
    return f"<footer><h2>Settings and versions</h2>{settings_list(config)}{settings_list(versions())}</footer>"
