"""What is compiled for a run: the start of its state, and its step, with their shardings."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clp_jax.aliases import Array, Leaf, Tree
from clp_jax.models import Architecture, abstract_params
from clp_jax.sharding import Rules, batch_sharding, parameter_shardings, replicated
from clp_jax.training.optimizer import OptimizerSettings, make_optimizer
from clp_jax.training.state import TrainState, make_state, training_dtypes
from clp_jax.training.step import StepSettings, train_step
from clp_jax.training.teaching import Teaching


class Program(NamedTuple):
    """What is compiled for a run.

    Attributes:
      abstract: the state as ``jax.ShapeDtypeStruct`` with shardings.
      start: jitted, makes the state from parameters, which are donated.
      step: jitted, (state, batch, stop request per device) to (state, info); the state is donated. Where a model
        teaches, its parameters are a fourth argument.
      teacher: its parameters as ``jax.ShapeDtypeStruct`` with shardings, in the dtype of activations; None without.
    """

    abstract: TrainState
    start: Any
    step: Any
    teacher: Leaf = None


@functools.lru_cache(maxsize=16)
def build_program(
    architecture: Architecture,
    optimizer: OptimizerSettings,
    settings: StepSettings,
    frozen_dtype: str | None,
    seed: int,
    mesh: jax.sharding.Mesh,
    rules: Rules = (),
) -> Program:
    """The start and the step of a run with their shardings; nothing is compiled before it is called or lowered."""
    tx = make_optimizer(optimizer)
    make = functools.partial(make_state, tx=tx, frozen=settings.frozen, ema=settings.ema_decay is not None)
    dtypes = training_dtypes(abstract_params(architecture), settings.frozen, frozen_dtype=frozen_dtype)
    shapes = jax.eval_shape(make, dtypes)
    teacher = None if settings.teaching is None else _teacher_shapes(settings.teaching)
    shardings, of_teacher = parameter_shardings((shapes, teacher), mesh, rules)
    rows = batch_sharding(mesh)

    def step(
        state: TrainState, batch: Mapping[str, Array], stop: Array, teacher: Tree | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        rng, _ = jax.random.split(jax.random.key(seed))  # as openpi's main function has it
        state, info = train_step(architecture, tx, settings, rng, state, batch, teacher=teacher, rows=rows)
        return state, info | {"stop": jnp.max(stop)}

    def placed(shapes: Leaf, shardings: Leaf) -> Leaf:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    return Program(
        placed(shapes, shardings),
        jax.jit(make, out_shardings=shardings, donate_argnums=0),
        jax.jit(
            step,
            in_shardings=(shardings, rows, rows, *(() if teacher is None else (of_teacher,))),
            out_shardings=(shardings, replicated(mesh)),
            donate_argnums=0,
        ),
        placed(teacher, of_teacher),
    )


def _teacher_shapes(teaching: Teaching) -> dict:
    """Its parameters in the dtype in which it computes: nothing is ever added to them."""
    dtype, params = jnp.dtype(teaching.architecture.dtype), abstract_params(teaching.architecture)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
