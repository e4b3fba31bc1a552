"""What similarity statistics add to a plain forward pass: counted at full size, measured on a small model here."""

import functools
import statistics
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from clp_jax.benchmarks.small import LENGTHS, SMALL, random_observations
from clp_jax.data import arrange
from clp_jax.flops import analysis_flops, forward_flops
from clp_jax.models import Architecture, Gates, Lengths, build, family_of, init_params
from clp_jax.models.pi0 import PI0, PI0_FAST, PI05
from clp_jax.sharding import make_mesh
from clp_jax.similarity import Sampling, batch_statistics, batches

_GROUP = 4


def run(*, repeats: int = 7) -> dict[str, Any]:
    """Count at full size and time at small size, plain and with statistics alternating in one process."""
    counted = {}
    for architecture, prompt in ((PI0, 48), (PI05, 200), (PI0_FAST, 250)):
        counted[architecture.kind] = _share(architecture, Lengths(LENGTHS.horizon, prompt))
    small = _share(SMALL, LENGTHS)
    return {
        "counted_full_size": counted,
        "counted_small": small,
        "measured_small": _measured(repeats),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _share(architecture: Architecture, lengths: Lengths) -> float:
    added = analysis_flops(architecture, lengths, cameras=3, group_size=_GROUP, max_samples=2048)
    return added / forward_flops(architecture, lengths, cameras=3)


def _measured(repeats: int) -> dict[str, float]:
    family, model, mesh = family_of(SMALL), build(SMALL), make_mesh()
    params = init_params(SMALL, jax.random.key(0))
    data = random_observations(SMALL, _GROUP * jax.device_count())
    (batch,) = batches(data, arrange(np.zeros(len(data), int), _GROUP), jax.device_count(), mesh)
    plain = jax.jit(lambda params, batch: family.forward(model, params, batch.inputs, gates=Gates())[0])
    fused = jax.jit(functools.partial(batch_statistics, SMALL, None, Sampling(), _GROUP))
    times: dict[str, list[float]] = {"plain": [], "fused": []}
    for repeat in range(repeats + 1):
        for name, step in (("plain", plain), ("fused", fused)):
            start = time.perf_counter()
            jax.block_until_ready(step(params, batch))
            if repeat:  # the first compiles
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "plain_seconds": medians["plain"],
        "fused_seconds": medians["fused"],
        "overhead": medians["fused"] / medians["plain"] - 1,
        "overhead_of_minima": min(times["fused"]) / min(times["plain"]) - 1,
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print what `run` found."""
    table = Table(title="Similarity statistics, added to a forward pass")
    table.add_column("")
    table.add_column("overhead", justify="right")
    for kind, share in result["counted_full_size"].items():
        table.add_row(f"{kind}, full size, counted FLOPs", f"{share:.1%}")
    table.add_row("small π0, counted FLOPs", f"{result['counted_small']:.1%}")
    measured = result["measured_small"]
    table.add_row(f"small π0, measured on {result['device']} (median)", f"{measured['overhead']:.1%}")
    table.add_row("small π0, measured (minima)", f"{measured['overhead_of_minima']:.1%}")
    console.print(table)
