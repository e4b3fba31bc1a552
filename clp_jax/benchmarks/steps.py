"""A training step ready to be timed, and timing of several calls that a busy machine disturbs alike."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from clp_jax.data import CalibrationData
from clp_jax.models import Architecture, init_params
from clp_jax.sharding import batch_sharding, make_mesh, put
from clp_jax.training import OptimizerSettings, StepSettings
from clp_jax.training.program import build_program


def training_step(
    architecture: Architecture, data: CalibrationData, settings: StepSettings
) -> tuple[Callable[[], Any], int]:
    """A call that does one more step on the same batch, and the bytes of its state and temporaries on one device."""
    mesh = make_mesh()
    program = build_program(architecture, OptimizerSettings(), settings, None, 0, mesh)
    state = program.start(jax.jit(functools.partial(init_params, architecture))(jax.random.key(0)))
    inputs = {key: value for key, value in data.arrays.items() if key not in ("noise", "time")}
    batch = put(inputs, batch_sharding(mesh))
    stop = put(np.zeros(jax.device_count(), np.int32), batch_sharding(mesh))
    step = program.step.lower(state, batch, stop).compile()
    plan = step.memory_analysis()
    used = 0 if plan is None else plan.argument_size_in_bytes + plan.temp_size_in_bytes

    def call() -> Any:
        nonlocal state
        state, info = step(state, batch, stop)
        return info

    return call, used


def alternating(calls: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """Median seconds of each call; they take turns, and the first turn, which compiles, does not count."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for repeat in range(repeats + 1):
        for key, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if repeat:
                times[key].append(time.perf_counter() - start)
    return {key: statistics.median(values) for key, values in times.items()}
