"""The numbers of the report as HTML. Everything that is not a literal here goes through `html.escape`."""

import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clp_jax.findings import Choice, Findings
from clp_jax.healing import Repair
from clp_jax.plan import PrunePlan, TowerPlan
from clp_jax.report.criteria import pruned_groups, ranked, ratio
from clp_jax.report.view import GroupView
from clp_jax.similarity import VARIANTS

_NOT_KNOWN = '<span class="none">&ndash;</span>'

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))


def number(value: float | None, digits: int = 3) -> str:
    """A number with fixed decimals, or a dash for what is not known.

    >>> number(0.98765), number(None)[-14:]
    ('0.988', '&ndash;</span>')
    """
    if value is None or not math.isfinite(value):
        return _NOT_KNOWN
    return f"{value:.{digits}f}".replace("-", "&minus;")


def alike(value: float, digits_of: float | None = None) -> str:
    """CKA with as many decimals as it takes to tell it from 1, four to six, or as another CKA needs.

    >>> alike(0.9), alike(0.999987), alike(0.9999, digits_of=0.999987)
    ('0.9000', '0.999987', '0.999900')
    """
    gap = 1 - (value if digits_of is None else digits_of)
    digits = 4 if not gap < 1e-3 else 1 - math.floor(math.log10(max(gap, 1e-5)))
    return number(value, digits)


def compact(value: float | None, digits: int = 4) -> str:
    """A number of any size with that many significant digits, or a dash."""
    if value is None or not math.isfinite(value):
        return _NOT_KNOWN
    return f"{value:#.{digits}g}".rstrip(".").replace("-", "&minus;")


def change(before: int, after: int, unit: str = "") -> tuple[str, str]:
    """Two large counts in the unit that suits the first.

    >>> change(3_238_000_000, 475_000_000), change(42 * 10**11, 31 * 10**11, "FLOP"), change(950_000, 20_000)
    (('3.24', '0.475 B'), ('4.20', '3.10 TFLOP'), ('950', '20.0 K'))
    """
    size, letter = next(((s, x) for s, x in _PREFIXES if before >= s), (1.0, ""))
    letter = "B" if letter == "G" and not unit else letter
    return _three(before / size), f"{_three(after / size)} {letter}{unit}".strip()


