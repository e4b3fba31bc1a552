"""A policy in this process."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clp_jax.serving.policy import Policy


class LocalPolicy:
    """Answers all requests that come together in one call of the model.

    Args:
      policy: of a checkpoint.
    """

    def __init__(self, policy: Policy):
        self._policy, self.metadata = policy, policy.metadata
        self.latencies: list[float] = []
        """Seconds of each request, its preparation and the wait for its batch included."""

    def __call__(self, requests: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
        """The actions [horizon, d] of each request; at most the policy's ``max_batch`` requests."""
        start = time.perf_counter()
        answers = self._policy.infer_batch([self._policy.prepare(request) for request in requests])
        self.latencies += [time.perf_counter() - start] * len(requests)
        return [answer["actions"] for answer in answers]

    def close(self) -> None:
        """Nothing is held."""
