"""Which depth to take: the fastest whose loss is close enough to the best, and how sure that is."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clp_jax.advising.candidates import FULL, Candidate
from clp_jax.advising.halving import Trial, mean_loss

_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Place:
    """A depth, by its best candidate at the end of the last rung.

    Attributes:
      candidate: the best.
      trial: its last one.
      loss: held-out, the weighted mean over episodes.
      ratio: to the loss of the whole model's best.
      interval: 95 % of the ratio, by a paired bootstrap over held-out episodes.
      chosen: share of the resamples in which the rule takes this depth.
    """

    candidate: Candidate
    trial: Trial
    loss: float
    ratio: float
    interval: tuple[float, float]
    chosen: float

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "depth": self.candidate.depth,
            "candidate": self.candidate.name,
            "criteria": list(self.candidate.criteria),
            "peak_lr": self.candidate.peak_lr,
            "steps": self.trial.steps,
            "held_out_loss": self.loss,
            "ratio_to_full": self.ratio,
            "interval_95": list(self.interval),
            "chosen_in": self.chosen,
        }


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What to do.

    Attributes:
      places: one of each depth that did not diverge, in the order in which they were given.
      best: the depth to take.
    """

    places: list[Place]
    best: Place


def judge(
    candidates: Mapping[str, Candidate],
    trials: Sequence[Trial],
    weights: Sequence[float],
    seconds: Mapping[str, float],
    *,
    tolerance: float,
    seed: int = 0,
) -> Verdict:
    """Take the fastest depth whose loss is at most ``1 + tolerance`` times the whole model's.

    Args:
      candidates: by name.
      trials: those of the last rung, one of the whole model's among them that did not diverge.
      weights: of the held-out episodes.
      seconds: by depth, what a training step takes, by which depths are ordered.
      tolerance: how much more loss is worth the speed.
      seed: of the bootstrap over episodes.
    """
    best: dict[str, Trial] = {}
    for trial in trials:
        depth, mean = candidates[trial.candidate].depth, mean_loss(trial.losses, weights)
        if math.isfinite(mean) and (depth not in best or mean < mean_loss(best[depth].losses, weights)):
            best[depth] = trial
    depths, losses = list(best), np.array([trial.losses for trial in best.values()])
    weight = np.asarray(weights, float)
    rows = np.random.default_rng(seed).integers(0, len(weight), (_RESAMPLES, len(weight)))
    drawn = (losses[:, rows] * weight[rows]).sum(-1) / weight[rows].sum(-1)  # [depth, resample]
    full = depths.index(FULL)
    ratios = drawn / drawn[full]
    order = sorted(range(len(depths)), key=lambda number: seconds[depths[number]])

    def taken(ratio: np.ndarray) -> int:
        return next((number for number in order if ratio[number] <= 1 + tolerance), full)

    chosen = np.bincount([taken(ratio) for ratio in ratios.T], minlength=len(depths)) / _RESAMPLES
    means = np.array([mean_loss(trial.losses, weights) for trial in best.values()])
    places = [
        Place(
            candidates[trial.candidate],
            trial,
            float(means[number]),
            float(means[number] / means[full]),
            (float(np.quantile(ratios[number], 0.025)), float(np.quantile(ratios[number], 0.975))),
            float(chosen[number]),
        )
        for number, trial in enumerate(best.values())
    ]
    return Verdict(places, places[taken(means / means[full])])
