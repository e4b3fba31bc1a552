"""What one look at a model tells about its blocks: measured once, saved, and selected from as often as wanted."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from clp_jax import selection
from clp_jax.data import CalibrationData, arrange
from clp_jax.loading import LoadedModel, check_finite
from clp_jax.models import Gates, Tower
from clp_jax.plan import PrunePlan
from clp_jax.selection import Evidence, GateEvidence, Selection
from clp_jax.sensitivity import make_loss, measure_gates
from clp_jax.similarity import Estimator, Sampling, StateScale, TowerSimilarity, batches, collect
from clp_jax.stored_analysis import SCHEMA, read_stored

_ARRAYS = tuple(f.name for f in dataclasses.fields(TowerSimilarity) if f.name != "samples")
_GATES = tuple(f.name for f in dataclasses.fields(GateEvidence))


@dataclasses.dataclass(frozen=True)
class EvidenceOptions:
    """How matrices become evidence.

    Attributes:
      states: CKA of states as they are ("raw", the paper's) or RMS-normalised.
      estimator: "biased" (the paper's) or "debiased".
      couple: how towers that share a stack are joined: "mean", "min" (both must be similar), or one tower's name.
    """

    states: StateScale = "raw"
    estimator: Estimator = "biased"
    couple: str = "mean"


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The result of `analyse`.

    Attributes:
      kind: model kind.
      shape: the towers of the analysed model, those that were not measured included.
      groups: measured towers, those that are pruned together in one group; the most important group first.
      towers: similarity per measured tower.
      gates: loss derivatives per group of towers; empty if they were not measured.
      meta: JSON values: counts, fingerprints, settings.
    """

    kind: str
    shape: tuple[Tower, ...]
    groups: tuple[tuple[str, ...], ...]
    towers: dict[str, TowerSimilarity]
    gates: dict[tuple[str, ...], GateEvidence]
    meta: dict[str, Any]

    @property
    def depths(self) -> dict[str, int]:
        """Blocks per tower."""
        return {tower.name: tower.depth for tower in self.shape}

    @property
    def coupled(self) -> tuple[tuple[str, ...], ...]:
        """Towers that keep the same blocks."""
        return tuple(group for group in self.groups if len(group) > 1)

    def tower(self, name: str) -> Tower:
        """What is known about a tower without measuring it."""
        return next(tower for tower in self.shape if tower.name == name)

    def evidence(
        self,
        group: Sequence[str],
        options: EvidenceOptions = EvidenceOptions(),
        *,
        loss: Callable[[np.ndarray], float] | None = None,
        healed_loss: Callable[[np.ndarray], float] | None = None,
    ) -> Evidence:
        """Evidence about a group of towers on their shared block index."""
        parts = {name: self._tower_evidence(name, options) for name in group}
        how = options.couple if len(parts) > 1 else "mean"
        gates = self.gates.get(tuple(group))
        return selection.combine(parts, how=how, gates=gates, loss=loss, healed_loss=healed_loss)

    def _tower_evidence(self, name: str, options: EvidenceOptions) -> Evidence:
        tower, found = self.tower(name), self.towers[name].evidence(options.states, options.estimator)
        return dataclasses.replace(found, period=tower.period, protected=tower.protected)

    def plan(self, selections: dict[tuple[str, ...], Selection], criterion: str) -> PrunePlan:
        """The plan that applies one selection per group and leaves other towers whole."""
        keep = {name: chosen.keep for group, chosen in selections.items() for name in group}
        scores = {"+".join(group): chosen.to_json() for group, chosen in selections.items()}
        return PrunePlan.of(self.kind, self.depths, keep, coupled=self.coupled, criterion=criterion, scores=scores)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one ``.npz``: ``<tower>/<matrix>``, ``gates/<group>/<name>`` and ``meta`` as JSON."""
        arrays: dict[str, np.ndarray] = {}
        for name, tower in self.towers.items():
            arrays |= {f"{name}/{key}": getattr(tower, key) for key in _ARRAYS}
        for group, gates in self.gates.items():
            found = {key: getattr(gates, key) for key in _GATES}
            arrays |= {f"gates/{'+'.join(group)}/{key}": value for key, value in found.items() if value is not None}
        head = {
            "schema": SCHEMA,
            "kind": self.kind,
            "depths": self.depths,
            "coupled": self.coupled,
            "groups": self.groups,
            "towers": {tower.name: _rules(tower) for tower in self.shape},
            "samples": {name: tower.samples for name, tower in self.towers.items()},
            "meta": self.meta,
        }
        with epath.Path(path).open("wb") as stream:
            np.savez_compressed(stream, meta=np.array(json.dumps(head)), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Analysis":
        """Read what `save` wrote.

        Raises:
          InputError: not such a file.
        """
        head, arrays = read_stored(path)
        towers = {
            name: TowerSimilarity(**{key: arrays[f"{name}/{key}"] for key in _ARRAYS}, samples=samples)
            for name, samples in head["samples"].items()
        }
        groups = {key.split("/")[1] for key in arrays if key.startswith("gates/")}
        gates = {
            tuple(group.split("+")): GateEvidence(**{key: arrays.get(f"gates/{group}/{key}") for key in _GATES})
            for group in sorted(groups)
        }
        return cls(head["kind"], _shape(head), _groups(head), towers, gates, head["meta"])


def _rules(tower: Tower) -> dict[str, Any]:
    return {
        "period": tower.period,
        "protected": sorted(tower.protected),
        "incomparable": tower.incomparable,
        "optional": tower.optional,
    }


def _shape(head: dict[str, Any]) -> tuple[Tower, ...]:
    """The towers; files of 0.1 knew none with rules of their own."""
    rules = head.get("towers", {})

    def tower(name: str, depth: int) -> Tower:
        known = rules.get(name, {})
        known |= {
            "protected": frozenset(known.get("protected", ())),
            "incomparable": tuple(known.get("incomparable", ())),
        }
        return Tower(name, depth, **known)

    return tuple(tower(name, depth) for name, depth in head["depths"].items())


def _groups(head: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    """The measured groups; files of 0.1 named only those of several towers."""
    coupled = tuple(tuple(group) for group in head["coupled"])
    if "groups" in head:
        return tuple(tuple(group) for group in head["groups"])
    alone = (name for name in head["samples"] if not any(name in group for group in coupled))
    return coupled + tuple((name,) for name in sorted(alone, reverse=True))


def analyse(
    model: LoadedModel,
    data: CalibrationData,
    *,
    sampling: Sampling = Sampling(),
    group_size: int = 4,
    groups_per_batch: int = 1,
    gates: bool = True,
    gauss_newton: bool = True,
    seed: int = 0,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda batches, _: batches,
) -> Analysis:
    """Measure similarity and loss derivatives of a model on calibration data.

    Args:
      model: from ``load_model``.
      data: calibration observations, from ``load_npz``.
      sampling: what a CKA sample is.
      group_size: observations whose tokens form one HSIC estimate.
      groups_per_batch: groups of one forward pass, rounded up to a multiple of the number of devices.
      gates: also measure the derivatives of the criterion gateprobe: one backward pass.
      gauss_newton: and the curvature of the criterion gauss-newton: one forward-mode pass per block.
      seed: of the dealing of episodes into groups.
      progress: wraps the iterator of batches, of which there are so many.

    Raises:
      InputError: the checkpoint or the states are not finite, or there are too few samples.
    """
    check_finite(model.params)
    if sampling.samples == "tokens-per-observation":
        group_size = 1
    devices = math.prod(model.mesh.shape.values())
    per_batch = math.ceil(groups_per_batch / devices) * devices
    arrangement = arrange(data.episodes, group_size, seed=seed)
    stream = progress(batches(data, arrangement, per_batch, model.mesh), math.ceil(len(arrangement.slots) / per_batch))
    sampling = sampling.of(model.architecture)
    towers = collect(model.architecture, model.params, stream, arrangement, sampling, mesh=model.mesh)
    meta = {
        "observations": len(data),
        "episodes": len(np.unique(data.episodes)),
        "groups": len(arrangement.slots),
        "clusters": int(arrangement.cluster.max()) + 1,
        "data_fingerprint": data.fingerprint,
        "sampling": dataclasses.asdict(sampling) | {"group_size": group_size, "seed": seed},
        "dtype": model.architecture.dtype,
    }
    architecture = model.architecture
    groups = tuple(group for group in architecture.groups if all(name in towers for name in group))
    analysis = Analysis(architecture.kind, architecture.towers, groups, towers, {}, meta)
    if not gates:
        return analysis
    fixed = list(batches(data, arrangement, per_batch, model.mesh))
    measured = {
        group: measure_gates(model.architecture, model.params, fixed, group, gauss_newton=gauss_newton)
        for group in analysis.groups
    }
    return dataclasses.replace(analysis, gates=measured)


def loss_of(
    model: LoadedModel, data: CalibrationData, *, batch_size: int = 4, seed: int = 0
) -> Callable[[Gates], float]:
    """The model's mean loss on this data as a function of its gates; compiled once, batches of ``batch_size``."""
    devices = math.prod(model.mesh.shape.values())
    groups = math.ceil(batch_size / devices) * devices
    arrangement = arrange(data.episodes, 1, seed=seed)
    return make_loss(model.architecture, model.params, batches(data, arrangement, groups, model.mesh))
