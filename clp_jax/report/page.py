"""The page itself: which figure and which table comes where, and the words between them."""

import dataclasses
import html
import math
from collections.abc import Mapping

from clp_jax.analysis import Analysis, EvidenceOptions
from clp_jax.findings import Findings, Size
from clp_jax.healed_cuts import OBSERVATIONS
from clp_jax.plan import PrunePlan
from clp_jax.provenance import versions
from clp_jax.report.canvas import file_name
from clp_jax.report.criteria import ratio
from clp_jax.report.document import card, change_of, document
from clp_jax.report.tables import (
    alike,
    blocks_table,
    blocks_text,
    change,
    compact,
    criteria_table,
    readings_table,
    repairs_table,
    settings_list,
    tried_table,
)
from clp_jax.report.view import GroupView


def page(
    analysis: Analysis,
    findings: Findings,
    options: EvidenceOptions,
    views: tuple[GroupView, ...],
    drawings: Mapping[str, str],
) -> str:
    """The whole report.

    Args:
      analysis: from ``analyse``.
      findings: what it comes to.
      options: which variant of CKA the selection read.
      views: the groups of towers.
      drawings: figures as SVG elements, by the name of their PNG without its ending.
    """
    title = f"Layer pruning of {analysis.kind}"
    parts = [
        _header(title, analysis, findings),
        _warnings(findings),
        _headline(analysis, findings),
        _guide(findings),
        _matrices(analysis, drawings),
        _criteria(findings, views),
        _healing(findings),
        *(_group(view, findings, drawings) for view in views),
        _limits(findings),
        _settings(analysis, findings, options, drawings),
    ]
    return document(title, parts)


def _header(title: str, analysis: Analysis, findings: Findings) -> str:
    samples = ", ".join(f"{tower.samples:,} of {html.escape(name)}" for name, tower in analysis.towers.items())
    return (
        f"<header><h1>{html.escape(title)}</h1><p><code>{html.escape(findings.checkpoint)}</code></p>"
        f"<p>Criterion <b>{html.escape(findings.plan.criterion)}</b>. "
        f"Calibrated on {_count(analysis.meta, 'observations')} from {_count(analysis.meta, 'episodes')}. "
        f"CKA samples: {samples}.</p></header>"
    )


def _count(meta: Mapping[str, object], what: str) -> str:
    value = meta.get(what, "an unknown number of")
    return f"{html.escape(str(value))} {what if value != 1 else what.removesuffix('s')}"


def _warnings(findings: Findings) -> str:
    if not findings.warnings:
        return ""
    items = "".join(f"<li>{html.escape(warning)}</li>" for warning in findings.warnings)
    return f'<aside class="warnings"><h2>Before you trust this</h2><ul>{items}</ul></aside>'


def _headline(analysis: Analysis, findings: Findings) -> str:
    cards = []
    grouped = {name for group in analysis.groups for name in group}
    for group in (*analysis.groups, *((name,) for name in analysis.depths if name not in grouped)):
        depth, gone = analysis.depths[group[0]], len(findings.plan.removed(group[0]))
        note = f"{gone} removed" if gone else "untouched"
        cards.append(card(f"blocks, {'+'.join(group)}", change_of(str(depth), str(depth - gone)), note))
    for label, unit, full, pruned in _sizes(findings.before, findings.after):
        cards.append(card(label, change_of(*change(full, pruned, unit)), f"{pruned / full:.1%} stays"))
    loss = findings.choices[0].loss if findings.choices else math.nan
    times = ratio(loss, findings.full_loss)
    note = f"{times:.3f} times unpruned, {findings.loss_data}" if math.isfinite(times) else "not measured"
    cards.append(card("zero-shot loss", change_of(compact(findings.full_loss), compact(loss)), note))
    if findings.healed is not None:
        healed = change_of(compact(loss), compact(findings.healed.loss))
        cards.append(card("loss, cut and healed", healed, findings.loss_data))
    return f'<section class="cards">{"".join(cards)}</section>'


def _sizes(before: Size, after: Size) -> list[tuple[str, str, int, int]]:
    rows = [
        ("parameters", "", before.parameters, after.parameters),
        ("forward pass, counted", "FLOP", before.forward, after.forward),
    ]
    if before.sample is not None and after.sample is not None:
        rows.append(("sampling a chunk, counted", "FLOP", before.sample, after.sample))
    return rows


def _guide(findings: Findings) -> str:
    return (
        "<section><h2>How to read this</h2><p>Each transformer block reads a hidden state and adds to it. CKA compares "
        "two states over the same samples: 1 means that one is a rotated, scaled and shifted copy of the other. Blocks "
        "whose output resembles their input are twins of their predecessor, and candidates for removal. Blocks are "
        "numbered from 0. States are numbered from 0 too: state 0 is the tower's input, state <i>i</i> the residual "
        "stream after block <i>i</i>&nbsp;&minus;&nbsp;1. <span class=key-gone></span> Orange or square is removed; "
        f"<span class=key-stays></span> plain or round is kept. {_loss_words(findings)}</p></section>"
    )


def _loss_words(findings: Findings) -> str:
    what = (
        "the cross entropy of the action tokens"
        if findings.before.sample is None
        else "the flow-matching loss with fixed noise and times"
    )
    return (
        f"The loss is {what} on {html.escape(findings.loss_data)}, "
        "<b>zero-shot: blocks are switched off and nothing is re-trained.</b>"
    )


