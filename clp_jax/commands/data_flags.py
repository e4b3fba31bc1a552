"""Flags that say how data become a model's inputs, shared by the commands that take ``--data``."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence

from etils import epath

from clp_jax.checkpoint.orbax.spec import POLICY
from clp_jax.commands.processing_flags import ProcessingFlags
from clp_jax.data import TrainingData, open_dataset
from clp_jax.data.recordings import checked_sources
from clp_jax.errors import InputError
from clp_jax.folders import files_below
from clp_jax.models import Architecture, family_of, robots
from clp_jax.processing import norm_stats
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.robots import Robot, find_robot


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObservationFlags:
    """Which value of a robot is what."""

    robot: str | None = None
    """Robot of a LeRobot data set: libero, aloha, aloha-sim, droid, metaworld, or a .json file."""
    image: tuple[str, ...] = ()
    """camera=key pairs on top of the robot's, e.g. base_0_rgb=observation.images.top."""
    state_key: tuple[str, ...] = ()
    """The state's parts instead of the robot's: keys of columns, or some dimensions of them as 'key[0:7]' 'key[14]'."""

    def find_robot(self, architecture: Architecture | None) -> Robot | None:
        """The robot; None if neither a flag nor the checkpoint says anything about one.

        Args:
          architecture: of the checkpoint; without one, no camera is checked.
        """
        return self._robot_with((), architecture)

    def names_robot(self) -> bool:
        """Whether a flag says something about a robot."""
        return bool(self.robot or self.image or self.state_key or getattr(self, "action_key", ()))

    def _robot_with(self, actions: tuple[str, ...], architecture: Architecture | None) -> Robot | None:
        own = None if architecture is None else family_of(architecture).own_robot(architecture)
        if not self.names_robot():
            return own
        known = robots() if architecture is None else family_of(architecture).ROBOTS
        cameras = None if architecture is None else family_of(architecture).camera_names(architecture)
        return find_robot(
            self.robot, known, cameras=cameras, start=own, images=self.image, state=self.state_key, actions=actions
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobotFlags(ObservationFlags):
    """Which column of a LeRobot data set is what."""

    action_key: tuple[str, ...] = ()
    """The actions' parts instead of the robot's, as for --state-key."""
    episodes: tuple[str, ...] = ()
    """Episodes to keep, 0:100,120 (100 is one past the last), or to leave out, '!17,23'; one text for each data set."""
    timestamp_tolerance: float | None = None
    """Seconds by which the time between two rows may differ from one period; 1e-4 s or 1 % of a period if absent."""

    def find_robot(self, architecture: Architecture | None) -> Robot | None:
        """As `ObservationFlags.find_robot`, with the parts of the actions."""
        return self._robot_with(self.action_key, architecture)


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

    Raises:
      InputError: as `open_dataset`; or several statistics in the checkpoint, of which none was chosen.
    """
    ready = checked_sources(source, flags.weights, flags.episodes)[0][0].endswith(".npz")
    robot = None if ready and not flags.names_robot() else flags.find_robot(architecture)
    asset_id = flags.asset_id
    stats_file = None
    if stats is None and flags.norm_stats not in (None, "data"):
        stats, stats_file = norm_stats.load(flags.norm_stats), flags.norm_stats
    elif stats is None and flags.norm_stats is None and not ready and assets is not None:
        stats, asset_id = stats_of_checkpoint(assets, flags.asset_id, architecture)
    wants_tokenizer = flags.tokenizer is not None or (robot is not None and not ready)
    data = open_dataset(
        source,
        architecture,
        weights=flags.weights,
        episodes=flags.episodes,
        robot=robot,
        tokenizer=family_of(architecture).load_tokenizer(architecture, flags.tokenizer, assets)
        if wants_tokenizer
        else None,
        norm_stats=stats,
        asset_id=asset_id,
        action_horizon=flags.action_horizon,
        max_token_len=flags.max_token_len,
        state_in_prompt=flags.state_in_prompt,
        prompt=flags.prompt,
        long_prompts=flags.long_prompts,
        hold_out_ratio=hold_out_ratio,
        seed=seed,
        stats_file=stats_file,
        tolerance=flags.timestamp_tolerance,
    )
    for note in data.notes:
        print(f"note: {note}", file=sys.stderr)
    return data


def stats_of_checkpoint(
    assets: epath.Path, asset_id: str | None, architecture: Architecture
) -> tuple[dict[str, NormStats] | None, str | None]:
    """The checkpoint's statistics and their name; None if it has none of that name, or none at all.

    Raises:
      InputError: it has several, and none was chosen.
    """
    files = [file for file in files_below(assets) if file.name == norm_stats.FILE]
    found = {file.parent.relative_to(assets).as_posix(): file for file in files}
    if asset_id is None and len(found) > 1:
        raise InputError(
            f"the checkpoint has norm stats for {', '.join(sorted(found))}; choose one with --asset-id, or "
            "others with --norm-stats."
        )
    chosen = asset_id if asset_id is not None else next(iter(found), None)
    if chosen in found:
        return norm_stats.load(found[chosen]), chosen
    own = None
    if asset_id is None:
        policy = assets / POLICY
        own = family_of(architecture).norm_stats_of(policy if policy.is_dir() else assets)
    return own, asset_id
