"""Every step at full size: random weights analysed, pruned, sampled from and exported.

Each step has a process of its own, whose time and peak memory are reported. Exports are read back, but not run: that
takes what sampling takes. What is found in random weights means nothing.
"""

import dataclasses
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from clp_jax.benchmarks.checkpoint_io import in_own_process, peak_memory
from clp_jax.benchmarks.made_checkpoints import make_checkpoint
from clp_jax.benchmarks.small import random_observations
from clp_jax.data import load_npz
from clp_jax.flops import parameter_count
from clp_jax.loading import load_model
from clp_jax.models import Architecture, abstract_params
from clp_jax.models.pi0 import PI0
from clp_jax.processing import norm_stats
from clp_jax.sampling import sample
from clp_jax.trees import flatten

OBSERVATIONS, KEEP = 2, 9
TARGETS = ("openpi-pytorch", "lerobot")


@dataclasses.dataclass(frozen=True)
class Step:
    """One of the steps.

    Attributes:
      name: what it does.
      seconds: wall time, reading and compiling included.
      peak_bytes: peak resident memory of its process.
      output_bytes: size of the files it wrote.
    """

    name: str
    seconds: float
    peak_bytes: int
    output_bytes: int


def run(scratch: Path, console: Console, *, architecture: Architecture = PI0) -> list[Step]:
    """Take all steps in a folder that is deleted afterwards; at full size it takes 25 GB there and 19 GB of memory."""
    folder = scratch / "clp_full_size"
    full, analysis, pruned, data = (folder / name for name in ("full", "analysis", "pruned", "observations.npz"))
    folder.mkdir()
    steps = []

    def step(name: str, output: Path | None, function: Callable[..., Any], *args: Any) -> None:
        seconds, peak = in_own_process(_measured, function, *args)
        written = 0 if output is None else sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
        steps.append(Step(name, seconds, peak, written))
        console.print(f"{name}: {seconds:.0f} s, peak {peak / 1e9:.2f} GB, {written / 1e9:.2f} GB written")

    try:
        np.savez(data, **random_observations(architecture, OBSERVATIONS).arrays)
        step("write the checkpoint", full, _write, full, architecture)
        measure = f"--data {data} --holdout-ratio 0 --group-size {OBSERVATIONS} --keep-layers {KEEP} --compare clp"
        step("analyse", analysis, _clp, f"analyse --checkpoint {full} {measure} --out {analysis}")
        step("prune", pruned, _clp, f"prune --checkpoint {full} --plan {analysis}/plan.json --out {pruned}")
        step("load and sample", None, _sample, pruned, data)
        for target in TARGETS:
            out = folder / target
            words = f"export --checkpoint {pruned} --to {target} --check bits --out {out}"
            step(f"export to {target}", out, _clp, words)
            shutil.rmtree(out)
    finally:
        shutil.rmtree(folder)
    return steps


def show(steps: list[Step], console: Console, *, architecture: Architecture = PI0) -> None:
    """Print the steps, and the parameters before and after."""
    smaller = architecture.with_depths(dict.fromkeys(architecture.groups[0], KEEP))
    table = Table(
        title=f"{parameter_count(architecture):,} random bfloat16 parameters to {parameter_count(smaller):,}, "
        f"{OBSERVATIONS} observations, {jax.devices()[0].device_kind}"
    )
    for column in ("step", "wall", "peak memory", "written"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for step in steps:
        written = f"{step.output_bytes / 1e9:.2f} GB" if step.output_bytes else ""
        table.add_row(step.name, f"{step.seconds:.0f} s", f"{step.peak_bytes / 1e9:.2f} GB", written)
    console.print(table)


def _measured(function: Callable[..., Any], *args: Any) -> tuple[float, int]:
    started = time.perf_counter()
    function(*args)
    children = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return time.perf_counter() - started, max(peak_memory(), children)


def _write(folder: Path, architecture: Architecture) -> None:
    shapes = flatten(abstract_params(architecture))
    halves = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for path, leaf in shapes.items()}
    make_checkpoint(folder, halves, layout="orbax")
    vector = np.ones(architecture.action_dim or 32)
    stats = norm_stats.NormStats(mean=0 * vector, std=vector, q01=-vector, q99=vector)
    norm_stats.save(folder / "assets" / "random", {"state": stats, "actions": stats})


def _clp(words: str) -> None:
    subprocess.run([sys.executable, "-m", "clp_jax", *words.split()], check=True)


def _sample(checkpoint: Path, data: Path) -> None:
    model = load_model(checkpoint)
    assert np.isfinite(sample(model, load_npz(data, model.architecture).take([0]))).all()
