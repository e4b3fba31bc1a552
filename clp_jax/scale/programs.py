"""What ``analyse``, ``prune --heal``, ``finetune`` and ``serve`` run, traced on shapes instead of arrays."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from clp_jax.aliases import Leaf, Tree
from clp_jax.data.dataset import chosen_lengths
from clp_jax.errors import InputError
from clp_jax.healing import DRAWS, sums_step
from clp_jax.least_squares import solve, solved_on_host
from clp_jax.models import Architecture, Lengths, abstract_params, family_of
from clp_jax.sensitivity import gate_step
from clp_jax.serving.policy import abstract_rows, check_sizes, trace_sampling
from clp_jax.sharding import batch_sharding, parameter_shardings
from clp_jax.similarity import CalibrationBatch, Sampling, statistics_step
from clp_jax.training import OptimizerSettings, Run, StepSettings, check_batch_size
from clp_jax.training.adapters import with_adapters
from clp_jax.training.freezing import frozen_paths
from clp_jax.training.program import build_program
from clp_jax.training.teaching import Teaching, check_teacher
from clp_jax.trees import flatten

Task = Literal["analyse", "heal", "finetune", "lora", "infer"]

_STEPS = 30_000
"""Of the run whose step is planned: openpi's number; learning rates alone depend on it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is asked of a model.

    Attributes:
      task: the command; lora is finetune with new adapters.
      batch_size: observations of a step; analyse rounds it up to whole groups on every device.
      accumulate: parts of a training batch.
      ema_decay: of the average that is trained along; None without, "upstream" as the model's authors have it.
      augment: images in training.
      teacher: the architecture of a model that teaches in training; None without.
      cut_from: architecture and parameters of the full model in heal; None without.
      group_size: observations of a group in analyse.
      num_steps: integration steps of infer; the model's own number if None.
      action_horizon: actions of a chunk; the model's own if None.
      prompt_length: tokens of a prompt; the model's own if None.
    """

    task: Task
    batch_size: int = 32
    accumulate: int = 1
    ema_decay: float | Literal["upstream"] | None = "upstream"
    augment: bool = True
    teacher: Architecture | None = None
    cut_from: tuple[Architecture, Tree] | None = None
    group_size: int = 4
    num_steps: int | None = None
    action_horizon: int | None = None
    prompt_length: int | None = None

    def lengths(self, architecture: Architecture) -> Lengths:
        """Actions of a chunk and tokens of a prompt."""
        return chosen_lengths(architecture, self.action_horizon, self.prompt_length)

    def steps(self, architecture: Architecture) -> int:
        """Integration steps of infer."""
        return family_of(architecture).num_steps(architecture) if self.num_steps is None else self.num_steps


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a task.

    Attributes:
      name: for people.
      traced: ``jax.jit(f).trace(...)``.
      held: bytes of the arguments on one device, by what they are.
      is_weight: which of the flat inputs are parameters.
      observations: of one call.
      split: over how many devices the work is split.
    """

    name: str
    traced: Any
    held: Mapping[str, int]
    is_weight: list[bool]
    observations: int
    split: int


def programs(
    workload: Workload, architecture: Architecture, params: Tree, mesh: jax.sharding.Mesh
) -> list[Callable[[], Program]]:
    """The programs of a task, each traced when it is called.

    Args:
      workload: the task and its sizes.
      architecture: of the model, without new adapters.
      params: shapes and dtypes of the parameters as they are stored; training keeps float32 whatever these are.
      mesh: devices to compile for.

    Raises:
      InputError: the batch does not divide over the devices, the task is not for this kind of model, or the teacher is
        not for the model.
    """
    if workload.task == "analyse":
        return [
            lambda: _similarity(workload, architecture, params, mesh),
            lambda: _gates(workload, architecture, params, mesh),
        ]
    if workload.task == "heal":
        full = None if workload.cut_from is None else workload.cut_from[0]
        if full is None or full.kind != architecture.kind or not _cut_groups(full, architecture):
            raise InputError("--task heal is of a cut beside the full model: give --keep-layers, or --against.")
        models = workload.cut_from, (architecture, params)
        widest = functools.cache(lambda: _widest(workload, *models, mesh))  # traces every branch of the cut towers
        on_host = solved_on_host(mesh.devices.flat[0].platform)
        return [lambda: _sums(widest(), *models, mesh), *([] if on_host else [lambda: _fit(widest())])]
    if workload.task == "infer":
        if (reason := family_of(architecture).why_no_actions(architecture)) is not None:
            raise InputError(reason)
        check_sizes(batch_size=workload.batch_size, num_steps=workload.steps(architecture))
        return [lambda: _sampling(workload, architecture, params, mesh)]
    if workload.task == "lora":
        architecture = with_adapters(architecture)
    run = _run(workload, architecture)
    if run.step.teaching is not None:
        check_teacher(architecture, run.step.teaching, workload.lengths(architecture))
    check_batch_size(run, mesh)
    return [lambda: _training_step(workload, architecture, run, mesh)]


