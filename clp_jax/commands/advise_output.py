"""What ``clp advise`` writes and says at the end: plan, picture, numbers, a table, and what to do next."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clp_jax.advising import Verdict
from clp_jax.advising.candidates import FULL
from clp_jax.advising.costs import Cost
from clp_jax.advising.page import write_page
from clp_jax.editable_json import write_json
from clp_jax.history import REPORT


def save(
    folder: Path, verdict: Verdict, costs: Mapping[str, Cost], checkpoint: str, tolerance: float
) -> dict[str, Any]:
    """Write ``plan.json``, the page and at last ``advice.json``, whose content is returned."""
    verdict.best.candidate.plan.save(folder / "plan.json")
    write_page(folder, verdict, costs, checkpoint, tolerance)
    depths = [place.to_json() | dataclasses.asdict(costs[place.candidate.depth]) for place in verdict.places]
    advice = {"advised": verdict.best.to_json(), "tolerance": tolerance, "depths": depths}
    write_json(folder / "advice.json", advice)
    return advice


def show(
    console: Console, verdict: Verdict, costs: Mapping[str, Cost], checkpoint: str, out: str, tolerance: float
) -> None:
    """Print the depths beside each other, and the commands that follow."""
    narrow = {"box": box.SIMPLE_HEAD, "collapse_padding": True, "pad_edge": False}
    table = Table(title="Held-out loss after equal training time", **narrow)
    for column in ("depth", "blocks by", "peak lr", "loss", "to full", "95 %", "step", "chunk", "advised"):
        words = column in ("depth", "blocks by")
        table.add_column(column, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    full = costs[FULL]
    for place in verdict.places:
        one, cost = place.candidate, costs[place.candidate.depth]
        table.add_row(
            escape(one.depth),
            escape(" ".join(one.criteria)),
            f"{one.peak_lr:g}",
            f"{place.loss:.4f}",
            f"{place.ratio:.3f}",
            "" if one.depth == FULL else f"{place.interval[0]:.2f}-{place.interval[1]:.2f}",
            f"{cost.step_seconds / full.step_seconds:.2f}",
            _share(cost.sample_seconds, full.sample_seconds),
            f"{place.chosen:.0%}",
        )
    console.print(table)
    best = verdict.best
    console.print(
        f"Advised: [bold]{escape(best.candidate.depth)}[/], the fastest within {100 * tolerance:g}% of the whole "
        f"model's loss; so in {best.chosen:.0%} of the resamples of held-out episodes.",
        soft_wrap=True,
    )
    source, rate = escape(checkpoint), f"--peak-lr {best.candidate.peak_lr:g}"
    console.print(
        f"Report: [bold]{escape(out)}/{REPORT}[/]; advice.json and plan.json lie beside it. Next:", soft_wrap=True
    )
    if best.candidate.depth == FULL:
        console.print(f"  clp finetune --checkpoint {source} {rate} ...", soft_wrap=True, highlight=False)
        return
    prune = f"  clp prune --checkpoint {source} --plan {escape(out)}/plan.json --out PRUNED"
    console.print(prune, f"  clp finetune --checkpoint PRUNED {rate} ...", sep="\n", soft_wrap=True, highlight=False)


def _share(seconds: float | None, of: float | None) -> str:
    return "" if seconds is None or of is None else f"{seconds / of:.2f}"
