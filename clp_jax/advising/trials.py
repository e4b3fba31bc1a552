"""One trial: a cut that is written once, trained for the steps of a rung, and measured on held-out episodes."""

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clp_jax.advising.candidates import FULL, Candidate
from clp_jax.advising.halving import Trial
from clp_jax.checkpoint import Spec, read_spec
from clp_jax.data import CalibrationData, TrainingData, arrange
from clp_jax.errors import InputError
from clp_jax.models import Architecture, Gates
from clp_jax.plan import PrunePlan
from clp_jax.progress import stage
from clp_jax.provenance import training_record
from clp_jax.prune import prune_checkpoint
from clp_jax.sensitivity import make_loss
from clp_jax.similarity import batches
from clp_jax.training import Diverged, Run, Steps, check_batch_size, train

_EVALUATED_AT_ONCE = 16


class Stopped(Exception):
    """A signal ended a trial, which is saved as far as it came."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out episodes.

    Attributes:
      episodes: the observations of each.
      weights: of each, in the mean.
    """

    episodes: list[CalibrationData]
    weights: list[float]

    @classmethod
    def of(cls, data: TrainingData, most: int) -> "HeldOut":
        """At most so many observations of the episodes that are held out.

        Raises:
          InputError: these are of fewer than two episodes.
        """
        episodes, weights = [], []
        for share, one in data.held_out_sets(most).values():
            for number in np.unique(one.episodes):
                rows = np.flatnonzero(one.episodes == number)
                episodes.append(one.take(rows))
                weights.append(share * len(rows) / len(one))
        if len(episodes) < 2:
            raise InputError(
                f"{len(episodes)} held-out episodes are measured, and an uncertainty needs two at least: give data of "
                "more episodes, or a larger --holdout-ratio or --evaluate-observations."
            )
        return cls(episodes, weights)

    def losses(self, architecture: Architecture, params: Any, mesh: jax.sharding.Mesh) -> tuple[float, ...]:
        """Of each episode."""
        devices = jax.device_count()
        batch_size = devices * max(1, _EVALUATED_AT_ONCE // devices)

        def one(data: CalibrationData) -> float:
            return make_loss(architecture, params, batches(data, arrange(data.episodes, 1), batch_size, mesh))(Gates())

        return tuple(one(data) for data in self.episodes)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Runs trials.

    Attributes:
      folder: for cuts and for the state of the run that is under way.
      spec: the checkpoint.
      architecture: of its model.
      data: to train on.
      held: to measure on.
      mesh: devices.
      settings: how an architecture is trained for so many steps, from (candidate, architecture, steps).
      steps: by depth, those of the last rung.
      rungs: how many there are; each has twice the steps of the one before, and begins from the checkpoint.
      entry: what was read and asked, for the record.
    """

    folder: Path
    spec: Spec
    architecture: Architecture
    data: TrainingData
    held: HeldOut
    mesh: jax.sharding.Mesh
    settings: Callable[[Candidate, Architecture, int], Run]
    steps: Mapping[str, int]
    rungs: int
    entry: Mapping[str, Any]

    def measure(self, candidate: Candidate, rung: int) -> Trial:
        """Train a candidate for the steps of a rung, and its losses at their end: NaN where it diverges before.

        A run that a signal ended goes on where it was; what it saved stays until `forget`.

        Raises:
          Stopped: by a signal.
        """
        spec, architecture = self._cut(candidate), smaller(self.architecture, candidate.plan)
        steps = max(round(self.steps[candidate.depth] / 2 ** (self.rungs - 1 - rung)), 1)
        run = self.settings(candidate, architecture, steps)
        check_batch_size(run, self.mesh)
        saved = Steps(self._run(candidate, rung), write_assets=_none)
        plan = PrunePlan.of(architecture.kind, architecture.depths, coupled=architecture.coupled)
        done = 0 if saved.latest is None else saved.latest + 1
        try:
            with stage(candidate.name, total=max(steps - done, 0), unit="steps") as advance:
                report = train(
                    spec,
                    architecture,
                    self.data,
                    run,
                    saved,
                    mesh=self.mesh,
                    record=lambda training: training_record(spec.plan_record, plan, self.entry, training).to_json(),
                    log=_Counted(advance, done),
                )
        except Diverged:
            saved.close()
            return Trial(candidate.name, rung, steps, (math.nan,) * len(self.held.episodes))
        saved.close()
        if report.done < steps:
            raise Stopped
        params = report.state.params if report.state.ema_params is None else report.state.ema_params
        return Trial(candidate.name, rung, steps, self.held.losses(architecture, params, self.mesh))

    def forget(self, candidate: Candidate, rung: int) -> None:
        """Remove what the run of a rung saved, once its trial is written down."""
        shutil.rmtree(self._run(candidate, rung), ignore_errors=True)

    def _run(self, candidate: Candidate, rung: int) -> Path:
        """The folder of a rung's run: each has its own, so that none goes on with the state of another."""
        return self.folder / "runs" / f"{candidate.name}-rung-{rung + 1}"

    def _cut(self, candidate: Candidate) -> Spec:
        """The pruned checkpoint of a candidate."""
        if candidate.depth == FULL:
            return self.spec
        out = self.folder / "cuts" / candidate.cut
        if not out.exists():
            prune_checkpoint(self.spec, candidate.plan, out)
        return read_spec(str(out))


def smaller(architecture: Architecture, plan: PrunePlan) -> Architecture:
    """The architecture of a cut."""
    return architecture.with_depths({name: len(tower.keep) for name, tower in plan.towers.items()})


def _none(folder: Any) -> None:
    """A trial's steps are for going on with, and need no files beside their arrays."""


class _Counted:
    """The log of a trial: nobody reads its values, but its steps are counted."""

    def __init__(self, advance: Callable[[int], None], done: int):
        self._advance, self._done = advance, done

    def __call__(self, step: int, _: Mapping[str, float]) -> None:
        self._advance(step + 1 - self._done)
        self._done = step + 1