def _run(workload: Workload, architecture: Architecture) -> Run:
    """What ``finetune`` does without further flags."""
    family = family_of(architecture)
    defaults = family.training_defaults(architecture, _STEPS)
    leaves = flatten(abstract_params(architecture))
    return Run(
        steps=_STEPS,
        batch_size=workload.batch_size,
        optimizer=OptimizerSettings.among(defaults),
        step=StepSettings(
            ema_decay=defaults["ema_decay"] if workload.ema_decay == "upstream" else workload.ema_decay,
            accumulate=workload.accumulate,
            augment=workload.augment,
            frozen=frozen_paths(tuple(leaves), default=family.frozen_rules(architecture)),
            frozen_rows=tuple(sorted(family.frozen_rows(architecture, leaves).items())),
            teaching=None if workload.teacher is None else Teaching(architecture=workload.teacher),
        ),
        frozen_dtype=None if defaults["frozen_dtype"] == "keep" else defaults["frozen_dtype"],
    )


def _training_step(workload: Workload, architecture: Architecture, run: Run, mesh: jax.sharding.Mesh) -> Program:
    program = build_program(architecture, run.optimizer, run.step, run.frozen_dtype, run.seed, mesh)
    rows, state = batch_sharding(mesh), program.abstract
    batch = _placed(_observations(workload, architecture, workload.batch_size), rows)
    stop = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=rows)
    teacher = () if program.teacher is None else (program.teacher,)
    others = jax.tree.map(lambda _: False, (state, batch, stop))
    weights = dataclasses.replace(others[0], params=jax.tree.map(lambda _: True, state.params))
    return Program(
        "training step",
        program.step.trace(state, batch, stop, *teacher),
        {
            "parameters": _on_one(state.params),
            "optimiser": _on_one(state.opt_state),
            "average": _on_one(state.ema_params),
            "teacher": _on_one(teacher),
            "inputs": _on_one((state.step, batch, stop)),
        },
        jax.tree.leaves((weights, *others[1:], jax.tree.map(lambda _: True, teacher))),
        workload.batch_size,
        mesh.size,
    )


def _similarity(workload: Workload, architecture: Architecture, params: Tree, mesh: jax.sharding.Mesh) -> Program:
    step = statistics_step(architecture, Sampling(), workload.group_size, mesh)
    return _analysis_program("similarity", step, workload, architecture, params, mesh)


def _gates(workload: Workload, architecture: Architecture, params: Tree, mesh: jax.sharding.Mesh) -> Program:
    step = gate_step(architecture, architecture.groups[0], batch_sharding(mesh), curvature=False)
    return _analysis_program("gate derivatives", step, workload, architecture, params, mesh)


def _analysis_program(
    name: str, step: Any, workload: Workload, architecture: Architecture, params: Tree, mesh: jax.sharding.Mesh
) -> Program:
    groups = math.ceil(workload.batch_size / (workload.group_size * mesh.size)) * mesh.size
    count = groups * workload.group_size
    inputs = _observations(workload, architecture, count)
    if architecture.action_dim is not None:
        inputs["noise"] = inputs["actions"]
        inputs["time"] = jax.ShapeDtypeStruct((count,), jnp.float32)
    batch = _placed(CalibrationBatch(inputs, jax.ShapeDtypeStruct((count,), jnp.bool_)), batch_sharding(mesh))
    return _inference_program(name, step.trace(_sharded(params, mesh), batch), params, batch, mesh, count, mesh.size)


_Model = tuple[Architecture, Tree]


class _Healing(NamedTuple):
    """The widest fit of a cut: that of the branch with the most channels.

    Attributes:
      step: adds a batch to the sums.
      batch: of observations, with their draws.
      sums: per tower.
    """

    step: Any
    batch: Any
    sums: Mapping[str, Any]


def _cut_groups(full: Architecture, smaller: Architecture) -> list[tuple[str, ...]]:
    """Towers that are cut, those that keep the same blocks as one group."""
    return [group for group in full.groups if full.depths[group[0]] != smaller.depths[group[0]]]


