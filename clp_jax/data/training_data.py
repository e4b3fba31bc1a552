"""Observations on demand: batches to train on, and observations in memory to measure with."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from clp_jax.data.calibration import CalibrationData
from clp_jax.data.loader import BatchIterator, Read
from clp_jax.errors import InputError
from clp_jax.models import Architecture, family_of
from clp_jax.processing.conventions import Conventions
from clp_jax.processing.norm_stats import NormStats
from clp_jax.progress import stage


class Video(NamedTuple):
    """Pictures of a camera: height and width in pixels, and how many a second."""

    height: int
    width: int
    fps: float


_NOT_IN_BATCHES = ("noise", "time", "episode_index")
_READ_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Observations on demand, split by whole episodes into those for training and those held out.

    Attributes:
      source: where it came from.
      architecture: of the model that reads it.
      read: the observations at these rows, by the keys of `calibration`.
      read_whole: the same for augmentation, which chooses a part of each image itself; None where it is `read`.
      episodes: the episode of each row of the source [n].
      rows: the rows for training, `len` of them.
      held: the rows held out, perhaps none.
      cameras: those of the model that some observation has, in its order.
      action_dim: dimensions of the robot's actions; those of the model's for a ``.npz``, None if it has none.
      norm_stats: what states and actions were normalised with, by name; None if they are stored that way.
      asset_id: where the statistics belong in a checkpoint: ``assets/<asset_id>/norm_stats.json``.
      fingerprint: identity of the rows and texts.
      pictures: identity of the videos or pictures, None for a ``.npz``.
      notes: what is odd about the data, one sentence each, for the user to see.
      shares: of a mixture, how many of ``rows`` are each set's, one set after the other, and its weight in the draws;
        empty where every row is drawn as often as another.
      held_shares: the same of ``held``; weights are the numbers of rows where every row is drawn as often.
      conventions: what the observations were made with; its robot is None for a ``.npz``.
      videos: per camera what its pictures are in the data set; empty for a ``.npz``.
      files: without which a model trained on it means nothing, by their names in a checkpoint's assets.
    """

    source: str
    architecture: Architecture
    read: Read
    episodes: Int[np.ndarray, " n"]
    rows: Int[np.ndarray, " r"]
    held: Int[np.ndarray, " h"]
    cameras: tuple[str, ...]
    action_dim: int | None
    norm_stats: Mapping[str, NormStats] | None
    asset_id: str | None
    fingerprint: str
    pictures: str | None = None
    notes: tuple[str, ...] = ()
    shares: tuple[tuple[int, float], ...] = ()
    held_shares: tuple[tuple[int, float], ...] = ()
    conventions: Conventions | None = None
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    read_whole: Read | None = None
    videos: Mapping[str, Video] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 4,
        augmented: bool = False,
    ) -> BatchIterator:
        """Shuffled training batches without end; see `loader`.

        Args:
          batch_size: observations of a batch over all processes.
          seed: of the permutations.
          process_index: which share of each batch to read.
          process_count: how many shares there are.
          workers: threads that read ahead; 0 reads in the calling thread.
          augmented: whether the images will be augmented.

        Returns:
          An iterator with ``get_state`` and ``set_state``, which yields this process's rows of each batch by the
          keys of `calibration`, with ``action_is_pad`` bool [b, horizon] where there are actions.
        """
        source = self.read_whole if augmented and self.read_whole is not None else self.read

        def read(rows: np.ndarray) -> dict[str, np.ndarray]:
            batch = {key: value for key, value in source(rows).items() if key not in _NOT_IN_BATCHES}
            return batch | _action_is_pad(batch)

        return BatchIterator(
            read,
            self.rows,
            batch_size,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
            workers=workers,
            fingerprint=self.fingerprint,
            shares=self.shares,
        )

    def calibration(self, max_observations: int | None = None, *, seed: int = 0) -> CalibrationData:
        """Training observations in host memory: all, or a random choice of that many; in the source's order.

        A choice from a mixture takes rows as often as training draws them.
        """
        return self._take(self.rows, max_observations, seed, _odds(self.shares))

    def held_out(self, max_observations: int | None = None, *, seed: int = 0) -> CalibrationData | None:
        """Observations of the held-out episodes, with fixed noise and time; None if none are held out.

        A choice from a mixture takes rows as often as training draws them.
        """
        if not len(self.held):
            return None
        return self._take(self.held, max_observations, seed, _odds(self.held_shares))

    def held_out_sets(self, max_observations: int) -> dict[int, tuple[float, CalibrationData]]:
        """Held-out observations of each set of a mixture, with its weight in the draws; one set is number 0.

        Args:
          max_observations: of all sets together, as many of one as of another, but one of each at least.

        Returns:
          By the number of the set, without those that hold no episode out.
        """
        shares = self.held_shares or ((len(self.held), 1.0),)
        parts = np.split(self.held, np.cumsum([count for count, _ in shares])[:-1])
        most = max(max_observations // len(shares), 1) if max_observations > 0 else max_observations
        return {
            number: (weight, self._take(rows, most, seed=0))
            for number, (rows, (_, weight)) in enumerate(zip(parts, shares, strict=True))
            if len(rows)
        }

    def _take(
        self, rows: np.ndarray, most: int | None, seed: int, odds: Float[np.ndarray, " r"] | None = None
    ) -> CalibrationData:
        if most is not None and most < 1:
            raise InputError(f"at most {most} observations are none; ask for at least one.")
        if most is not None and most < len(rows):
            rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False, p=odds))
        arrays = self._read_all(rows)
        arrays["episode_index"] = self.episodes[rows]
        drawn = family_of(self.architecture).fixed_draw(self.architecture, arrays)
        return CalibrationData(drawn | arrays, self.fingerprint)

    def _read_all(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """As `read`, a few at a time, for decoding pictures takes a while."""
        parts = []
        with stage("reading", total=len(rows), unit="observations") as advance:
            for start in range(0, max(len(rows), 1), _READ_AT_ONCE):
                some = rows[start : start + _READ_AT_ONCE]
                parts.append(self.read(some))
                advance(len(some))
        return {key: np.concatenate([part.pop(key) for part in parts]) for key in list(parts[0])}


def _action_is_pad(batch: Mapping[str, np.ndarray]) -> dict[str, Bool[np.ndarray, "b horizon"]]:
    """No action is padding unless the source says so."""
    if "action_is_pad" in batch or "actions" not in batch:
        return {}
    return {"action_is_pad": np.zeros(batch["actions"].shape[:2], bool)}


def _odds(shares: Sequence[tuple[int, float]]) -> Float[np.ndarray, " r"] | None:
    """How often each row is drawn, None if all are drawn alike; a set without rows is left out."""
    shares = [(rows, weight) for rows, weight in shares if rows]
    if not shares:
        return None
    total = sum(weight for _, weight in shares)
    return np.concatenate([np.full(rows, weight / total / rows) for rows, weight in shares])


def mixed(sets: Sequence[TrainingData], weights: Sequence[float] = ()) -> TrainingData:
    """Several data sets as one.

    Args:
      sets: for the same model, with the same statistics.
      weights: how often each is drawn, in proportion; if none, every row is drawn as often as another.

    Raises:
      InputError: their observations differ in an array or its size.
    """
    starts = np.cumsum([0, *(len(part.episodes) for part in sets)])
    labels = np.cumsum([0, *(int(part.episodes.max()) + 1 for part in sets)])
    _check_alike(sets)

    def reader(reads: Sequence[Read]) -> Read:
        def read(rows: Int[np.ndarray, " b"]) -> dict[str, np.ndarray]:
            owners = np.searchsorted(starts, rows, side="right") - 1
            places = [np.flatnonzero(owners == number) for number in range(len(sets))]
            read = [reads[i](rows[place] - starts[i]) for i, place in enumerate(places) if len(place)]
            order = np.argsort(np.concatenate(places))
            return {key: np.concatenate([batch[key] for batch in read])[order] for key in read[0]}

        return read

    def joined(name: str, offsets: np.ndarray) -> Int[np.ndarray, " _"]:
        return np.concatenate([getattr(part, name) + offset for part, offset in zip(sets, offsets, strict=False)])

    pictures = [part.pictures for part in sets]
    held = [len(part.held) for part in sets]
    return dataclasses.replace(
        sets[0],
        source=" + ".join(part.source for part in sets),
        read=reader([part.read for part in sets]),
        read_whole=reader([part.read_whole or part.read for part in sets]),
        episodes=joined("episodes", labels),
        rows=joined("rows", starts),
        held=joined("held", starts),
        asset_id=sets[0].asset_id,
        fingerprint=_digest([part.fingerprint for part in sets]),
        pictures=None if None in pictures else _digest(pictures),
        notes=tuple(f"{part.source}: {note}" for part in sets for note in part.notes),
        shares=tuple((len(part.rows), weight) for part, weight in zip(sets, weights, strict=True)) if weights else (),
        held_shares=tuple(zip(held, weights or map(float, held), strict=True)),
    )


def _check_alike(sets: Sequence[TrainingData]) -> None:
    """Raise unless the sets' observations can be in one batch."""
    first, *others = [{key: array.shape[1:] for key, array in part.read(part.rows[:1]).items()} for part in sets]
    for part, shapes in zip(sets[1:], others, strict=True):
        for key in sorted(first.keys() | shapes.keys()):
            if first.get(key) != shapes.get(key):
                raise InputError(
                    f"{key} is {_shape(shapes.get(key))} in {part.source} and {_shape(first.get(key))} in "
                    f"{sets[0].source}; data sets of one run need the same arrays of the same sizes."
                )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape)) or "one value"


def _digest(parts: Sequence[str | None]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
