"""SIGTERM, as clouds send it before they take a machine away, seen by all hosts at the same step."""

import contextlib
import signal
from collections.abc import Iterator

import jax
import numpy as np

from clp_jax.aliases import Array
from clp_jax.sharding import batch_sharding


class StopRequest:
    """A flag that every process raises for itself and all read as one: it travels through the jitted step.

    Args:
      mesh: the devices of the run.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self.raised = False
        sharding = batch_sharding(mesh)
        shape = (jax.device_count(),)
        self._arrays = [
            jax.make_array_from_callback(shape, sharding, lambda index, v=value: np.full(shape, v, np.int32)[index])
            for value in (0, 1)
        ]

    def array(self) -> Array:
        """This process's flag on each of its devices; nonzero anywhere means stop."""
        return self._arrays[int(self.raised)]


@contextlib.contextmanager
def stop_on_sigterm(mesh: jax.sharding.Mesh) -> Iterator[StopRequest]:
    """Turn SIGTERM into a `StopRequest` while the block runs; a second one ends the process at once."""
    request = StopRequest(mesh)

    def raise_flag(*_):
        request.raised = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, raise_flag)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
