"""One door to data: a ``.npz`` or a LeRobot data set in, batches and calibration observations out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from clp_jax.data.calibration import hold_out, load_npz
from clp_jax.data.episodes import chosen as chosen_episodes
from clp_jax.data.recording import Recording
from clp_jax.data.recordings import Sources, checked_sources, open_recordings
from clp_jax.data.training_data import TrainingData, mixed
from clp_jax.errors import InputError
from clp_jax.models import Architecture, Lengths, family_of
from clp_jax.models.family import LongPrompts, Processing
from clp_jax.processing.conventions import Conventions
from clp_jax.processing.norm_stats import NormStats, check_spread, warning
from clp_jax.processing.robots import Robot


def open_dataset(
    source: Sources,
    architecture: Architecture,
    *,
    weights: Sequence[float] = (),
    episodes: Sequence[str] = (),
    robot: Robot | None = None,
    tokenizer: Any | None = None,
    norm_stats: Mapping[str, NormStats] | None = None,
    asset_id: str | None = None,
    action_horizon: int | None = None,
    max_token_len: int | None = None,
    state_in_prompt: bool | None = None,
    config: str | None = None,
    prompt: str | None = None,
    long_prompts: LongPrompts = "cut",
    hold_out_ratio: float = 0.0,
    seed: int = 0,
    stats_file: str | None = None,
    tolerance: float | None = None,
) -> TrainingData:
    """Open data for a model.

    Args:
      source: a ``.npz`` of model-ready observations, or a LeRobot data set: a local folder or a hub id. Or several, all
        of one form and of one robot.
      architecture: the model that will read it.
      weights: how often each of several is drawn, in proportion; if none, every observation as often as another.
      episodes: for each source which episodes to keep or leave out, as `episodes.chosen` reads it; if none, all stay.
      robot: which column goes where; needed for a LeRobot data set.
      tokenizer: of the prompts; needed for a LeRobot data set.
      norm_stats: of ``state`` and ``actions``; computed from the data sets together, each as often as it is drawn, if
        None. A ``.npz`` is normalised already and only passes them on.
      asset_id: where they belong in a checkpoint; by default the hub id or the folder's name, "+" between several.
      action_horizon: actions of a chunk; the model's, or upstream's for its kind, if None.
      max_token_len: tokens of a prompt, padding included; likewise.
      state_in_prompt: whether the prompt spells the state; upstream's rule for the kind of model if None.
      config: name of upstream's configuration that says all this, for the record.
      prompt: for every observation, instead of the data set's tasks.
      long_prompts: what becomes of prompts with more tokens: cut as upstream does, and noted, or an error.
      hold_out_ratio: share of the episodes of each source kept apart, in [0, 1).
      seed: of the choice of these episodes.
      stats_file: where the user's ``norm_stats`` are from, which must then have a spread in all dimensions used.
      tolerance: seconds by which the time between two rows may differ from one period; see `proof.prove`.

    Raises:
      InputError: what is needed is missing or does not fit; one line that names it.
    """
    chosen = checked_sources(source, weights, episodes)
    first = chosen[0][0]
    if first.endswith(".npz"):
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
            raise InputError(f"{first} is model-ready: {' and '.join(given)} cannot change what it holds.")
        sets = [_of_npz(path, architecture, text, norm_stats, asset_id, hold_out_ratio, seed) for path, text in chosen]
        return sets[0] if len(sets) == 1 else mixed(sets, weights)
    if robot is None:
        raise InputError(f"{first} is a LeRobot data set: say which robot it is of (--robot or --openpi-config).")
    family = family_of(architecture)
    lengths = chosen_lengths(architecture, action_horizon, max_token_len, cameras=len(robot.images))
    if prompt is not None:
        robot = dataclasses.replace(robot, prompt=prompt, prompt_from_task=False)
    recordings = open_recordings(source, robot, weights=weights, episodes=episodes, tolerance=tolerance)
    processing = family.processing(
        architecture,
        recordings.robot,
        recordings.norm_stats(lengths.horizon) if norm_stats is None else norm_stats,
        family.load_tokenizer(architecture, None, None) if tokenizer is None else tokenizer,
        lengths,
        state_in_prompt=state_in_prompt,
    )
    notes = (*_notes_on_spread(recordings.each[0], processing, stats_file), *recordings.notes)
    asset_id = asset_id or recordings.asset_id
    used = Conventions(recordings.robot, *lengths, processing.state_in_prompt, asset_id, config)
    sets = []
    for recorded in recordings.each:
        own = (*recorded.proof.notes, *_notes_on_prompts(recorded.over_long(processing), long_prompts))
        split = hold_out(recorded.episodes, hold_out_ratio, seed=seed)
        sets.append(_of_recording(recorded, architecture, processing, used, split, own))
    data = sets[0] if len(sets) == 1 else mixed(sets, weights)
    return dataclasses.replace(data, notes=(*data.notes, *notes))


def _of_recording(
    recorded: Recording,
    architecture: Architecture,
    processing: Processing,
    conventions: Conventions,
    split: tuple[Int[np.ndarray, " r"], Int[np.ndarray, " h"]],
    notes: tuple[str, ...],
) -> TrainingData:
    """One LeRobot data set as the model reads it; split are the rows for training and those held out."""
    whole = processing.for_augmentation()
    return TrainingData(
        source=recorded.source,
        architecture=architecture,
        read=recorded.reader(processing),
        read_whole=None if whole is processing else recorded.reader(whole),
        episodes=recorded.episodes,
        rows=split[0],
        held=split[1],
        cameras=processing.cameras,
        action_dim=processing.action_dim,
        norm_stats=processing.norm_stats,
        asset_id=conventions.asset_id,
        fingerprint=recorded.fingerprint(),
        pictures=recorded.video_fingerprint(),
        notes=notes,
        conventions=conventions,
        files=processing.files,
        videos=recorded.videos(),
    )


def _notes_on_spread(recorded: Recording, processing: Processing, stats_file: str | None) -> tuple[str, ...]:
    """Warns of dimensions that hardly vary; statistics of a file that the user gave must vary."""
    dims = {"state": recorded.state.shape[1], "actions": recorded.actions.shape[1]}
    if stats_file is not None:
        check_spread(processing.norm_stats, dims, source=stats_file, by=processing.normalised_by)
    found = warning(processing.norm_stats, dims, by=processing.normalised_by)
    return () if found is None else (found,)


def _notes_on_prompts(over_long: tuple[str, ...], long_prompts: LongPrompts) -> tuple[str, ...]:
    """Says, before a night of training, which prompts will be cut, or refuses them."""
    if not over_long:
        return ()
    first, *others = over_long
    more = f" (too long are {len(over_long)} prompts)" if others else ""
    if long_prompts == "refuse":
        raise InputError(f"{first}{more}; give a larger --max-token-len.")
    return (f"{first}{more}: the rest is cut, as upstream does; a larger --max-token-len keeps it.",)


def chosen_lengths(
    architecture: Architecture, action_horizon: int | None, max_token_len: int | None, *, cameras: int | None = None
) -> Lengths:
    """Chunk and prompt as given, else as the model has them with so many cameras.

    Raises:
      InputError: a length below one.
    """
    default = family_of(architecture).lengths(architecture, cameras)
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
    episodes: str | None,
    norm_stats: Mapping[str, NormStats] | None,
    asset_id: str | None,
    hold_out_ratio: float,
    seed: int,
) -> TrainingData:
    data = load_npz(source, architecture)
    if episodes is not None:
        kept = chosen_episodes(episodes, np.unique(data.episodes).tolist())
        data = data.take(np.flatnonzero(np.isin(data.episodes, sorted(kept))))
    rows, held = hold_out(data.episodes, hold_out_ratio, seed=seed)
    horizon, prompt = data.lengths
    horizon = horizon or family_of(architecture).lengths(architecture).horizon  # tokens have none
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
        conventions=Conventions(None, horizon, prompt, asset_id=asset_id),
    )
