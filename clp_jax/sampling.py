"""Actions of a model on observations in memory: what a robot would get, still normalised."""

import functools
import math

import jax
import numpy as np
from jaxtyping import Float

from clp_jax.aliases import Array, Tree
from clp_jax.data import CalibrationData, arrange
from clp_jax.errors import InputError
from clp_jax.loading import LoadedModel
from clp_jax.models import Architecture, Gates, Rows, build, family_of
from clp_jax.similarity import CalibrationBatch, batches


def sample(
    model: LoadedModel,
    data: CalibrationData,
    num_steps: int | None = None,
    *,
    gates: Gates = Gates(),
    batch_size: int = 4,
) -> Float[np.ndarray, "n horizon adim"]:
    """Sample one action chunk for every observation, from the data's own ``noise``.

    Args:
      model: from ``load_model``.
      data: observations with their noise.
      num_steps: integration steps from noise to actions; the model's own number if None.
      gates: blocks to switch off.
      batch_size: observations of one call, rounded up to a multiple of the number of devices.

    Returns:
      Actions, normalised and padded as the model gives them, in the order of the data.

    Raises:
      InputError: the model samples no actions, or steps below one.
    """
    family = family_of(model.architecture)
    if (reason := family.why_no_actions(model.architecture)) is not None:
        raise InputError(reason)
    steps = family.num_steps(model.architecture) if num_steps is None else num_steps
    if steps < 1:
        raise InputError(f"{steps} integration steps are none; give at least 1.")
    devices = math.prod(model.mesh.shape.values())
    groups = math.ceil(min(batch_size, len(data)) / devices) * devices
    arrangement = arrange(np.arange(len(data)), 1)
    found = None
    for number, batch in enumerate(batches(data, arrangement, groups, model.mesh)):
        rows = arrangement.slots[number * groups : (number + 1) * groups, 0]
        step = sampling_step(model.architecture, batch.present.sharding, steps)
        actions = np.asarray(step(model.params, batch, gates), np.float32)[: len(rows)]
        found = np.empty((len(data), *actions.shape[1:]), np.float32) if found is None else found
        found[rows] = actions
    assert found is not None
    return found


@functools.lru_cache(maxsize=8)
def sampling_step(architecture: Architecture, rows: Rows, num_steps: int):
    """The compiled program that samples a batch from its own noise: (parameters, batch, gates) to actions."""
    family, model = family_of(architecture), build(architecture, rows)

    @jax.jit
    def actions(params: Tree, batch: CalibrationBatch, gates: Gates) -> Array:
        inputs = {key: value for key, value in batch.inputs.items() if key not in ("actions", "time", "noise")}
        return family.sample(model, params, inputs, noise=batch.inputs["noise"], num_steps=num_steps, gates=gates)

    return actions
