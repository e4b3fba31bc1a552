"""Successive halving within each depth (Jamieson & Talwalkar 2016, arXiv 1502.07943).

Every depth keeps its best to the end, for what is wanted is the choice between depths, not one winner.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from clp_jax.advising.candidates import Candidate


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate after a rung.

    Attributes:
      candidate: its name.
      rung: number of the rung, from 0.
      steps: training steps done so far.
      losses: held-out loss of each episode, the same episodes for all.
    """

    candidate: str
    rung: int
    steps: int
    losses: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self) | {"losses": list(self.losses)}


Measure = Callable[[Candidate, int], Trial]
"""Trains a candidate to the end of a rung and measures it there."""


def halve(
    candidates: Sequence[Candidate], rungs: int, measure: Measure, weights: Sequence[float]
) -> Iterator[tuple[Trial, bool]]:
    """Run all candidates, the better half of each depth on to the next rung.

    Args:
      candidates: to begin with.
      rungs: how often.
      measure: one trial.
      weights: of the episodes, in a mean.

    Yields:
      Each trial, and whether its candidate is out: trials of a rung in the order of the candidates, each as soon as it
      is known with False, and those that are out once more, with True, at the end of the rung.
    """
    alive = list(candidates)
    for rung in range(rungs):
        trials = {}
        for candidate in alive:
            trials[candidate.name] = measure(candidate, rung)
            yield trials[candidate.name], False
        if rung + 1 == rungs:
            return
        kept: list[Candidate] = []
        for depth in dict.fromkeys(candidate.depth for candidate in alive):
            ranked = sorted(
                (candidate for candidate in alive if candidate.depth == depth),
                key=lambda candidate: mean_loss(trials[candidate.name].losses, weights),
            )
            kept += ranked[: math.ceil(len(ranked) / 2)]
        for candidate in alive:
            if candidate not in kept:
                yield trials[candidate.name], True
        alive = [candidate for candidate in alive if candidate in kept]


def mean_loss(losses: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted mean; infinity where a loss is no number, so that such a candidate is never the best."""
    mean = float(np.average(losses, weights=weights))
    return mean if math.isfinite(mean) else math.inf
