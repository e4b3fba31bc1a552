"""Flags that say how data become a model's inputs, shared by the commands that take ``--data``."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from clp_jax.checkpoint.orbax.spec import POLICY
from clp_jax.commands.conventions import choose_conventions, robot_told, told_by
from clp_jax.commands.processing_flags import ProcessingFlags
from clp_jax.data import TrainingData, open_dataset
from clp_jax.data.lerobot_meta import find_folder, lerobot_home
from clp_jax.data.recordings import checked_sources
from clp_jax.errors import InputError
from clp_jax.folders import files_below
from clp_jax.models import Architecture, configurations, family_of
from clp_jax.processing import norm_stats
from clp_jax.processing.modality import names_parts
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.robots import Robot, with_modality


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObservationFlags:
    """Which value of a robot is what."""

    openpi_config: str | None = None
    """Name of openpi's training configuration, such as pi0_libero or pi05_droid: robot, actions of a chunk, prompt and
    name of the statistics are its."""
    data_config: str | None = None
    """Name of Isaac-GR00T's data configuration, such as so100 or fourier_gr1_arms_only, for a set with
    meta/modality.json: parts and cameras, their normalisation and rotations, crop and prompt are its."""
    robot: str | None = None
    """Robot of a LeRobot data set: libero, aloha, aloha-sim, droid, metaworld, or a .json file."""
    image: tuple[str, ...] = ()
    """camera=key pairs on top of the robot's, e.g. base_0_rgb=observation.images.top."""
    state_key: tuple[str, ...] = ()
    """The state's parts instead of the robot's: keys of columns, or some dimensions of them as 'key[0:7]' 'key[14]'."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobotFlags(ObservationFlags):
    """Which column of a LeRobot data set is what."""

    action_key: tuple[str, ...] = ()
    """The actions' parts instead of the robot's, as for --state-key."""
    episodes: tuple[str, ...] = ()
    """Episodes to keep, 0:100,120 (100 is one past the last), or to leave out, '!17,23'; one text for each data set."""
    timestamp_tolerance: float | None = None
    """Seconds by which the time between two rows may differ from one period; 1e-4 s or 1 % of a period if absent."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureFlags(RobotFlags):
    """How several data sets are one."""

    weights: tuple[float, ...] = ()
    """How often each of several data sets is drawn, e.g. 2 1; if absent every observation as often as another."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFlags(MixtureFlags, ProcessingFlags):
    """How rows of a LeRobot data set become a model's inputs; a .npz of model-ready observations needs none."""


def open_data(
    flags: DataFlags,
    source: str | Sequence[str],
    architecture: Architecture,
    *,
    assets: epath.Path | None,
    hold_out_ratio: float,
    seed: int,
    stats: Mapping[str, NormStats] | None = None,
    record: Mapping[str, Any] | None = None,
    new_run: bool = False,
) -> TrainingData:
    """Open ``--data`` for a checkpoint.

    Args:
      flags: of the command.
      source: ``.npz``, LeRobot folder or hub id, or several.
      architecture: of the checkpoint.
      assets: the checkpoint's ``assets`` folder, if it has one.
      hold_out_ratio: share of the episodes kept apart.
      seed: of their choice.
      stats: to normalise with, whatever the flags say.
      record: the checkpoint's ``clp.json``, whose conventions hold; or on a resumption the run's own.
      new_run: whether a training begins, which may leave the conventions of the record.

    Raises:
      InputError: as `open_dataset` and `choose_conventions`; or several statistics in the checkpoint, of which none was
        chosen.
    """
    if checked_sources(source, flags.weights, flags.episodes)[0][0].endswith(".npz"):
        return _open_npz(flags, source, architecture, hold_out_ratio=hold_out_ratio, seed=seed, stats=stats)
    told = told_by(flags)
    chosen = choose_conventions(told, architecture, record, new_run=new_run)
    if chosen.conventions.robot is None and (file := robot_of_set(source)) is not None:
        told = dataclasses.replace(told, robot=file)
        chosen = choose_conventions(told, architecture, record, new_run=new_run)
    _check_readable(chosen.conventions.config)
    if (robot := chosen.conventions.robot) is not None:
        found = dataclasses.replace(chosen.conventions, robot=robot_in_set(robot, source))
        chosen = dataclasses.replace(chosen, conventions=found)
    asset_id, stats_file, computed = chosen.conventions.asset_id, None, stats is None
    if stats is None and flags.norm_stats not in (None, "data"):
        stats, stats_file = norm_stats.load(flags.norm_stats), flags.norm_stats
    elif stats is None and flags.norm_stats is None and assets is not None:
        stats, name = stats_of_checkpoint(assets, asset_id, architecture, chosen.conventions.robot)
        asset_id = name or asset_id
    conventions = dataclasses.replace(chosen.conventions, asset_id=asset_id)
    tokenizer = None
    if flags.tokenizer or flags.fast_tokenizer or conventions.robot is not None:
        tokenizer = load_tokenizer(flags, architecture, assets)
    data = open_dataset(
        source,
        architecture,
        **{field.name: getattr(conventions, field.name) for field in dataclasses.fields(conventions)},
        weights=flags.weights,
        episodes=flags.episodes,
        tokenizer=tokenizer,
        norm_stats=stats,
        long_prompts=flags.long_prompts,
        hold_out_ratio=hold_out_ratio,
        seed=seed,
        stats_file=stats_file,
        tolerance=flags.timestamp_tolerance,
    )
    assert data.conventions is not None
    used = dataclasses.replace(chosen, conventions=data.conventions)
    for note in (*([str(used)] if computed and chosen.assumed else ()), *data.notes):
        print(f"note: {note}", file=sys.stderr)
    return data


