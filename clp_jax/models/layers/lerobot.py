"""Names that every policy folder of lerobot 0.6 uses, and what a family says of such a folder."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from clp_jax.models.family import Lengths
from clp_jax.processing.robots import Robot

STATE, ACTION = "observation.state", "action"
"""Features of every policy."""

PREFIX = "model."
"""Of every tensor of a policy."""


class Wanted(NamedTuple):
    """What a policy folder is made from, beside the weights.

    Attributes:
      source: the checkpoint, for messages.
      folder: where the files are that say what shapes do not, if there are any.
      assets: where norm stats are, if there are any.
      asset_id: which norm stats; None where there is one.
      lengths: chunk and prompt.
      num_steps: Euler steps.
      robot: whose observations the policy is to read, if that is known.
      dtype: of the weights; None where they are stored in several.
    """

    source: epath.Path
    folder: epath.Path | None
    assets: epath.Path | None
    asset_id: str | None
    lengths: Lengths
    num_steps: int
    robot: Robot | None
    dtype: str | None


class PolicyFiles(NamedTuple):
    """What stands in a policy folder beside the weights, by the names of the files.

    Attributes:
      contents: of JSON files.
      tensors: of safetensors files.
      copies: files that are taken over as they are, from where.
    """

    contents: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, Mapping[str, np.ndarray]]
    copies: Mapping[str, epath.Path]


def step(name: str, **config: Any) -> dict[str, Any]:
    """One step of a processor."""
    return {"registry_name": name, "config": config}
