"""Where arrays live: a ("batch", "fsdp") mesh, openpi's FSDP rule for parameters, and batches over all devices."""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clp_jax.aliases import Leaf
from clp_jax.errors import InputError

_MIN_SHARDED_BYTES = 4 * 2**20


def make_mesh(fsdp_devices: int = 1) -> Mesh:
    """All devices of all processes as (batch, fsdp); parameters are split over the second axis.

    Raises:
      InputError: ``fsdp_devices`` does not divide the number of devices.
    """
    count = jax.device_count()
    if fsdp_devices < 1 or count % fsdp_devices:
        raise InputError(f"--fsdp-devices {fsdp_devices} does not divide the {count} devices there are.")
    return Mesh(np.array(jax.devices()).reshape(count // fsdp_devices, fsdp_devices), ("batch", "fsdp"))


def parameter_shardings(tree: Leaf, mesh: Mesh) -> Leaf:
    """openpi's FSDP rule: arrays of two or more axes and 4 MiB are split along their largest axis that divides.

    Args:
      tree: any PyTree of arrays or ``jax.ShapeDtypeStruct``, an optimiser state too.
      mesh: from `make_mesh`.

    Returns:
      A sharding for every leaf; replicated where the rule does not apply.
    """
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf, mesh.shape["fsdp"])), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("batch", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put(tree: Leaf, sharding: NamedSharding) -> Leaf:
    """Place host arrays, the same on every process, on the devices of all processes."""
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index]), tree)


def _spec(leaf, fsdp: int) -> PartitionSpec:
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    if fsdp == 1 or leaf.ndim < 2 or size < _MIN_SHARDED_BYTES:
        return PartitionSpec()
    for axis in sorted(range(leaf.ndim), key=lambda i: leaf.shape[i], reverse=True):
        if leaf.shape[axis] % fsdp == 0:
            return PartitionSpec(*(("fsdp" if i == axis else None) for i in range(leaf.ndim)))
    return PartitionSpec()
