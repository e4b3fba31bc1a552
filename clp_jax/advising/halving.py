"""Successive halving within each depth (Jamieson & Talwalkar 2016, arXiv 1502.07943).

Every depth keeps its best to the end, for what is wanted is the choice between depths, not one winner. A rung is a run
of its own, from the checkpoint to the end of its schedule: a piece of a longer run would end at a high learning rate,
where a high peak looks worse than it ends.
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
      steps: training steps of the rung.
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
"""Trains a candidate for the steps of a rung and measures it at their end."""


def halve(candidates: Sequence[Candidate], rungs: int, measure: Measure, weights: Sequence[float]) -> Iterator[Trial]:
    """Run all candidates, then the better half of each depth in the next rung; who diverged is never among it.

    A depth that has one candidate left waits for the last rung: those between would decide nothing.

    Args:
      candidates: to begin with.
      rungs: how often.
      measure: one trial.
      weights: of the episodes, in a mean.

    Yields:
      Each trial as soon as it is known, those of a rung in the order of the candidates.

    Raises:
      InputError: the whole model diverged with every learning rate.
    """
    alive: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        alive.setdefault(candidate.depth, []).append(candidate)
    for rung in range(rungs):
        for depth, rivals in alive.items():
            if len(rivals) == 1 and rung + 1 < rungs:
                continue
            means: list[float] = []
            for candidate in rivals:
                trial = measure(candidate, rung)
                means.append(mean_loss(trial.losses, weights))
                yield trial
            if depth == FULL and not any(math.isfinite(mean) for mean in means):
                raise InputError(
                    "the whole model diverged with every learning rate, so depths have nothing to be compared with; "
                    "give lower --learning-rates and another --out."
                )
            ranked = sorted(zip(means, rivals, strict=True), key=lambda pair: pair[0])[: math.ceil(len(rivals) / 2)]
            alive[depth] = [candidate for mean, candidate in ranked if math.isfinite(mean)]


def mean_loss(losses: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted mean; infinity where a loss is no number, so that such a candidate is never the best."""
    mean = float(np.average(losses, weights=weights))
    return mean if math.isfinite(mean) else math.inf
