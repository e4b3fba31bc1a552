"""Identities of a data set by content: the same wherever it lies, and whatever else lies beside it."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from clp_jax.data.lerobot import LeRobotData


def fingerprint_of_rows(
    data: LeRobotData, vectors: Sequence[Float[np.ndarray, "n _"]], task: str = "task_index"
) -> str:
    """Identity of the rows that a run reads.

    Args:
      data: the data set.
      vectors: state and actions of every row.
      task: key of the column with the number of each row's task.

    Returns:
      A SHA-256 over values and shapes of the vectors, times, episodes, and the task numbers and texts that occur.
    """
    digest = hashlib.sha256(repr(data.meta.fps).encode())
    times, tasks = data.numbers("timestamp", task)
    for column in (*vectors, times, tasks, data.episodes, data.ends):
        digest.update(f"{column.dtype}{column.shape}".encode())
        digest.update(np.ascontiguousarray(column).data)
    for number in np.unique(tasks).tolist():
        digest.update(repr((number, data.meta.tasks.get(int(number)))).encode())
    return digest.hexdigest()


def fingerprint_of_pictures(digests: Mapping[str, str]) -> str:
    """Identity of what the cameras saw, from each camera's digest in a `proof.Proof`."""
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()