def _matrices(analysis: Analysis, drawings: Mapping[str, str]) -> str:
    figures = "".join(f"<figure>{drawings[f'cka_{name}']}</figure>" for name in analysis.towers)
    unread = {
        name: [state for state, read in enumerate(tower.read) if not read] for name, tower in analysis.towers.items()
    }
    notes = "".join(
        f" Grey in {html.escape(name)}: nothing reads state {blocks_text(states)} (of a last block that feeds others, "
        "only keys and values are used), or it is of another scale, so it takes no part in the selection."
        for name, states in unread.items()
        if states
    )
    return (
        "<section><h2>Similarity of all states</h2><p>Dark squares along the diagonal are runs of alike states. The "
        "bands have one cell per block, at the state after it; a removed block's own entry, its output against its "
        "input, is framed. Colours follow the logarithm of 1&nbsp;&minus;&nbsp;CKA, the same for all matrices."
        f"{notes}</p>"
        f"<div class=matrices>{figures}</div></section>"
    )


def _criteria(findings: Findings, views: tuple[GroupView, ...]) -> str:
    order = "the loss it leaves" if findings.healed is None else "the loss that is left once it has been healed"
    return (
        "<section><h2>Criteria at the same depth</h2><p>What each criterion would remove, as many blocks as the plan, "
        f"sorted by {order}. {_loss_words(findings)} Unpruned: {compact(findings.full_loss)}.</p>"
        f"{criteria_table(findings, views)}</section>"
    )


def _healing(findings: Findings) -> str:
    if findings.healed is None:
        return ""
    return (
        "<section><h2>What healing would leave</h2><p>The last weights of the kept blocks can be refitted in closed "
        "form, <code>clp prune --heal</code>, for a model that is used without fine-tuning. Below is what that does "
        "under the plan: how far the stream after a block is from what the next one expects, in units of its norm, on "
        "held-out observations, before the block was healed (those before it were) and after. At most "
        f"{OBSERVATIONS} observations were fitted on; <code>clp prune --heal</code> fits on all. Loss: "
        f"{compact(findings.full_loss)} unpruned, {compact(findings.choices[0].loss)} cut, "
        f"{compact(findings.healed.loss)} healed.</p>{repairs_table(findings.healed.repairs)}"
        f"{_tried(findings.plan)}</section>"
    )


def _tried(plan: PrunePlan) -> str:
    """The cuts that the criterion healed compared."""
    found = "".join(
        f"<h3>{html.escape(group)}: cuts that were healed, best first</h3>{tried_table(plan, group)}"
        for group, scores in plan.scores.items()
        if scores.get("tried")
    )
    alone = len([1 for scores in plan.scores.values() if scores.get("tried")]) > 1
    return found + ("<p>Each with the other towers whole.</p>" if alone else "")


def _group(view: GroupView, findings: Findings, drawings: Mapping[str, str]) -> str:
    runs, joined = "", "; it applies to the joined similarity of the towers" if len(view.towers) > 1 else ""
    if view.twins.get("runs"):
        runs = (
            "Diamonds are the anchors of the paper's twin runs, dots their twins, at threshold τ = "
            f"{alike(view.twins['tau'])}. It is the highest at which enough twins may go{joined}. "
        )
    return (
        f"<section><h2>{html.escape(view.name)}: {view.depth} blocks, {len(view.removed)} removed</h2><p>{runs}CKA is "
        "blind to rotation and scale, but the next block is not: a twin with a low cosine or a large relative residual "
        "|output&nbsp;&minus;&nbsp;input|&nbsp;/&nbsp;|input| is no safe removal. Scales are logarithmic in the "
        "distance from 1.</p>"
        f"{_wide(drawings[f'profile_{view.name}'])}{blocks_table(view, findings.plan.criterion)}"
        "<h3>Does the choice depend on how CKA is computed?</h3><p>Raw states or states of unit root mean square; the "
        "paper's biased estimate or the debiased one, which few samples cannot inflate.</p>"
        f"{_wide(drawings[f'variants_{view.name}'])}"
        f"<div class=pair>{readings_table(view)}{_costs(drawings.get(f'costs_{view.name}'))}</div></section>"
    )


def _wide(drawing: str) -> str:
    """A figure that scrolls where the page is too narrow for its letters."""
    return f'<div class="scroll wide"><figure>{drawing}</figure></div>'


def _costs(drawing: str | None) -> str:
    if drawing is None:
        return ""
    return (
        f"<figure class=half>{drawing}<figcaption>Line: the cheapest way to remove any number of blocks, which "
        "criterion jumps takes. Square: the plan. A bend suggests a depth; a curve that bends evenly suggests none."
        "</figcaption></figure>"
    )


def _limits(findings: Findings) -> str:
    intervals = (
        "Intervals and resamples draw whole episodes with replacement. They say what other episodes of this data set "
        "might have shown, not what another data set or another training run would."
        if findings.intervals
        else "There are no intervals: they need at least two clusters of episodes."
    )
    return (
        "<section><h2>What this does not say</h2><ul><li>Losses are zero-shot, before any fine-tuning. They rank "
        "choices; how well the smaller model does after fine-tuning, or on a robot, they do not tell.</li>"
        f"<li>{intervals}</li><li>Parameters and FLOPs are counted from shapes. Time and memory depend on the "
        "hardware: measure them.</li></ul></section>"
    )


def _settings(analysis: Analysis, findings: Findings, options: EvidenceOptions, drawings: Mapping[str, str]) -> str:
    files = ", ".join(f"<code>{html.escape(file_name(name))}</code>" for name in drawings)
    settings = {"kind": analysis.kind, "checkpoint": findings.checkpoint, "options": dataclasses.asdict(options)}
    return (
        f"<footer><h2>Settings and versions</h2>{settings_list(settings | analysis.meta)}{settings_list(versions())}"
        f"<p>The figures for slides are beside this page: {files}.</p></footer>"
    )