def _open_npz(
    flags: DataFlags,
    source: str | Sequence[str],
    architecture: Architecture,
    *,
    hold_out_ratio: float,
    seed: int,
    stats: Mapping[str, NormStats] | None,
) -> TrainingData:
    """Model-ready observations, which no convention can change any more."""
    told, first = told_by(flags), source if isinstance(source, str) else source[0]
    if told.configuration is not None:
        flag = "--openpi-config" if told.openpi_config is not None else "--data-config"
        raise InputError(f"{first} is model-ready: {flag} cannot change what it holds.")
    if stats is None and flags.norm_stats not in (None, "data"):
        stats = norm_stats.load(flags.norm_stats)
    return open_dataset(
        source,
        architecture,
        weights=flags.weights,
        episodes=flags.episodes,
        robot=robot_told(told, architecture),
        tokenizer=flags.tokenizer or flags.fast_tokenizer,
        norm_stats=stats,
        asset_id=told.asset_id,
        action_horizon=told.action_horizon,
        max_token_len=told.max_token_len,
        state_in_prompt=told.state_in_prompt,
        prompt=told.prompt,
        long_prompts=flags.long_prompts,
        hold_out_ratio=hold_out_ratio,
        seed=seed,
    )


def _check_readable(config: str | None) -> None:
    """Raise where openpi trains a configuration from files that nothing here reads."""
    found = None if config is None else configurations().get(config)
    if found is not None and (form := found.trained_from) != "lerobot":
        raise InputError(
            f"openpi trains {config} from {form.upper()} files, which clp_jax does not read; with --openpi-config "
            f"{config} checkpoints are served and exported only. For a LeRobot data set give --robot FILE.json."
        )


def load_tokenizer(flags: ProcessingFlags, architecture: Architecture, assets: epath.Path | None) -> Any:
    """The tokenizer of a model, of the flags where they name one.

    Args:
      flags: of the command.
      architecture: of the checkpoint.
      assets: the checkpoint's ``assets`` folder, if it has one.

    Raises:
      InputError: there is none, or one of actions was given for a model whose actions are no tokens.
    """
    given = {} if flags.fast_tokenizer is None else {"fast_tokenizer": flags.fast_tokenizer}
    if given and architecture.action_dim is not None:
        raise InputError(
            f"--fast-tokenizer is not for a {architecture.kind}, whose actions are no tokens; leave it out."
        )
    return family_of(architecture).load_tokenizer(architecture, flags.tokenizer, assets, **given)


def robot_of_set(source: str | Sequence[str]) -> str | None:
    """``meta/modality.json`` of a data set, of the first of several, if it has one; nothing is fetched for it."""
    first = source if isinstance(source, str) else source[0]
    folders = Path(first).expanduser(), lerobot_home() / first
    found = next((file for folder in folders if (file := folder / "meta" / "modality.json").is_file()), None)
    return None if found is None else str(found)


def robot_in_set(robot: Robot, source: str | Sequence[str]) -> Robot:
    """The robot with columns of the data set, of the first of several, where it names parts of ``meta/modality.json``.

    Raises:
      InputError: the set has no such file, or it lacks a part.
    """
    if not names_parts(robot.images, robot.columns):
        return robot
    first = source if isinstance(source, str) else source[0]
    file = find_folder(first) / "meta" / "modality.json"
    if not file.exists():
        raise InputError(
            f"{first} has no meta/modality.json, which says where {', '.join(robot.columns)} of robot {robot.name!r} "
            "are; write one as in Isaac-GR00T's examples, or leave out --data-config."
        )
    return with_modality(robot, file)


def stats_of_checkpoint(
    assets: epath.Path, asset_id: str | None, architecture: Architecture, robot: Robot | None = None
) -> tuple[dict[str, NormStats] | None, str | None]:
    """The checkpoint's statistics and their name; None if it has none of that name, or none at all.

    Those in the files of its own kind have no name: they are the checkpoint's if it has no others, whatever name they
    had before an export.

    Raises:
      InputError: it has several, and none was chosen.
    """
    found = named_stats(assets)
    if asset_id is None and len(found) > 1:
        raise InputError(
            f"the checkpoint has norm stats for {', '.join(sorted(found))}; choose one with --asset-id, or "
            "others with --norm-stats."
        )
    chosen = asset_id if asset_id is not None else next(iter(found), None)
    if chosen in found:
        return norm_stats.load(found[chosen]), chosen
    if found:
        return None, asset_id
    policy = assets / POLICY
    return family_of(architecture).norm_stats_of(policy if policy.is_dir() else assets, architecture, robot), None


def named_stats(assets: epath.Path) -> dict[str, epath.Path]:
    """The files of statistics in a checkpoint's ``assets`` folder, by their names."""
    files = [file for file in files_below(assets) if file.name == norm_stats.FILE]
    return {file.parent.relative_to(assets).as_posix(): file for file in files}
