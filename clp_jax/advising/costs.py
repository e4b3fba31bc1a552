"""What a depth costs to train and to run, measured on this machine with the programs that the trials use."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from clp_jax.benchmarks.steps import alternating
from clp_jax.data import TrainingData
from clp_jax.models import Architecture, Gates, abstract_params, build, family_of, init_params
from clp_jax.sharding import batch_sharding, put
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
    """Measure models, whose calls take turns. Parameters are random: speed does not depend on them."""
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, (architecture, run) in models.items():
        calls[name, "step"] = _step(architecture, run, data, mesh)
        if family_of(architecture).why_no_actions(architecture) is None and architecture.action_dim is not None:
            calls[name, "sample"] = _sample(architecture, data)
    seconds = alternating(calls, _ROUNDS)
    return {
        name: Cost(
            seconds[name, "step"],
            seconds.get((name, "sample")),
            _state_bytes(architecture, run, mesh),
            _count(architecture),
        )
        for name, (architecture, run) in models.items()
    }


def _step(architecture: Architecture, run: Run, data: TrainingData, mesh: jax.sharding.Mesh) -> Callable[[], Any]:
    program = _program(architecture, run, mesh)
    state = program.start(_random(architecture))
    batch = put(
        next(data.batches(run.batch_size, seed=run.seed, workers=0, augmented=run.step.augment)), batch_sharding(mesh)
    )
    stop = put(np.zeros(jax.device_count(), np.int32), batch_sharding(mesh))

    def call() -> Any:
        nonlocal state
        state, info = program.step(state, batch, stop)
        return info

    return call


def _sample(architecture: Architecture, data: TrainingData) -> Callable[[], Any]:
    family, model, inputs = family_of(architecture), build(architecture), dict(data.calibration(1, seed=0).arrays)
    noise, params = inputs.pop("noise"), _random(architecture)
    inputs = {key: value for key, value in inputs.items() if key not in ("time", "episode_index")}

    @jax.jit
    def sample(params: Any, inputs: Any, noise: Any) -> Any:
        return family.sample(
            model, params, inputs, noise=noise, num_steps=family.num_steps(architecture), gates=Gates()
        )

    return lambda: sample(params, inputs, noise)


def _program(architecture: Architecture, run: Run, mesh: jax.sharding.Mesh) -> Any:
    return build_program(architecture, run.optimizer, run.step, run.frozen_dtype, run.seed, mesh, run.sharding_rules)


def _random(architecture: Architecture) -> Any:
    return jax.jit(functools.partial(init_params, architecture))(jax.random.key(0))


def _state_bytes(architecture: Architecture, run: Run, mesh: jax.sharding.Mesh) -> int:
    state = _program(architecture, run, mesh).abstract
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _count(architecture: Architecture) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(architecture)))
