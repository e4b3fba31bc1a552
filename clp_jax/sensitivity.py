"""What the model's own loss says about its blocks, through one gate per block.

A gate of 1 runs a block, 0 removes it exactly (see ``models.gemma.Block``), so one compiled program gives the loss
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
from clp_jax.models import Architecture, Gates, Model, Pi0Fast, Rows, build
from clp_jax.plan import PrunePlan
from clp_jax.selection.evidence import GateEvidence
from clp_jax.similarity import Batch, forward


def group_gates(architecture: Architecture, group: Sequence[str], alpha: Float[Array, "depth b"]) -> Gates:
    """Gates that apply ``alpha`` to the towers of a group and leave the others as they are.

    Args:
      architecture: of the model.
      group: ("vision",) or language towers ("vlm", "action").
      alpha: one gate per block and observation; a last axis of 1 serves the whole batch.
    """
    if tuple(group) == ("vision",):
        return Gates(vision=alpha)
    columns = [
        alpha if name in group else jnp.ones_like(alpha) for name in ("vlm", "action")[: len(architecture.experts)]
    ]
    return Gates(llm=jnp.stack(columns, axis=1))


def plan_gates(architecture: Architecture, plan: PrunePlan) -> Gates:
    """Gates under which the full model computes what the plan's pruned model computes."""

    def column(tower: str) -> np.ndarray:
        keep = np.ones(architecture.depths[tower], np.float32)
        keep[list(plan.removed(tower))] = 0.0
        return keep[:, None]

    language = [tower for tower in architecture.depths if tower != "vision"]
    return Gates(llm=np.stack([column(tower) for tower in language], axis=1), vision=column("vision"))


def observation_losses(model: Model, params: Tree, batch: Batch, gates: Gates) -> Float[Array, " b"]:
    """The training loss of each observation with the batch's noise and times; cross entropy for π0-FAST."""
    output, _ = forward(model, params, batch, gates=gates)
    inputs = batch.inputs
    if isinstance(model, Pi0Fast):
        log_likelihood = jnp.take_along_axis(
            jax.nn.log_softmax(output, axis=-1), inputs["tokenized_prompt"][:, 1:, None], axis=-1
        )[..., 0]
        wanted = inputs["token_loss_mask"][:, 1:].astype(log_likelihood.dtype)
        return -jnp.sum(log_likelihood * wanted, axis=-1) / jnp.clip(jnp.sum(wanted, axis=-1), 1)
    error = output.astype(jnp.float32) - (inputs["noise"] - inputs["actions"])
    return jnp.mean(jnp.square(error), axis=(1, 2))


def make_loss(architecture: Architecture, params: Tree, batches: Iterable[Batch]) -> Callable[[Gates], float]:
    """The mean loss over fixed batches as a function of the gates, compiled once for all of them."""
    fixed = list(batches)
    total = _loss_step(architecture, _rows(fixed))

    def loss(gates: Gates) -> float:
        sums = [total(params, batch, gates) for batch in fixed]
        return float(sum(s for s, _ in sums)) / float(sum(n for _, n in sums))

    return loss


@functools.lru_cache(maxsize=8)
def _loss_step(architecture: Architecture, rows: Rows):
    model = build(architecture, rows)

    @jax.jit
    def total(params: Tree, batch: Batch, gates: Gates) -> tuple[Array, Array]:
        losses = observation_losses(model, params, batch, gates)
        return jnp.sum(jnp.where(batch.present, losses, 0.0)), jnp.sum(batch.present)

    return total


def make_group_loss(
    architecture: Architecture, group: Sequence[str], loss: Callable[[Gates], float]
) -> Callable[[np.ndarray], float]:
    """The loss as a function of one gate per block of a group of towers: what greedy selection asks for."""
    return lambda alpha: loss(group_gates(architecture, group, jnp.asarray(alpha, jnp.float32)[:, None]))


def measure_gates(
    architecture: Architecture,
    params: Tree,
    batches: Iterable[Batch],
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
      of the squared velocity error from one JVP per block. π0-FAST has no squared error, so no Gauss-Newton matrix.
    """
    curvature = gauss_newton and architecture.kind != "pi0_fast"
    fixed = list(batches)
    step = gate_step(architecture, tuple(group), _rows(fixed), curvature=curvature)
    parts = [step(params, batch) for batch in fixed]
    gradient, sensitivity, matrix, count = (np.sum([np.asarray(part[i]) for part in parts], axis=0) for i in range(4))
    return GateEvidence(
        sensitivity=(sensitivity / count).astype(np.float64),
        gradient=(gradient / count).astype(np.float64),
        gauss_newton=(matrix / count).astype(np.float64) if curvature else None,
    )


@functools.lru_cache(maxsize=8)
def gate_step(architecture: Architecture, group: tuple[str, ...], rows: Rows, *, curvature: bool):
    """The compiled program of `measure_gates`, from parameters and a `Batch`."""
    return jax.jit(functools.partial(_gate_sums, build(architecture, rows), architecture, group, curvature=curvature))


def _rows(batches: Sequence[Batch]) -> Rows:
    """How batches are split over devices; None for those that are not on a mesh."""
    sharding = getattr(batches[0].present, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def _gate_sums(
    model: Model,
    architecture: Architecture,
    group: tuple[str, ...],
    params: Tree,
    batch: Batch,
    *,
    curvature: bool,
) -> tuple[Array, Array, Array, Array]:
    """Sums over present observations of the gradient, its absolute value, and the Gauss-Newton matrix; their number."""
    present, depth = batch.present.astype(jnp.float32), architecture.depths[group[0]]

    def total_loss(alpha: Array) -> Array:
        losses = observation_losses(model, params, batch, group_gates(architecture, group, alpha))
        return jnp.sum(losses * present)

    per_observation = jax.grad(total_loss)(jnp.ones((depth, present.shape[0]), jnp.float32))
    matrix = jnp.zeros((depth, depth))
    if curvature:

        def velocity(alpha: Array) -> Array:
            output, _ = forward(model, params, batch, gates=group_gates(architecture, group, alpha[:, None]))
            return output.astype(jnp.float32)

        ones = jnp.ones(depth, jnp.float32)
        # One tangent at a time: memory stays that of a single forward-mode pass.
        tangents = jax.lax.map(lambda direction: jax.jvp(velocity, (ones,), (direction,))[1], jnp.eye(depth))
        size = tangents.shape[2] * tangents.shape[3]
        matrix = 2.0 / size * jnp.einsum("ibha,jbha,b->ij", tangents, tangents, present, precision="highest")
    return per_observation.sum(axis=1), jnp.abs(per_observation).sum(axis=1), matrix, present.sum()
