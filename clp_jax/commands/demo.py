"""``clp demo``: the whole road on the small example model, in about a minute."""

import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from clp_jax.commands import analyse as analyse_command
from clp_jax.commands import prune as prune_command
from clp_jax.data import load_npz
from clp_jax.loading import LoadedModel, load_model
from clp_jax.models import Gates, Pi0, build
from clp_jax.models.pi0 import sample_actions
from clp_jax.plan import PrunePlan
from clp_jax.selection import CRITERIA
from clp_jax.sensitivity import plan_gates

EXAMPLE = Path(__file__).resolve().parent.parent / "example"
_REPEATS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Analyse, prune and compare the embedded example."""

    out: str = "clp-demo"
    """Folder for the analysis and the pruned checkpoint; replaced if it exists."""
    keep_layers: int = 9
    """Blocks of 18 that stay."""


def run(config: Demo) -> None:
    """Run the command."""
    console = Console()
    truth = json.loads((EXAMPLE / "truth.json").read_text())
    console.rule("clp demo: a small π0 with planted twins, briefly trained on a made-up task")
    out = Path(config.out)
    checkpoint, data = str(EXAMPLE / "checkpoint"), str(EXAMPLE / "calibration.npz")
    analysis, pruned = str(out / "analysis"), str(out / f"pruned-{config.keep_layers}")

    console.print(
        f"\n[bold]$ clp analyse --checkpoint EXAMPLE --data EXAMPLE.npz --keep-layers {config.keep_layers} "
        f"--out {analysis}[/]"
    )
    analyse_command.run(
        analyse_command.Analyse(
            checkpoint=checkpoint,
            data=data,
            out=analysis,
            keep_layers=config.keep_layers,
            compare=tuple(name for name in CRITERIA if name != "greedy"),
            overwrite=True,
        )
    )
    console.print(f"\n[bold]$ clp prune --checkpoint EXAMPLE --analysis {analysis} --out {pruned}[/]")
    prune_command.run(prune_command.Prune(checkpoint=checkpoint, analysis=analysis, out=pruned, overwrite=True))

    plan = PrunePlan.load(Path(analysis) / "plan.json")
    planted, removed = set(truth["planted_twins"]), set(plan.removed("vlm"))
    console.print(
        f"\nThe example hides {len(planted)} twins at {sorted(planted)}; CLP removed {len(removed)} blocks, "
        f"{len(planted & removed)} of them planted twins."
    )
    compare(console, load_model(checkpoint), load_model(pruned), plan, data)


def compare(console: Console, full: LoadedModel, pruned: LoadedModel, plan: PrunePlan, data: str) -> None:
    """Check the pruned checkpoint against the full model with gates, and time both."""
    observations = load_npz(data, full.architecture).take(np.arange(4))
    observation, noise = observations.observation(), observations.arrays["noise"]

    def sampler(model: LoadedModel, gates: Gates):
        module = build(model.architecture)
        assert isinstance(module, Pi0)
        sample = jax.jit(
            lambda params, observation, noise: sample_actions(module, params, observation, noise=noise, gates=gates)
        )
        return lambda: jax.block_until_ready(sample(model.params, observation, noise))

    run_full, run_pruned = sampler(full, Gates()), sampler(pruned, Gates())
    gated = sampler(full, plan_gates(full.architecture, plan))()
    difference = float(np.abs(np.asarray(gated) - np.asarray(run_pruned())).max())
    console.print(
        "Pruned checkpoint, loaded again, against the full model with those blocks switched off: "
        f"actions differ by {difference:.1e} at most"
    )
    run_full()
    times: dict[str, list[float]] = {"full": [], "pruned": []}
    for _ in range(_REPEATS):
        for name, sample in (("full", run_full), ("pruned", run_pruned)):
            start = time.perf_counter()
            sample()
            times[name].append(time.perf_counter() - start)
    full_ms, pruned_ms = (1e3 * statistics.median(times[name]) for name in ("full", "pruned"))
    console.print(
        f"Sampling 4 action chunks, median of {_REPEATS} on {jax.devices()[0].device_kind}: "
        f"{full_ms:.0f} ms -> {pruned_ms:.0f} ms ({pruned_ms / full_ms:.0%})"
    )
