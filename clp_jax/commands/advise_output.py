"""What ``clp advise`` writes and says at the end: plan, picture, numbers, a table, and what to do next."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clp_jax.advising import Verdict
from clp_jax.advising.candidates import FULL
from clp_jax.advising.costs import Cost
from clp_jax.advising.picture import draw
from clp_jax.editable_json import write_json


def save(folder: Path, verdict: Verdict, costs: Mapping[str, Cost], checkpoint: str, tolerance: float) -> None:
    """Write ``plan.json``, ``advice.png`` and at last ``advice.json``: whoever finds that finds all."""
    verdict.best.candidate.plan.save(folder / "plan.json")
    shown = [costs[place.candidate.depth] for place in verdict.places]
    axes = {
        "training step, ms": [1e3 * cost.step_seconds for cost in shown],
        "sampling a chunk, ms": [1e3 * cost.sample_seconds for cost in shown if cost.sample_seconds is not None],
        "parameters and optimiser, GB": [cost.state_bytes / 1e9 for cost in shown],
    }
    drawn = {label: values for label, values in axes.items() if values}
    draw(verdict, drawn, f"Depth against loss, {checkpoint}", folder / "advice.png")
    depths = [place.to_json() | dataclasses.asdict(costs[place.candidate.depth]) for place in verdict.places]
    write_json(folder / "advice.json", {"advised": verdict.best.to_json(), "tolerance": tolerance, "depths": depths})


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
        f"Advised: [bold]{escape(best.candidate.depth)}[/], the fastest within {tolerance:.0%} of the whole model's "
        f"loss; so in {best.chosen:.0%} of the resamples of held-out episodes.",
        soft_wrap=True,
    )
    source, rate = escape(checkpoint), f"--peak-lr {best.candidate.peak_lr:g}"
    console.print(f"Saved: {escape(out)}/advice.json, advice.png and plan.json. Next:", soft_wrap=True)
    if best.candidate.depth == FULL:
        console.print(f"  clp finetune --checkpoint {source} {rate} ...", soft_wrap=True, highlight=False)
        return
    prune = f"  clp prune --checkpoint {source} --plan {escape(out)}/plan.json --out PRUNED"
    console.print(prune, f"  clp finetune --checkpoint PRUNED {rate} ...", sep="\n", soft_wrap=True, highlight=False)


def _share(seconds: float | None, of: float | None) -> str:
    return "" if seconds is None or of is None else f"{seconds / of:.2f}"
