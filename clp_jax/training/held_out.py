"""The loss on held-out observations with fixed noise and times, which compares between steps and between runs."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax

from clp_jax.cuts import WHOLE, Cut, name_of, rows_of, smaller
from clp_jax.data import CalibrationData, arrange
from clp_jax.models import Architecture, Gates
from clp_jax.sensitivity import make_loss
from clp_jax.similarity import CalibrationBatch, batches

HELD_OUT_AT = "held_out_loss_at_"
"""Begins the names of the losses of cuts; `cuts.name_of` ends them."""


def held_out_loss(
    architecture: Architecture,
    held: Mapping[int, tuple[float, CalibrationData]],
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    cuts: Sequence[Cut] = (WHOLE,),
) -> Callable[[dict], dict[str, float]] | None:
    """The mean loss of parameters on held-out observations; None where there are none.

    Args:
      architecture: of the model.
      held: observations by the number of the data set, with its weight.
      mesh: devices of all processes.
      batch_size: observations of one call at most, rounded up to a multiple of the number of devices.
      cuts: of the model whose losses are wanted, too.

    Returns:
      From parameters to scalars of the log: ``held_out_loss``, the weighted mean over the sets, and, where there are
      several, ``held_out_loss/<number>`` of each; for every cut ``held_out_loss_at_<blocks>``.
    """
    if not held:
        return None
    take = {cut: jax.jit(functools.partial(rows_of, architecture, cut=cut)) for cut in cuts if cut}
    fixed = {number: _batches(data, mesh, batch_size) for number, (_, data) in held.items()}
    weights = {number: weight for number, (weight, _) in held.items()}

    def of_model(architecture: Architecture, params: dict) -> tuple[float, dict[int, float]]:
        each = {number: make_loss(architecture, params, fixed[number])(Gates()) for number in held}
        return sum(weights[number] * loss for number, loss in each.items()) / sum(weights.values()), each

    def evaluate(params: dict) -> dict[str, float]:
        mean, each = of_model(architecture, params)
        found = {"held_out_loss": mean} | ({f"held_out_loss/{n}": x for n, x in each.items()} if len(each) > 1 else {})
        for cut, rows in take.items():
            mean, _ = of_model(smaller(architecture, cut), rows(params))
            found[HELD_OUT_AT + name_of(cut, architecture.groups)] = mean
        return found

    return evaluate


def _batches(held: CalibrationData, mesh: jax.sharding.Mesh, batch_size: int) -> list[CalibrationBatch]:
    devices = math.prod(mesh.shape.values())
    arrangement = arrange(held.episodes, 1)
    return list(batches(held, arrangement, min(batch_size, math.ceil(len(held) / devices) * devices), mesh))
