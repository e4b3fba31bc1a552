"""Where arrays live: a ("batch", "fsdp") mesh, openpi's FSDP rule for parameters, and batches over all devices."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clp_jax.aliases import Leaf
from clp_jax.errors import InputError

_MIN_SHARDED_BYTES = 4 * 2**20


def make_mesh(fsdp_devices: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Devices as (batch, fsdp); parameters are split over the second axis.

    Args:
      fsdp_devices: length of the second axis.
      devices: all of all processes if None, or those of a topology to compile for.

    Raises:
      InputError: ``fsdp_devices`` does not divide the number of devices.
    """
    found = np.array(jax.devices() if devices is None else devices)
    if fsdp_devices < 1 or found.size % fsdp_devices:
        raise InputError(f"--fsdp-devices {fsdp_devices} does not divide the {found.size} devices there are.")
    return Mesh(found.reshape(-1, fsdp_devices), ("batch", "fsdp"))


Rules = tuple[tuple[str, int | None], ...]
"""Ordered (regular expression, axis) pairs over whole parameter names; axis None replicates."""


def parameter_shardings(tree: Leaf, mesh: Mesh, rules: Rules = ()) -> Leaf:
    """Your rules, then openpi's: what has two axes and 4 MiB is split along the largest that divides.

    Args:
      tree: any PyTree of arrays or ``jax.ShapeDtypeStruct``. In an optimiser state or an average, a rule goes by the
        name of the parameter that a leaf belongs to.
      mesh: from `make_mesh`.
      rules: exceptions from openpi's rule.

    Returns:
      A sharding for every leaf; replicated where no rule applies.

    Raises:
      InputError: the axis of a rule does not exist or does not divide, or a rule matches nothing.
    """
    used: set[str] = set()

    def sharding(path, leaf) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, axis in rules:
            if re.fullmatch(f"(.*/)?(?:{pattern})", name):
                used.add(pattern)
                return NamedSharding(mesh, _along(axis, leaf, mesh.shape["fsdp"], name))
        return NamedSharding(mesh, _spec(leaf, mesh.shape["fsdp"]))

    shardings = jax.tree_util.tree_map_with_path(sharding, tree)
    unused = [pattern for pattern, _ in rules if pattern not in used]
    if unused:
        raise InputError(f"these sharding rules match no parameter that an earlier rule leaves: {unused}.")
    return shardings


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("batch", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put(tree: Leaf, sharding: NamedSharding) -> Leaf:
    """Place host arrays, the same on every process, on the devices of all processes."""
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index]), tree)


def _along(axis: int | None, leaf, fsdp: int, name: str) -> PartitionSpec:
    if axis is None:
        return PartitionSpec()
    if not 0 <= axis < leaf.ndim or leaf.shape[axis] % fsdp:
        raise InputError(f"{name} of shape {tuple(leaf.shape)} cannot be split over {fsdp} devices along axis {axis}.")
    return PartitionSpec(*(("fsdp" if i == axis else None) for i in range(leaf.ndim)))


def _spec(leaf, fsdp: int) -> PartitionSpec:
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    if fsdp == 1 or leaf.ndim < 2 or size < _MIN_SHARDED_BYTES:
        return PartitionSpec()
    for axis in sorted(range(leaf.ndim), key=lambda i: leaf.shape[i], reverse=True):
        if leaf.shape[axis] % fsdp == 0:
            return PartitionSpec(*(("fsdp" if i == axis else None) for i in range(leaf.ndim)))
    return PartitionSpec()
