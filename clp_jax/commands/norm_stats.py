"""``clp norm-stats``: the statistics that normalise a robot's states and actions, without decoding an image."""

import dataclasses
import os
import time

from etils import epath
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clp_jax.checkpoint import read_spec
from clp_jax.commands.conventions import Told, choose_conventions, of_configuration, robot_told, told_by
from clp_jax.commands.data_flags import MixtureFlags, robot_in_set, robot_of_set
from clp_jax.commands.results import print_json
from clp_jax.commands.unused import refuse_unused
from clp_jax.data.recordings import open_recordings
from clp_jax.errors import InputError
from clp_jax.files import read_json_object
from clp_jax.folders import check_inside
from clp_jax.loading import read_architecture
from clp_jax.models import configurations
from clp_jax.outputs import staged
from clp_jax.processing import norm_stats
from clp_jax.processing.robots import Robot

_OPENPI_HORIZON = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormStats(MixtureFlags):
    """Compute mean, deviation and exact 1 % and 99 % quantiles of a LeRobot data set, in openpi's norm_stats.json."""

    data: tuple[str, ...]
    """LeRobot data set: folder or hub id; or several of one robot, whose statistics are those of their mixture."""
    out: str
    """Folder to create: <asset id>/norm_stats.json, as in a checkpoint's assets."""
    checkpoint: str | None = None
    """Take the action horizon of this checkpoint, or of its kind of model."""
    vlm_config: str | None = None
    """For that checkpoint as in the other commands: folder or config.json of its vision-language model."""
    action_horizon: int | None = None
    """Actions of a chunk, over which the actions' statistics run; 50 if neither this nor a checkpoint is given."""
    asset_id: str | None = None
    """Name of the folder in --out; the hub id or the data folder's name if absent."""
    json: bool = False
    """Print JSON instead of a table."""
    overwrite: bool = False
    """Replace --out if it exists."""


def run(config: NormStats) -> None:
    """Run the command."""
    if config.checkpoint is None:
        refuse_unused(config, ("vlm_config",), "{it} describes a checkpoint", instead="give --checkpoint, too")
    console = Console(stderr=config.json)
    told = told_by(config)
    robot, horizon, named, note = _chosen(config, told)
    if robot is None and (file := robot_of_set(config.data)) is not None:
        robot, horizon, named, note = _chosen(config, dataclasses.replace(told, robot=file))
    if robot is None:
        raise InputError(
            "say which robot the data are of: --openpi-config, --data-config, --robot, or --image, --state-key and "
            "--action-key."
        )
    robot = robot_in_set(robot, config.data)
    if config.asset_id is not None:
        check_inside(config.asset_id, "--asset-id")
    if note is not None:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)
    with staged(config.out, by="clp norm-stats", overwrite=config.overwrite, sources=config.data) as folder:
        start = time.perf_counter()
        recordings = open_recordings(
            config.data,
            robot,
            weights=config.weights,
            episodes=config.episodes,
            pictures=False,
            tolerance=config.timestamp_tolerance,
        )
        stats = recordings.norm_stats(horizon)
        seconds = time.perf_counter() - start
        asset_id = named or check_inside(recordings.asset_id, "the name of the data set")
        norm_stats.save(folder / asset_id, stats)
    _print(console, stats)
    for note in (*(note for recording in recordings.each for note in recording.proof.notes), *recordings.notes):
        console.print(f"[yellow]note:[/] {escape(note)}")
    rows = sum(len(recording.data) for recording in recordings.each)
    episodes = sum(len(recording.data.ends) for recording in recordings.each)
    console.print(f"{rows:,} rows of {episodes:,} episodes, chunks of {horizon} actions, in {seconds:.1f} s")
    file = os.fspath(epath.Path(config.out).expanduser() / asset_id / norm_stats.FILE)
    console.print(f"Statistics: [bold]{escape(file)}[/]")
    if config.json:
        print_json(
            {"file": file, "rows": rows, "episodes": episodes, "action_horizon": horizon} | read_json_object(file)
        )


def _chosen(config: NormStats, told: Told) -> tuple[Robot | None, int, str | None, str | None]:
    """The robot, the actions of a chunk, the statistics' name if one is said, and what was assumed."""
    if config.checkpoint is not None:
        spec = read_spec(config.checkpoint)
        chosen = choose_conventions(told, read_architecture(spec, vlm_config=config.vlm_config), spec.plan_record)
    elif told.configuration is not None:
        chosen = of_configuration(told, None)
    else:
        horizon = _OPENPI_HORIZON if told.action_horizon is None else told.action_horizon
        return robot_told(told, None), horizon, told.asset_id, _ambiguity(told, horizon)
    found = chosen.conventions
    return found.robot, found.action_horizon, found.asset_id, str(chosen) if chosen.assumed else None


def _ambiguity(told: Told, horizon: int) -> str | None:
    """What a robot's name leaves open without a checkpoint, where openpi's configurations of it differ."""
    found = {
        name: entry.conventions
        for name, entry in configurations().items()
        if entry.conventions.robot is not None and entry.conventions.robot.name == told.robot
    }
    if len({(entry.robot.delta, entry.action_horizon) for entry in found.values() if entry.robot is not None}) < 2:
        return None
    return (
        f"--robot {told.robot} without --checkpoint: chunks of {horizon} actions, relative as the robot alone has "
        f"them; openpi's {', '.join(found)} differ in that: choose with --openpi-config."
    )


def _print(console: Console, stats: dict[str, norm_stats.NormStats]) -> None:
    table = Table()
    for column in ("", "mean", "std", "1 %", "99 %"):
        table.add_column(column, justify="right" if column else "left")
    for name, entry in stats.items():
        assert entry.q01 is not None
        assert entry.q99 is not None
        for i, row in enumerate(zip(entry.mean, entry.std, entry.q01, entry.q99, strict=True)):
            table.add_row(f"{name} {i}", *(f"{value:.4g}" for value in row))
    console.print(table)
    warning = norm_stats.warning(stats, {name: len(entry.mean) for name, entry in stats.items()})
    if warning is not None:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
