"""The loss on held-out observations with fixed noise and times, which compares between steps and between runs."""

import math
from collections.abc import Callable

import jax

from clp_jax.data import CalibrationData, arrange
from clp_jax.models import Architecture, Gates
from clp_jax.sensitivity import make_loss
from clp_jax.similarity import batches


def held_out_loss(
    architecture: Architecture, held: CalibrationData | None, mesh: jax.sharding.Mesh, *, batch_size: int
) -> Callable[[dict], float] | None:
    """The mean loss of parameters on held-out observations; None where there are none.

    Args:
      architecture: of the model.
      held: the observations.
      mesh: devices of all processes.
      batch_size: observations of one call at most, rounded up to a multiple of the number of devices.
    """
    if held is None:
        return None
    devices = math.prod(mesh.shape.values())
    arrangement = arrange(held.episodes, 1)
    fixed = list(batches(held, arrangement, min(batch_size, math.ceil(len(held) / devices) * devices), mesh))
    return lambda params: make_loss(architecture, params, fixed)(Gates())
