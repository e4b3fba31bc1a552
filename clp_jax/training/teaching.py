"""A frozen model beside the trained one: its output, and its hidden states if asked, are a second target.

Both read the same images, prompts, noise and times, and have the same seeds of dropout. The teacher runs inside the
step, its prefix once for all draws of noise of an observation, and is no part of the state that is saved.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from clp_jax import cka
from clp_jax.aliases import Array, Leaf, Tree
from clp_jax.errors import InputError
from clp_jax.models import (
    Architecture,
    Gates,
    Lengths,
    Loss,
    Rows,
    TowerStates,
    abstract_params,
    build,
    family_of,
    towers_measured,
)
from clp_jax.plan import PrunePlan

DEFAULT_WEIGHT = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teaching:
    """What is static about a teacher.

    Attributes:
      architecture: of the teacher.
      weight: share of the distance from its output in the loss; the task's own loss has the rest, ``1 - weight``.
      states: weight of the distance between hidden states, which comes on top.
      blocks: (tower, the teacher's block that each block is) pairs of the towers whose states are compared; only
        needed where ``states`` is above 0.
    """

    architecture: Architecture
    weight: float = DEFAULT_WEIGHT
    states: float = 0.0
    blocks: tuple[tuple[str, tuple[int, ...]], ...] = ()


def taught_loss(
    teaching: Teaching, architecture: Architecture, rows: Rows, params: Tree, teacher: Tree, inputs: Mapping[str, Leaf]
) -> tuple[Loss, dict[str, Loss]]:
    """``(1 - weight) task + weight distance + states apart``, observation by observation, and its parts.

    Args:
      teaching: the weights.
      architecture: of the trained model.
      rows: how a batch is split over devices.
      params: of the trained model.
      teacher: the teacher's parameters, through which no gradient goes.
      inputs: with noise and times.

    Returns:
      The loss, and by name what it is made of: ``task_loss``, ``teacher_loss`` and, where it has a weight,
      ``states_loss``.
    """
    family, capture = family_of(architecture), teaching.states > 0

    def run(architecture: Architecture, params: Tree) -> tuple[Array, dict[str, TowerStates]]:
        return family.forward(build(architecture, rows), params, inputs, gates=Gates(), capture=capture)

    output, states = run(architecture, params)
    wanted, known = jax.lax.stop_gradient(run(teaching.architecture, teacher))
    task = family.loss_of(architecture, output, inputs)
    parts = {
        "task_loss": task,
        "teacher_loss": family.distance(architecture, output, wanted.astype(jnp.float32), inputs),
    }
    each = (1 - teaching.weight) * task.each + teaching.weight * parts["teacher_loss"].each
    if capture:
        apart = states_apart(teaching, architecture, states, known, len(task.weight))
        parts["states_loss"] = Loss(apart, task.weight)
        each += teaching.states * apart.reshape(-1, *(1 for _ in each.shape[1:]))
    return Loss(each, task.weight), parts


def states_apart(
    teaching: Teaching,
    architecture: Architecture,
    states: Mapping[str, TowerStates],
    wanted: Mapping[str, TowerStates],
    observations: int,
) -> Float[Array, " b"]:
    """How far the streams after the blocks are from the teacher's after the same blocks: 0 is equal, 2 unrelated.

    It is the mean over towers, blocks and real tokens of |x - y|^2 / |y|^2, both scaled to unit root mean square, as
    the next block reads them. States that nothing reads are not compared.

    Args:
      teaching: whose ``blocks`` say which block of the teacher each block is.
      architecture: of the trained model.
      states: of the trained model.
      wanted: of the teacher.
      observations: of the batch, each of which has one row or several neighbouring ones.
    """
    unread = [
        {tower.name: set(tower.incomparable) for tower in one.towers} for one in (architecture, teaching.architecture)
    ]
    found = []
    for tower, blocks in teaching.blocks:
        pairs = [(own + 1, block + 1) for own, block in enumerate(blocks)]
        pairs = [(own, other) for own, other in pairs if own not in unread[0][tower] and other not in unread[1][tower]]
        if not pairs:
            continue
        own, other = map(jnp.asarray, zip(*pairs, strict=True))
        x, y = cka.rms_normalise(states[tower].states[own]), cka.rms_normalise(wanted[tower].states[other])
        valid = states[tower].valid.astype(jnp.float32)
        of_rows = (jnp.square(x - y).mean(axis=(0, -1)) * valid).sum(axis=1) / jnp.maximum(valid.sum(axis=1), 1)
        found.append(of_rows.reshape(observations, -1).mean(axis=1))
    return jnp.mean(jnp.stack(found), axis=0)


def same_blocks(
    architecture: Architecture,
    teacher: Architecture,
    record: Mapping[str, Any] | None,
    teachers_record: Mapping[str, Any] | None,
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The teacher's block that each block of a pruned model is, by both ``clp.json``.

    Args:
      architecture: of the pruned model.
      teacher: of the teacher.
      record: of the pruned model, None without.
      teachers_record: of the teacher, None without: then it has all blocks of the original.

    Returns:
      For every tower that an analysis measures, and every other that was cut.

    Raises:
      InputError: there is no record of what was removed, or the teacher lacks a block that the pruned model has.
    """
    ours, theirs = _original_blocks(architecture, record), _original_blocks(teacher, teachers_record)
    compared = [tower.name for tower in towers_measured(architecture)]
    compared += [name for name in architecture.depths if name not in compared and ours[name] != theirs[name]]
    found = []
    for name in compared:
        blocks, known = ours[name], theirs[name]
        if record is None and architecture.depths[name] != teacher.depths[name]:
            raise InputError(
                f"--teacher-states needs to know which of the teacher's {teacher.depths[name]} blocks the "
                f"{architecture.depths[name]} of tower {name!r} are, and the checkpoint has no clp.json that says it; "
                "prune with clp prune, or leave --teacher-states out."
            )
        if lacking := sorted(set(blocks) - set(known)):
            raise InputError(
                f"--teacher-states: the teacher has no block {lacking[0]} of the original's tower {name!r}, which the "
                "checkpoint kept; take a teacher that has all of its blocks, or leave --teacher-states out."
            )
        found.append((name, tuple(known.index(block) for block in blocks)))
    return tuple(found)


def check_teacher(architecture: Architecture, teaching: Teaching, lengths: Lengths) -> None:
    """Raise unless the teacher reads the same arrays and answers with the same, and its states can be compared.

    Raises:
      InputError: names the first difference.
    """
    teacher, titles = teaching.architecture, family_of(architecture).TITLES
    if teacher.kind != architecture.kind:
        other = family_of(teacher).TITLES[teacher.kind]
        raise InputError(f"--teacher is a {other}, the checkpoint a {titles[architecture.kind]}; give one of its kind.")
    ours, theirs = (_interface(one, lengths, states=teaching.states > 0) for one in (architecture, teacher))
    for name in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(name, "missing"), theirs.get(name, "missing")
        if one != other:
            raise InputError(
                f"--teacher does not fit: its {name} is {other}, the checkpoint's {one}; give a teacher that reads "
                "and answers with the same arrays."
            )


def _original_blocks(architecture: Architecture, record: Mapping[str, Any] | None) -> dict[str, tuple[int, ...]]:
    """Per tower, which blocks of the unpruned model it has."""
    towers = {} if record is None else PrunePlan.from_json(record["plan"]).towers
    return {name: towers[name].keep if name in towers else tuple(range(n)) for name, n in architecture.depths.items()}


def _interface(architecture: Architecture, lengths: Lengths, *, states: bool) -> dict[str, Any]:
    """What a model reads and answers with, by name; with the shapes of its states, but for their number, if asked."""
    family = family_of(architecture)
    read = family.inputs(architecture, lengths)
    inputs = {key: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype) for key, leaf in read.items()}

    def run(params: Tree, inputs: Mapping[str, Leaf]):
        drawn, _ = family.draw(architecture, jax.random.key(0), inputs)
        return family.forward(build(architecture), params, drawn, gates=Gates(), capture=True)

    output, towers = jax.eval_shape(run, abstract_params(architecture), inputs)
    shapes = {key: leaf.shape for key, leaf in read.items() if key not in family.any_size(architecture)}
    shapes |= {f"state of tower {name}": tower.states.shape[1:] for name, tower in towers.items() if states}
    sizes = {"chunk": family.lengths(architecture).horizon, "vocabulary": architecture.vocab_size}
    return shapes | sizes | {"output": output.shape}
