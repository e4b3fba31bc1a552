"""What a depth costs to train and to run, measured on this machine with the programs that the trials use."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.benchmarks.steps import alternating
from clp_jax.data import TrainingData, arrange
from clp_jax.models import Architecture, Gates, abstract_params, family_of
from clp_jax.progress import track_stage
from clp_jax.sampling import sampling_step
from clp_jax.sharding import batch_sharding, parameter_shardings, put
from clp_jax.similarity import batches
from clp_jax.training import Run
from clp_jax.training.program import build_program

_TURNS, _CALLS = 3, 3


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one depth.

    Attributes:
      step_seconds: a training step.
      sample_seconds: an action chunk for one observation per device; None for a model that draws no noise.
      state_bytes: parameters, optimiser and average, over all devices.
      parameters: how many.
    """

    step_seconds: float
    sample_seconds: float | None
    state_bytes: int
    parameters: int


def measure_costs(
    models: Mapping[str, tuple[Architecture, Run]], data: TrainingData, mesh: jax.sharding.Mesh
) -> dict[str, Cost]:
    """Measure models, the least of several turns each.

    They take turns, so that a busy machine disturbs all alike, and each leaves memory to the next, for several at a
    time would not fit where one does. Parameters are zeros: speed does not depend on them.
    """
    steps, samples = (dict.fromkeys(models, math.inf) for _ in range(2))
    for name, (architecture, run) in track_stage([*models.items()] * _TURNS, "measuring costs", unit="models"):
        steps[name] = min(steps[name], _step_seconds(architecture, run, data, mesh))
        samples[name] = min(samples[name], _sample_seconds(architecture, data, mesh))
    return {
        name: Cost(
            step_seconds=steps[name],
            sample_seconds=samples[name] if math.isfinite(samples[name]) else None,
            state_bytes=sum(
                leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_program(*model, mesh).abstract)
            ),
            parameters=sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model[0]))),
        )
        for name, model in models.items()
    }


def _step_seconds(architecture: Architecture, run: Run, data: TrainingData, mesh: jax.sharding.Mesh) -> float:
    program = _program(architecture, run, mesh)
    state = program.start(_zeros(architecture, mesh))
    rows = next(data.batches(run.batch_size, seed=run.seed, workers=0, augmented=run.step.augment))
    batch = put(rows, batch_sharding(mesh))
    stop = put(np.zeros(jax.device_count(), np.int32), batch_sharding(mesh))

    def call() -> Any:
        nonlocal state
        state, info = program.step(state, batch, stop)
        return info

    return alternating({"step": call}, _CALLS)["step"]


def _sample_seconds(architecture: Architecture, data: TrainingData, mesh: jax.sharding.Mesh) -> float:
    """Of one chunk per device, once; infinity for a model that draws no noise."""
    if architecture.action_dim is None:
        return math.inf
    (batch,) = batches(data.calibration(1), arrange(np.zeros(1, int), 1), jax.device_count(), mesh)
    step = sampling_step(architecture, batch.present.sharding, family_of(architecture).num_steps(architecture))
    params = _zeros(architecture, mesh)
    return alternating({"sample": lambda: step(params, batch, Gates())}, _CALLS)["sample"]


def _program(architecture: Architecture, run: Run, mesh: jax.sharding.Mesh) -> Any:
    return build_program(architecture, run.optimizer, run.step, run.frozen_dtype, run.seed, mesh, run.sharding_rules)


def _zeros(architecture: Architecture, mesh: jax.sharding.Mesh) -> Any:
    """Parameters, split over the devices as those of a run."""
    shapes = abstract_params(architecture)
    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.jit(zeros, out_shardings=parameter_shardings(shapes, mesh))()
