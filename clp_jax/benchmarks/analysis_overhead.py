"""What similarity statistics add to a plain forward pass: counted at full size, measured on a small model here."""

import functools
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from clp_jax.benchmarks.small import SMALL, random_observations
from clp_jax.data import arrange
from clp_jax.data.dataset import chosen_lengths
from clp_jax.models import (
    RELEASED,
    Architecture,
    Gates,
    abstract_params,
    build,
    family_of,
    init_params,
    towers_measured,
)
from clp_jax.operations import H100, TPU, Operations, count
from clp_jax.sharding import make_mesh
from clp_jax.similarity import CalibrationBatch, Sampling, batch_statistics, batches

_GROUP = 4


class Cost(NamedTuple):
    """Matrix products of one group of observations: of a pass that gives the states, and with similarity statistics."""

    forward: Operations
    analysis: Operations

    def overhead(self) -> dict[str, float]:
        """What the statistics add, as a share of the forward pass: of its operations, and of a matrix unit's time."""
        plain, fused = self
        shares = {"operations": fused.flops / plain.flops - 1}
        for unit in (TPU, H100):
            shares[unit.name] = unit.passes(fused.products) / unit.passes(plain.products) - 1
        return shares


def run(*, repeats: int = 7) -> dict[str, Any]:
    """Count at full size and time at small size, plain and with statistics alternating in one process."""
    costs = {name: cost(architecture) for name, architecture in (RELEASED | {"small π0": SMALL}).items()}
    return {
        "overhead": {name: cost.overhead() for name, cost in costs.items()},
        "products": {
            name: {f"{kind.dtype} {kind.precision}": flops for kind, flops in cost.analysis.products.items()}
            for name, cost in costs.items()
        },
        "measured_small": _measured(repeats),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def cost(architecture: Architecture, group: int = _GROUP) -> Cost:
    """Count one group of observations of the model's own lengths, in the programs that run it."""
    family, model = family_of(architecture), build(architecture)
    inputs = family.inputs(architecture, chosen_lengths(architecture, None, None))
    described = {key: jax.ShapeDtypeStruct((group, *leaf.shape), leaf.dtype) for key, leaf in inputs.items()}

    def plain(params: Any, inputs: Any) -> Any:
        states = family.forward(model, params, drawn(inputs), gates=Gates(), capture=True)[1]
        return {tower.name: states[tower.name] for tower in towers_measured(architecture)}

    def fused(params: Any, inputs: Any) -> Any:
        batch = CalibrationBatch(drawn(inputs), jnp.ones(group, bool))
        return batch_statistics(architecture, None, Sampling(), group, params, batch)

    def drawn(inputs: Any) -> Any:
        return family.draw(architecture, jax.random.key(0), inputs)[0]

    params = abstract_params(architecture)
    return Cost(*(count(function, params, described, weights=[0]) for function in (plain, fused)))


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
    table = Table(
        title="Similarity statistics, added to a forward pass that gives the states",
        caption="Counted in the traced programs. Of matrix units: float32 at the passes that it takes on a TPU, and at "
        "the public rates of an H100.",
    )
    for column in ("", "operations", "TPU", "H100"):
        table.add_column(column, justify="right" if column else "left")
    for name, shares in result["overhead"].items():
        table.add_row(name, *(f"{share:.1%}" for share in shares.values()))
    console.print(table)
    measured, device = result["measured_small"], result["device"]
    console.print(
        f"Small π0, measured on {device}: {measured['overhead']:.1%} (median), "
        f"{measured['overhead_of_minima']:.1%} (minima)"
    )
