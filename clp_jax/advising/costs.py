"""What a depth costs to train and to run, measured on this machine with the programs that the trials use."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.benchmarks.steps import alternating
from clp_jax.data import TrainingData
from clp_jax.models import Architecture, Gates, abstract_params, build, family_of
from clp_jax.sharding import batch_sharding, parameter_shardings, put
from clp_jax.training import Run
from clp_jax.training.program import build_program

_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one depth.

    Attributes:
      step_seconds: a training step.
      sample_seconds: an action chunk for one observation; None for a model that draws no noise.
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
    """Measure models one after another, for several at a time would not fit where one does.

    Parameters are zeros: speed does not depend on them.
    """
    return {name: _cost(architecture, run, data, mesh) for name, (architecture, run) in models.items()}


def _cost(architecture: Architecture, run: Run, data: TrainingData, mesh: jax.sharding.Mesh) -> Cost:
    state, draws_noise = _program(architecture, run, mesh).abstract, architecture.action_dim is not None
    return Cost(
        step_seconds=_seconds(_step(architecture, run, data, mesh)),
        sample_seconds=_seconds(_sample(architecture, data, mesh)) if draws_noise else None,
        state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(abstract_params(architecture))),
    )


def _seconds(call: Callable[[], Any]) -> float:
    return alternating({"": call}, _ROUNDS)[""]


def _step(architecture: Architecture, run: Run, data: TrainingData, mesh: jax.sharding.Mesh) -> Callable[[], Any]:
    program = _program(architecture, run, mesh)
    state = program.start(_zeros(architecture, mesh))
    batch = put(
        next(data.batches(run.batch_size, seed=run.seed, workers=0, augmented=run.step.augment)), batch_sharding(mesh)
    )
    stop = put(np.zeros(jax.device_count(), np.int32), batch_sharding(mesh))

    def call() -> Any:
        nonlocal state
        state, info = program.step(state, batch, stop)
        return info

    return call


def _sample(architecture: Architecture, data: TrainingData, mesh: jax.sharding.Mesh) -> Callable[[], Any]:
    family, model, inputs = family_of(architecture), build(architecture), dict(data.calibration(1, seed=0).arrays)
    noise, params = inputs.pop("noise"), _zeros(architecture, mesh)
    inputs = {key: value for key, value in inputs.items() if key not in ("time", "episode_index")}

    @jax.jit
    def sample(params: Any, inputs: Any, noise: Any) -> Any:
        return family.sample(
            model, params, inputs, noise=noise, num_steps=family.num_steps(architecture), gates=Gates()
        )

    return lambda: sample(params, inputs, noise)


def _program(architecture: Architecture, run: Run, mesh: jax.sharding.Mesh) -> Any:
    return build_program(architecture, run.optimizer, run.step, run.frozen_dtype, run.seed, mesh, run.sharding_rules)


def _zeros(architecture: Architecture, mesh: jax.sharding.Mesh) -> Any:
    """Parameters, split over the devices as those of a run."""
    shapes = abstract_params(architecture)
    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.jit(zeros, out_shardings=parameter_shardings(shapes, mesh))()
