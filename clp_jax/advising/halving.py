"""Successive halving within each depth (Jamieson & Talwalkar 2016, arXiv 1502.07943).

Every depth keeps its best to the end, for what is wanted is the choice between depths, not one winner.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from clp_jax.advising.candidates import FULL, Candidate
from clp_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate after a rung.

    Attributes:
      candidate: its name.
      rung: number of the rung, from 0.
      steps: training steps done so far.
      losses: held-out loss of each episode, the same episodes for all; NaN where the candidate diverged.
    """

    candidate: str
    rung: int
    steps: int
    losses: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values, null for a loss that is no number."""
        return dataclasses.asdict(self) | {"losses": [loss if math.isfinite(loss) else None for loss in self.losses]}


Measure = Callable[[Candidate, int], Trial]
"""Trains a candidate to the end of a rung and measures it there."""


def halve(
    candidates: Sequence[Candidate], rungs: int, measure: Measure, weights: Sequence[float]
) -> Iterator[tuple[Trial, bool]]:
    """Run all candidates, the better half of each depth on to the next rung; who diverged is never among it.

    Args:
      candidates: to begin with.
      rungs: how often.
      measure: one trial.
      weights: of the episodes, in a mean.

    Yields:
      Each trial, and whether its candidate is out: trials of a rung in the order of the candidates, each as soon as it
      is known with False, and those that are out once more, with True, at the end of the rung.

    Raises:
      InputError: the whole model diverged with every learning rate.
    """
    alive = list(candidates)
    for rung in range(rungs):
        trials = {}
        for candidate in alive:
            trials[candidate.name] = measure(candidate, rung)
            yield trials[candidate.name], False
        means = {name: mean_loss(trial.losses, weights) for name, trial in trials.items()}
        if not any(candidate.depth == FULL and math.isfinite(means[candidate.name]) for candidate in alive):
            raise InputError(
                "the whole model diverged with every learning rate, so depths have nothing to be compared with; give "
                "lower --learning-rates and another --out."
            )
        if rung + 1 == rungs:
            return
        kept: list[Candidate] = []
        for depth in dict.fromkeys(candidate.depth for candidate in alive):
            ranked = sorted(
                (candidate for candidate in alive if candidate.depth == depth),
                key=lambda candidate: means[candidate.name],
            )
            kept += [one for one in ranked[: math.ceil(len(ranked) / 2)] if math.isfinite(means[one.name])]
        for candidate in alive:
            if candidate not in kept:
                yield trials[candidate.name], True
        alive = [candidate for candidate in alive if candidate in kept]


def mean_loss(losses: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted mean; infinity where a loss is no number, so that such a candidate is never the best."""
    mean = float(np.average(losses, weights=weights))
    return mean if math.isfinite(mean) else math.inf
