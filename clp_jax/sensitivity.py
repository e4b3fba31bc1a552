"""What the model's own loss says about its blocks, through one gate per block.

A gate of 1 runs a block, 0 removes it exactly (see ``models.towers.Gates``), so one compiled program gives the loss
of the full model, of every pruned one, and the derivatives between them. Towers that are pruned together share their
gates.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from clp_jax.aliases import Array, Tree
from clp_jax.errors import InputError
from clp_jax.models import Architecture, Gates, Rows, build, family_of
from clp_jax.plan import PrunePlan
from clp_jax.progress import track_stage
from clp_jax.selection.evidence import GateEvidence
from clp_jax.similarity import CalibrationBatch


def group_gates(group: Sequence[str], alpha: Float[Array, "depth b"]) -> Gates:
    """Gates that apply ``alpha`` to the towers of a group and leave the others as they are.

    Args:
      group: towers that keep the same blocks.
      alpha: one gate per block and observation; a last axis of 1 serves the whole batch.
    """
    return Gates(dict.fromkeys(group, alpha))


def open_gates(architecture: Architecture) -> Gates:
    """Gates that remove nothing: the full model, in the program that also runs every pruned one."""
    return Gates({tower: np.ones((depth, 1), np.float32) for tower, depth in architecture.depths.items()})


def plan_gates(architecture: Architecture, plan: PrunePlan) -> Gates:
    """Gates under which the full model computes what the plan's pruned model computes."""
    gates = open_gates(architecture)
    for tower, gate in gates.items():
        gate[list(plan.removed(tower))] = 0.0
    return gates


def make_loss(
    architecture: Architecture, params: Tree, batches: Iterable[CalibrationBatch]
) -> Callable[[Gates], float]:
    """The mean over observations of the model's own loss on fixed batches, as a function of the gates.

    Compiled once for all gates of the same towers.
    """
    fixed = list(batches)
    total = _loss_step(architecture, _rows(fixed))

    def loss(gates: Gates) -> float:
        check_gates(architecture, gates)
        sums = [total(params, batch, gates) for batch in fixed]
        return float(sum(s for s, _ in sums)) / float(sum(n for _, n in sums))

    return loss


def check_gates(architecture: Architecture, gates: Gates) -> None:
    """Raise unless every gated tower exists and has one row of gates per block.

    Raises:
      InputError: names the tower.
    """
    known = architecture.depths
    for tower, gate in gates.items():
        if tower not in known:
            raise InputError(f"there is no tower {tower!r} to gate; the model has {', '.join(known)}.")
        if np.ndim(gate) != 2 or np.shape(gate)[0] != known[tower]:
            raise InputError(
                f"the gates of tower {tower!r} have shape {np.shape(gate)}, expected ({known[tower]}, observations or "
                "1)."
            )


@functools.lru_cache(maxsize=8)
def _loss_step(architecture: Architecture, rows: Rows):
    family, model = family_of(architecture), build(architecture, rows)

    @jax.jit
    def total(params: Tree, batch: CalibrationBatch, gates: Gates) -> tuple[Array, Array]:
        losses = family.losses(model, params, batch.inputs, gates=gates).each
        return jnp.sum(jnp.where(batch.present, losses, 0.0)), jnp.sum(batch.present)

    return total


def make_group_loss(group: Sequence[str], loss: Callable[[Gates], float]) -> Callable[[np.ndarray], float]:
    """The loss as a function of one gate per block of a group of towers: what greedy selection asks for."""
    return lambda alpha: loss(group_gates(group, jnp.asarray(alpha, jnp.float32)[:, None]))


def measure_gates(
    architecture: Architecture,
    params: Tree,
    batches: Iterable[CalibrationBatch],
    group: Sequence[str],
    *,
    gauss_newton: bool = True,
) -> GateEvidence:
    """Derivatives of the calibration loss at all gates 1.

    Args:
      architecture: of the model.
      params: its parameters.
      batches: calibration data.
      group: towers that share the gates.
      gauss_newton: also measure the curvature; costs one forward-mode pass per block.

    Returns:
      Sensitivity and gradient from one backward pass per batch (gates per observation), and the Gauss-Newton matrix
      of the squared error from one JVP per block. A model whose loss is no squared error has no Gauss-Newton matrix.
    """
    fixed = list(batches)
    curvature = gauss_newton and has_squared_error(architecture, fixed[0])
    step = gate_step(architecture, tuple(group), _rows(fixed), curvature=curvature)
    # Each is waited for, so that the rate is that of the devices.
    parts = [jax.device_get(step(params, batch)) for batch in track_stage(fixed, "derivatives", unit="batches")]
    gradient, sensitivity, matrix, count = (np.sum([np.asarray(part[i]) for part in parts], axis=0) for i in range(4))
    return GateEvidence(
        sensitivity=(sensitivity / count).astype(np.float64),
        gradient=(gradient / count).astype(np.float64),
        gauss_newton=(matrix / count).astype(np.float64) if curvature else None,
    )


def has_squared_error(architecture: Architecture, batch: CalibrationBatch) -> bool:
    """Whether the model's loss is a weighted squared error."""
    weights = functools.partial(family_of(architecture).error_weights, architecture)
    return jax.eval_shape(weights, batch.inputs) is not None


@functools.lru_cache(maxsize=8)
def gate_step(architecture: Architecture, group: tuple[str, ...], rows: Rows, *, curvature: bool):
    """The compiled program of `measure_gates`, from parameters and a `CalibrationBatch`."""
    return jax.jit(functools.partial(_gate_sums, architecture, rows, group, curvature=curvature))


def _rows(batches: Sequence[CalibrationBatch]) -> Rows:
    """How batches are split over devices; None for those that are not on a mesh."""
    sharding = getattr(batches[0].present, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def _gate_sums(
    architecture: Architecture,
    rows: Rows,
    group: tuple[str, ...],
    params: Tree,
    batch: CalibrationBatch,
    *,
    curvature: bool,
) -> tuple[Array, Array, Array, Array]:
    """Sums over present observations of the gradient, its absolute value, and the Gauss-Newton matrix; their number."""
    family, model = family_of(architecture), build(architecture, rows)
    present, depth = batch.present.astype(jnp.float32), architecture.depths[group[0]]

    def total_loss(alpha: Array) -> Array:
        losses = family.losses(model, params, batch.inputs, gates=group_gates(group, alpha)).each
        return jnp.sum(losses * present)

    per_observation = jax.grad(total_loss)(jnp.ones((depth, present.shape[0]), jnp.float32))
    matrix = jnp.zeros((depth, depth))
    if curvature:

        def output(alpha: Array) -> Array:
            found, _ = family.forward(model, params, batch.inputs, gates=group_gates(group, alpha[:, None]))
            return found.astype(jnp.float32)

        ones = jnp.ones(depth, jnp.float32)
        # One tangent at a time: memory stays that of a single forward-mode pass.
        tangents = jax.lax.map(lambda direction: jax.jvp(output, (ones,), (direction,))[1], jnp.eye(depth))
        weights = family.error_weights(architecture, batch.inputs) * present[:, None, None]
        matrix = 2.0 * jnp.einsum("ibha,jbha,bha->ij", tangents, tangents, weights, precision="highest")
    return per_observation.sum(axis=1), jnp.abs(per_observation).sum(axis=1), matrix, present.sum()
