"""One door to data: a ``.npz`` or a LeRobot data set in, batches and calibration observations out."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from clp_jax.data.calibration import CalibrationData, hold_out, load_npz
from clp_jax.data.loader import BatchIterator, Read
from clp_jax.data.recording import Recording, open_recording
from clp_jax.errors import InputError
from clp_jax.models import Architecture, Lengths, family_of
from clp_jax.models.family import LongPrompts, Processing
from clp_jax.processing.norm_stats import NormStats, check_spread, warning
from clp_jax.processing.robots import Robot

_NOT_IN_BATCHES = ("noise", "time", "episode_index")


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Observations on demand, split by whole episodes into those for training and those held out.

    Attributes:
      source: where it came from.
      architecture: of the model that reads it.
      read: the observations at these rows, by the keys of `calibration`.
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

    def __len__(self) -> int:
        return len(self.rows)

    def batches(
        self, batch_size: int, *, seed: int = 0, process_index: int = 0, process_count: int = 1, workers: int = 4
    ) -> BatchIterator:
        """Shuffled training batches without end; see `loader`.

        Args:
          batch_size: observations of a batch over all processes.
          seed: of the permutations.
          process_index: which share of each batch to read.
          process_count: how many shares there are.
          workers: threads that read ahead; 0 reads in the calling thread.

        Returns:
          An iterator with ``get_state`` and ``set_state``, which yields this process's rows of each batch by the
          keys of `calibration`, with ``action_is_pad`` bool [b, horizon] where there are actions.
        """

        def read(rows: np.ndarray) -> dict[str, np.ndarray]:
            batch = {key: value for key, value in self.read(rows).items() if key not in _NOT_IN_BATCHES}
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
        )

    def calibration(self, max_observations: int | None = None, *, seed: int = 0) -> CalibrationData:
        """Training observations in host memory: all, or a random choice of that many; in the source's order."""
        return self._take(self.rows, max_observations, seed)

    def held_out(self, max_observations: int | None = None, *, seed: int = 0) -> CalibrationData | None:
        """Observations of the held-out episodes, with fixed noise and time; None if none are held out."""
        return self._take(self.held, max_observations, seed) if len(self.held) else None

    def _take(self, rows: np.ndarray, most: int | None, seed: int) -> CalibrationData:
        if most is not None and most < 1:
            raise InputError(f"at most {most} observations are none; ask for at least one.")
        if most is not None and most < len(rows):
            rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
        arrays = self.read(rows)
        arrays["episode_index"] = self.episodes[rows]
        drawn = family_of(self.architecture).fixed_draw(self.architecture, arrays)
        return CalibrationData(drawn | arrays, self.fingerprint)


def open_dataset(
    source: str | os.PathLike[str],
    architecture: Architecture,
    *,
    robot: Robot | None = None,
    tokenizer: Any | None = None,
    norm_stats: Mapping[str, NormStats] | None = None,
    asset_id: str | None = None,
    action_horizon: int | None = None,
    max_token_len: int | None = None,
    state_in_prompt: bool | None = None,
    prompt: str | None = None,
    long_prompts: LongPrompts = "cut",
    hold_out_ratio: float = 0.0,
    seed: int = 0,
    stats_file: str | None = None,
    tolerance: float | None = None,
) -> TrainingData:
    """Open data for a model.

    Args:
      source: a ``.npz`` of model-ready observations, or a LeRobot data set: a local folder or a hub id.
      architecture: the model that will read it.
      robot: which column goes where; needed for a LeRobot data set.
      tokenizer: of the prompts; needed for a LeRobot data set.
      norm_stats: of ``state`` and ``actions``; computed from the data set if None. A ``.npz`` is normalised already and
        only passes them on.
      asset_id: where they belong in a checkpoint; by default the hub id, or the folder's name.
      action_horizon: actions of a chunk; the model's, or upstream's for its kind, if None.
      max_token_len: tokens of a prompt, padding included; likewise.
      state_in_prompt: whether the prompt spells the state; upstream's rule for the kind of model if None.
      prompt: for every observation, instead of the data set's tasks.
      long_prompts: what becomes of prompts with more tokens: cut as upstream does, and noted, or an error.
      hold_out_ratio: share of the episodes kept apart, in [0, 1).
      seed: of the choice of these episodes.
      stats_file: where the user's ``norm_stats`` are from, which must then have a spread in all dimensions used.
      tolerance: seconds by which the time between two rows may differ from one period; see `proof.prove`.

    Raises:
      InputError: what is needed is missing or does not fit; one line that names it.
    """
    if str(source).endswith(".npz"):
        robot_only = {
            "a robot": robot,
            "a tokenizer": tokenizer,
            "--action-horizon": action_horizon,
            "--max-token-len": max_token_len,
            "--state-in-prompt": state_in_prompt,
            "--prompt": prompt,
            "--long-prompts": None if long_prompts == "cut" else long_prompts,
        }
        given = [name for name, value in robot_only.items() if value is not None]
        if given:
            raise InputError(f"{source} is model-ready: {' and '.join(given)} cannot change what it holds.")
        return _of_npz(str(source), architecture, norm_stats, asset_id, hold_out_ratio, seed)
    if robot is None:
        raise InputError(f"{source} is a LeRobot data set: say which robot it is of (--robot).")
    family = family_of(architecture)
    lengths = chosen_lengths(architecture, action_horizon, max_token_len)
    recorded = open_recording(source, robot, tolerance=tolerance)
    processing = family.processing(
        architecture,
        recorded.robot,
        recorded.norm_stats(lengths.horizon) if norm_stats is None else norm_stats,
        family.load_tokenizer(architecture, None, None) if tokenizer is None else tokenizer,
        lengths,
        state_in_prompt=state_in_prompt,
    )
    notes = (
        *_notes_on_spread(recorded, processing, stats_file),
        *_notes_on_prompts(recorded.over_long(processing, prompt), long_prompts),
    )
    rows, held = hold_out(recorded.episodes, hold_out_ratio, seed=seed)
    return TrainingData(
        source=str(source),
        architecture=architecture,
        read=recorded.reader(processing, prompt),
        episodes=recorded.episodes,
        rows=rows,
        held=held,
        cameras=processing.cameras,
        action_dim=processing.action_dim,
        norm_stats=processing.norm_stats,
        asset_id=asset_id or recorded.asset_id,
        fingerprint=recorded.fingerprint(),
        pictures=recorded.video_fingerprint(),
        notes=(*recorded.proof.notes, *notes),
    )


