"""``report.html`` of an advice: the depths beside each other, and the cut that is advised."""

import html
from collections.abc import Mapping
from pathlib import Path

from clp_jax.advising.candidates import FULL
from clp_jax.advising.costs import Cost
from clp_jax.advising.picture import draw
from clp_jax.advising.verdict import Place, Verdict
from clp_jax.history import REPORT
from clp_jax.report.canvas import inline_svg, png, style
from clp_jax.report.document import card, change_of, document
from clp_jax.report.tables import change, compact, cut_strips, table

_LIMITS = """<section><h2>What this does not say</h2><ul>
<li>Trials are short. A depth that is behind early may catch up in a long run, and the other way round.</li>
<li>Intervals draw held-out episodes with replacement. They say what other episodes might have shown, not what another
seed would.</li>
<li>Times are of the machine on which this was measured.</li></ul></section>"""


def write_page(folder: Path, verdict: Verdict, costs: Mapping[str, Cost], checkpoint: str, tolerance: float) -> None:
    """Write ``report.html``, which loads nothing, and its figure ``advice.png``.

    Args:
      folder: of the advice.
      verdict: what is advised.
      costs: by depth.
      checkpoint: that the advice is for, as the user wrote it.
      tolerance: share by which the loss may exceed the whole model's.
    """
    shown = [costs[place.candidate.depth] for place in verdict.places]
    axes = {
        "training step, ms": [1e3 * cost.step_seconds for cost in shown],
        "sampling a chunk, ms": [1e3 * cost.sample_seconds for cost in shown if cost.sample_seconds is not None],
        "parameters and optimiser, GB": [cost.state_bytes / 1e9 for cost in shown],
    }
    with style("advice"):
        drawn = {label: values for label, values in axes.items() if values}
        figure = draw(verdict, drawn, f"Depth against loss, {checkpoint}")
        (folder / "advice.png").write_bytes(png(figure))
        drawing = inline_svg(figure, "held-out loss of every depth against what it costs")
    best = verdict.best
    parts = [
        _header(best, checkpoint, tolerance),
        _headline(best, costs),
        f'<section><h2>Depth against loss</h2><div class="scroll wide"><figure>{drawing}</figure></div></section>',
        f"<section><h2>The best of each depth</h2>{_depths(verdict, costs)}</section>",
        f"<section><h2>The cut</h2>{cut_strips(best.candidate.plan) or 'No block goes.'}</section>",
        _LIMITS,
    ]
    (folder / REPORT).write_text(document("Advice on depth", parts), encoding="utf-8")


def _header(best: Place, checkpoint: str, tolerance: float) -> str:
    return (
        f"<header><h1>Advised depth: {html.escape(best.candidate.depth)}</h1>"
        f"<p><code>{html.escape(checkpoint)}</code></p>"
        f"<p>The fastest depth within {100 * tolerance:g}% of the whole model's held-out loss after equal training "
        f"time. So it is in <b>{best.chosen:.0%}</b> of the resamples of held-out episodes.</p></header>"
    )


def _headline(best: Place, costs: Mapping[str, Cost]) -> str:
    full, cost = costs[FULL], costs[best.candidate.depth]
    low, high = best.interval
    cards = [
        card("parameters", change_of(*change(full.parameters, cost.parameters)), "the whole model to the advised one"),
        card(
            "training step",
            change_of(compact(1e3 * full.step_seconds, 3), f"{compact(1e3 * cost.step_seconds, 3)} ms"),
            f"{cost.step_seconds / full.step_seconds:.2f} times",
        ),
        card(
            "held-out loss",
            change_of(compact(best.loss / best.ratio), compact(best.loss)),
            f"{best.ratio:.3f} times, 95 % interval {low:.3f} to {high:.3f}",
        ),
    ]
    return f'<section class="cards">{"".join(cards)}</section>'


def _depths(verdict: Verdict, costs: Mapping[str, Cost]) -> str:
    head = ["depth", "blocks by", "peak learning<br>rate", "steps", "held-out loss", "to full", "95 %"]
    head += ["step, ms", "chunk, ms", "parameters", "advised in"]
    rows = []
    for place in verdict.places:
        one, cost = place.candidate, costs[place.candidate.depth]
        chunk = None if cost.sample_seconds is None else 1e3 * cost.sample_seconds
        numbers = [f"{one.peak_lr:g}", f"{place.trial.steps:,}", compact(place.loss), f"{place.ratio:.3f}"]
        numbers += [f"{place.interval[0]:.3f} to {place.interval[1]:.3f}", compact(1e3 * cost.step_seconds, 3)]
        numbers += [compact(chunk, 3), f"{cost.parameters:,}", f"{place.chosen:.0%}"]
        rows.append([html.escape(one.depth), html.escape(" ".join(one.criteria)), *numbers])
    return table(head, rows, marked=[place is verdict.best for place in verdict.places], name="readings")