def _three(value: float) -> str:
    """Three significant digits, trailing zeros included, no exponent."""
    return f"{value:#.3g}".rstrip(".") if 0.001 <= value < 999.5 else f"{value:.0f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, marked: Sequence[bool], name: str) -> str:
    """A table of ready-made cells; rows of which ``marked`` is true stand out. Wide tables scroll on their own."""
    columns = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr{' class=marked' if mark else ''}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for row, mark in zip(rows, marked, strict=True)
    )
    return (
        f'<div class="scroll"><table class="{name}"><thead><tr>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def strip(depth: int, removed: Sequence[int]) -> str:
    """One row of cells, one a block; removed ones are filled and struck through."""
    cells = []
    for block in range(depth):
        x = 13 * block
        gone = block in removed
        cells.append(f'<rect class="{"gone" if gone else "stays"}" x="{x}" y="1" width="12" height="14"/>')
        if gone:
            cells.append(f'<path class="strike" d="M{x + 2} 13L{x + 10} 3"/>')
    label = f"removed: {blocks_text(removed)}"
    width = 13 * depth
    return (
        f'<svg class="strip" role="img" aria-label="{label}" viewBox="0 0 {width} 16" width="{width}" height="16">'
        f"<title>{label}</title>{''.join(cells)}</svg>"
    )


def cut_strips(plan: PrunePlan) -> str:
    """The blocks of every tower that a plan cuts; of towers that keep the same ones a single row."""
    return "".join(
        f'<div class="group">{strip(tower.depth, tower.removed)}<small>{html.escape("+".join(group))}: without '
        f"{blocks_text(tower.removed)}</small></div>"
        for group, tower in cuts_of(plan)
    )


def cuts_of(plan: PrunePlan) -> Iterator[tuple[tuple[str, ...], TowerPlan]]:
    """Towers that a plan cuts, those that keep the same blocks as one group."""
    for name, tower in plan.towers.items():
        group = next((group for group in plan.coupled if name in group), (name,))
        if tower.removed and name == group[0]:
            yield group, tower


def blocks_text(blocks: Sequence[int]) -> str:
    """Block numbers in a line."""
    return " ".join(map(str, blocks)) or "none"


def blocks_table(view: GroupView, criterion: str) -> str:
    """Every block of a group: how alike its output is to its input, how it was rated, and what becomes of it."""
    head = ["block"]
    columns: list[list[str]] = [[str(block) for block in range(view.depth)]]
    for tower in view.towers:
        similarity, interval = view.blocks(tower, "similarity"), view.interval(tower)
        name = html.escape(tower)
        head += [f"{name}<br>CKA", "cosine", "residual"]
        columns.append([_with_interval(*values) for values in zip(similarity, *interval, strict=True)])
        columns.append([alike(value) for value in view.blocks(tower, "cosine")])
        columns.append([compact(value, 3) for value in view.blocks(tower, "residual")])
    if view.gates.sensitivity is not None:
        head.append("gate<br>sensitivity")
        sensitivity = view.gates.sensitivity.astype(np.float64)
        columns.append([_bar(value, np.nanmax(sensitivity)) for value in sensitivity])
    head.append(f"score<br>{html.escape(criterion)}")
    columns.append([alike(score) if 0.9 < score <= 1 else compact(score) for score in view.scores()])
    if view.stability is not None:
        head.append("removed by clp<br>in resamples")
        columns.append([_bar(share, 1.0, f"{share:.0%}") for share in view.stability])
    gone = [block in view.removed for block in range(view.depth)]
    head.append("plan")
    columns.append(["removed" if removed else "kept" for removed in gone])
    return table(head, zip(*columns, strict=True), marked=gone, name="blocks")


def readings_table(view: GroupView) -> str:
    """What the paper's rule would remove under each variant of CKA."""
    used = VARIANTS.index((view.options.states, view.options.estimator))
    reference = view.clp_under(used)
    rows = []
    for index, variant in enumerate(VARIANTS):
        removed = view.clp_under(index)
        if removed is None:
            rows.append([", ".join(variant), "not possible: too few values are known", _NOT_KNOWN])
            continue
        same = _NOT_KNOWN if reference is None else f"{len(set(removed) & set(reference))} of {len(removed)}"
        rows.append([", ".join(variant), strip(view.depth, removed), same])
    return table(
        ["CKA variant", "blocks that rule clp removes", "same as used"],
        rows,
        marked=[index == used for index in range(len(rows))],
        name="readings",
    )


def criteria_table(findings: Findings, views: tuple[GroupView, ...]) -> str:
    """Every criterion at the same depth, sorted by loss."""
    groups, choices = pruned_groups(findings, views), ranked(findings)
    ratios = [ratio(choice.loss, findings.full_loss) for choice in choices]
    worst = max((value for value in ratios if math.isfinite(value)), default=math.nan)
    marked = [choice.criterion == findings.plan.criterion for choice in choices]
    rows = []
    for choice, value, is_plan in zip(choices, ratios, marked, strict=True):
        strips = "".join(
            f'<div class="group">{strip(view.depth, choice.plan.removed(tower))}'
            f"<small>{html.escape(view.name)}: {blocks_text(choice.plan.removed(tower))}</small></div>"
            for view, tower in groups
        )
        loss = compact(choice.loss) if math.isfinite(choice.loss) else '<span class="none">not measured</span>'
        name = html.escape(choice.criterion) + ("<small>the plan</small>" if is_plan else "")
        rows.append([name, strips or "none", loss, _times(value, worst), _predicted(choice)])
    times = "times unpruned<br><small>bar: log scale</small>"
    head = ["criterion", "removed blocks", "zero-shot loss", times, "predicted cost"]
    if any(choice.healed for choice in choices):
        head.append("loss, healed")
        for row, choice in zip(rows, choices, strict=True):
            row.append(compact(choice.healed.loss if choice.healed else None))
    return table(head, rows, marked=marked, name="criteria")


def repairs_table(repairs: Sequence[Repair]) -> str:
    """What healing does to every kept block."""
    rows = [
        [
            html.escape(one.tower),
            "all" if one.block is None else str(one.block),
            blocks_text(one.removed),
            _NOT_KNOWN if math.isnan(one.before) else f"{one.before:.1%}",
            html.escape(one.outcome),
        ]
        for one in repairs
    ]
    head = ["tower", "block", "removed after it", "off before", "off after healing"]
    return table(head, rows, marked=[bool(one.removed) for one in repairs], name="repairs")


def tried_table(plan: PrunePlan, group: str) -> str:
    """The cuts of a group of towers that the criterion healed compared, best first."""
    tried, depth = plan.scores[group]["tried"], plan.towers[group.partition("+")[0]].depth
    rows = [
        [
            ", ".join(map(html.escape, cut["by"])),
            f'<div class="group">{strip(depth, cut["removed"])}<small>{blocks_text(cut["removed"])}</small></div>',
            compact(cut["loss"]),
        ]
        for cut in tried
    ]
    marked = [index == 0 for index in range(len(rows))]
    return table(["proposed by", "removed blocks", "loss, healed"], rows, marked=marked, name="criteria")


def settings_list(settings: Mapping[str, Any]) -> str:
    """Names and values, nested ones joined by dots."""
    items = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>" for key, value in _flat(settings))
    return f'<dl class="settings">{items}</dl>'


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _with_interval(value: float, low: float, high: float) -> str:
    if not (math.isfinite(low) and math.isfinite(high)):
        return alike(value)
    return f"{alike(value)} <small>[{alike(low, value)}, {alike(high, value)}]</small>"


def _bar(value: float, largest: float, text: str | None = None) -> str:
    """A number over a bar of its size."""
    if not math.isfinite(value):
        return _NOT_KNOWN
    share = value / largest if largest > 0 else 0.0
    return f'<span class="bar" style="--share:{max(share, 0.0):.3f}">{text or compact(value, 3)}</span>'


def _times(value: float, worst: float) -> str:
    if not math.isfinite(value):
        return _NOT_KNOWN
    share = math.log(value) / math.log(worst) if value > 1 and worst > 1 else 0.0
    return f'<span class="bar wide" style="--share:{share:.3f}">{value:.3f}</span>'


def _predicted(choice: Choice) -> str:
    found = [
        f"{compact(scores['predicted_cost'])} <small>{html.escape(str(scores.get('unit', '')))}</small>"
        for scores in choice.plan.scores.values()
        if scores.get("removed") and scores.get("predicted_cost") is not None
    ]
    return "<br>".join(found) or _NOT_KNOWN