def _notes_on_spread(recorded: Recording, processing: Processing, stats_file: str | None) -> tuple[str, ...]:
    """Warns of dimensions that hardly vary; statistics of a file that the user gave must vary."""
    dims = {"state": recorded.state.shape[1], "actions": recorded.actions.shape[1]}
    if stats_file is not None:
        check_spread(processing.norm_stats, dims, source=stats_file, quantiles=processing.quantiles)
    found = warning(processing.norm_stats, dims, quantiles=processing.quantiles)
    return () if found is None else (found,)


def _notes_on_prompts(over_long: tuple[str, ...], long_prompts: LongPrompts) -> tuple[str, ...]:
    """Says, before a night of training, which prompts will be cut, or refuses them."""
    if not over_long:
        return ()
    more = f" (too long are {len(over_long)} prompts)" if len(over_long) > 1 else ""
    if long_prompts == "refuse":
        raise InputError(f"{over_long[0]}{more}; give a larger --max-token-len.")
    return (f"{over_long[0]}{more}: the rest is cut, as upstream does; a larger --max-token-len keeps it.",)


def chosen_lengths(architecture: Architecture, action_horizon: int | None, max_token_len: int | None) -> Lengths:
    """Chunk and prompt as given, else as the model has them.

    Raises:
      InputError: a length below one.
    """
    default = family_of(architecture).lengths(architecture)
    lengths = Lengths(
        default.horizon if action_horizon is None else action_horizon,
        default.prompt if max_token_len is None else max_token_len,
    )
    if min(lengths) < 1:
        raise InputError(
            f"chunks of {lengths.horizon} actions and prompts of {lengths.prompt} tokens cannot be; give at least 1."
        )
    return lengths


def _of_npz(
    source: str,
    architecture: Architecture,
    norm_stats: Mapping[str, NormStats] | None,
    asset_id: str | None,
    hold_out_ratio: float,
    seed: int,
) -> TrainingData:
    data = load_npz(source, architecture)
    rows, held = hold_out(data.episodes, hold_out_ratio, seed=seed)
    return TrainingData(
        source=source,
        architecture=architecture,
        read=lambda chosen: {key: value[chosen] for key, value in data.arrays.items()},
        episodes=data.episodes,
        rows=rows,
        held=held,
        cameras=data.cameras,
        action_dim=architecture.action_dim,
        norm_stats=norm_stats,
        asset_id=asset_id,
        fingerprint=data.fingerprint,
    )


def _action_is_pad(batch: Mapping[str, np.ndarray]) -> dict[str, Bool[np.ndarray, "b horizon"]]:
    """No action is padding unless the source says so."""
    if "action_is_pad" in batch or "actions" not in batch:
        return {}
    return {"action_is_pad": np.zeros(batch["actions"].shape[:2], bool)}