def _widest(workload: Workload, whole: _Model, cut: _Model, mesh: jax.sharding.Mesh) -> _Healing:
    (full, full_params), (smaller, params) = whole, cut
    count = math.ceil(workload.batch_size / mesh.size) * mesh.size
    inputs = _observations(workload, full, count)
    if full.action_dim is not None:
        draws = count, DRAWS
        inputs["noise"] = jax.ShapeDtypeStruct((*draws, *inputs["actions"].shape[1:]), jnp.float32)
        inputs["time"] = jax.ShapeDtypeStruct(draws, jnp.float32)
    batch = _placed(CalibrationBatch(inputs, jax.ShapeDtypeStruct((count,), jnp.bool_)), batch_sharding(mesh))
    found = []
    for group in _cut_groups(full, smaller):
        for branch in dict.fromkeys(write.branch for write in family_of(full).WRITES if write.tower in group):
            step, nothing = sums_step(full, smaller, group, branch, mesh)
            sums = jax.eval_shape(nothing, full_params, params, batch, *_PLACES)
            found.append(_Healing(step, batch, _sharded(sums, mesh)))
    return max(found, key=lambda one: max(sums.gram.size for sums in one.sums.values()))


def _sums(work: _Healing, whole: _Model, cut: _Model, mesh: jax.sharding.Mesh) -> Program:
    models = tuple(_sharded(params, mesh) for _, params in (whole, cut))
    others = jax.tree.map(lambda _: False, (work.batch, *_PLACES))
    weights = (jax.tree.map(lambda _: False, work.sums), *jax.tree.map(lambda _: True, models), *others)
    held = {"parameters": _on_one(models), "sums": _on_one(work.sums), "inputs": _on_one(work.batch)}
    traced = work.step.trace(work.sums, *models, work.batch, *_PLACES)
    return Program("sums", traced, held, jax.tree.leaves(weights), work.batch.present.shape[0], mesh.size)


def _fit(work: _Healing) -> Program:
    """Its own memory: both models stay on the chips beside it. The factorisation's operations are not counted."""
    widest = max(work.sums.values(), key=lambda sums: sums.gram.size)
    traced = solve.trace(widest, widest, jax.ShapeDtypeStruct((), jnp.float32))
    held = {"sums": 2 * _on_one(widest)}
    flat = jax.tree.leaves((widest, widest, 0.0))
    return Program("fit", traced, held, [False] * len(flat), 0, 1)


_PLACES = (jax.ShapeDtypeStruct((), jnp.int32),) * 2
"""The block and the state of a fit."""


def _sampling(workload: Workload, architecture: Architecture, params: Tree, mesh: jax.sharding.Mesh) -> Program:
    batch = abstract_rows(architecture, workload.batch_size, workload.lengths(architecture))
    traced = trace_sampling(architecture, params, batch, mesh, num_steps=workload.steps(architecture))
    # A batch that the devices do not divide is computed on all of them, or split as the parameters are.
    even = workload.batch_size % mesh.size == 0
    split = mesh.size if even else mesh.shape["fsdp"]
    return _inference_program("sampling", traced, params, batch, mesh, workload.batch_size, split)


def _inference_program(
    name: str, traced: Any, params: Tree, batch: Leaf, mesh: jax.sharding.Mesh, observations: int, split: int
) -> Program:
    weights = jax.tree.map(lambda _: True, params), jax.tree.map(lambda _: False, batch)
    rows = batch_sharding(mesh) if observations % mesh.size == 0 else jax.sharding.NamedSharding(mesh, _WHOLE)
    held = {"parameters": _on_one(_sharded(params, mesh)), "inputs": _on_one(_placed(batch, rows))}
    return Program(name, traced, held, jax.tree.leaves(weights), observations, split)


_WHOLE = jax.sharding.PartitionSpec()


def _observations(workload: Workload, architecture: Architecture, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of a data set: what the commands read from a ``.npz`` or make from a LeRobot set."""
    described = family_of(architecture).inputs(architecture, workload.lengths(architecture))
    return {key: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype) for key, leaf in described.items()}


def _sharded(params: Tree, mesh: jax.sharding.Mesh) -> Leaf:
    """Parameters as `loading.load_model` places them."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        params,
        parameter_shardings(params, mesh),
    )


def _placed(tree: Leaf, sharding: jax.sharding.NamedSharding) -> Leaf:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _on_one(tree: Leaf) -> int:
    """Bytes on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
