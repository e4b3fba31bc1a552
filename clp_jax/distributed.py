"""Several processes as one run: on TPU pods from the environment, elsewhere from three numbers."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from clp_jax.errors import InputError
from clp_jax.progress import hush


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedFlags:
    """Several hosts. On a TPU pod or under Slurm --distributed is enough; elsewhere give all three numbers."""

    distributed: bool = False
    """Join the other processes of this pod or job, found through its environment."""
    coordinator: str | None = None
    """host:port of process 0."""
    processes: int | None = None
    """Number of all processes."""
    process_id: int | None = None
    """Number of this process, from 0."""


def join(flags: DistributedFlags) -> None:
    """Connect this process with the others; must come before anything else asks JAX for devices.

    Raises:
      InputError: the flags are incomplete, or the others cannot be found.
    """
    given = [flags.coordinator, flags.processes, flags.process_id]
    if not flags.distributed and all(x is None for x in given):
        return
    if any(x is None for x in given) and not all(x is None for x in given):
        raise InputError("give --coordinator, --processes and --process-id together.")
    try:
        jax.distributed.initialize(flags.coordinator, flags.processes, flags.process_id)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error
    if not is_first():
        hush()


def is_first() -> bool:
    """Whether this process is the one that talks."""
    return jax.process_index() == 0


def on_first(action: Callable[[], None], what: str) -> None:
    """Does something on the first process while the others wait; where it fails, all of them do.

    Args:
      action: what to do.
      what: its description, to follow "cannot".

    Raises:
      InputError: the action raised it.
    """
    together(action if is_first() else lambda: None, what)


def together(action: Callable[[], None], what: str) -> None:
    """Does something on every process, each its own share; where one fails, all of them do.

    Args:
      action: what to do; meets no other process.
      what: its description, to follow "cannot".

    Raises:
      InputError: the action raised it, here or elsewhere.
    """
    failure = None
    try:
        action()
    except InputError as error:
        failure = error
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = np.ravel(multihost_utils.process_allgather(np.int32(failure is not None)))
        if failed.any() and failure is None:
            raise InputError(f"process {failed.argmax()} cannot {what}; its own message says why")
    if failure is not None:
        raise failure
