"""The loss on held-out observations with fixed noise and times, which compares between steps and between runs."""

import math
from collections.abc import Callable, Mapping

import jax

from clp_jax.data import CalibrationData, arrange
from clp_jax.models import Architecture, Gates
from clp_jax.sensitivity import make_loss
from clp_jax.similarity import CalibrationBatch, batches


def held_out_loss(
    architecture: Architecture,
    held: Mapping[int, tuple[float, CalibrationData]],
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
) -> Callable[[dict], dict[str, float]] | None:
    """The mean loss of parameters on held-out observations; None where there are none.

    Args:
      architecture: of the model.
      held: observations by the number of the data set, with its weight.
      mesh: devices of all processes.
      batch_size: observations of one call at most, rounded up to a multiple of the number of devices.

    Returns:
      From parameters to scalars of the log: ``held_out_loss``, the weighted mean over the sets, and, where there are
      several, ``held_out_loss/<number>`` of each.
    """
    if not held:
        return None
    fixed = {number: _batches(data, mesh, batch_size) for number, (_, data) in held.items()}
    weights = {number: weight for number, (weight, _) in held.items()}

    def evaluate(params: dict) -> dict[str, float]:
        each = {number: make_loss(architecture, params, fixed[number])(Gates()) for number in held}
        mean = sum(weights[number] * loss for number, loss in each.items()) / sum(weights.values())
        return {"held_out_loss": mean} | ({f"held_out_loss/{n}": x for n, x in each.items()} if len(each) > 1 else {})

    return evaluate


def _batches(held: CalibrationData, mesh: jax.sharding.Mesh, batch_size: int) -> list[CalibrationBatch]:
    devices = math.prod(mesh.shape.values())
    arrangement = arrange(held.episodes, 1)
    return list(batches(held, arrangement, min(batch_size, math.ceil(len(held) / devices) * devices), mesh))
