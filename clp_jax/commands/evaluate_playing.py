"""How ``clp evaluate`` plays: each episode that is missing, saved when it ends; the results are made of all of them."""

import contextlib
import dataclasses
import os
import platform
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from clp_jax.commands.evaluate_output import introduce, versions
from clp_jax.commands.evaluate_policy import identity, open_policy, reports
from clp_jax.errors import InputError
from clp_jax.evaluation.parallel import run_episodes
from clp_jax.evaluation.rollouts import Answering, Asking
from clp_jax.evaluation.saving import Evaluation, Line, evaluation
from clp_jax.evaluation.suite import Suite
from clp_jax.evaluation.summary import summary
from clp_jax.outputs import check_apart
from clp_jax.progress import progress
from clp_jax.version import __version__

_MAY_CHANGE = (
    *("out", "resume", "overwrite", "json", "against", "checkpoint", "server", "processes"),
    *("tasks", "episodes", "filmed", "replan"),
)
"""Flags that do not change what an episode is; the policy is compared by what it tells, --replan by its outcome."""


def play_all(suite: Suite, config: Any) -> dict[str, Any]:
    """Play all episodes that are not saved yet.

    Args:
      suite: what is played.
      config: flags of ``clp evaluate``.

    Returns:
      What is written to ``results.json``.
    """
    check_apart(config.out, [] if config.checkpoint is None else [config.checkpoint])
    processes = suite.processes(config.processes)
    policy = open_policy(config, suite.robot, processes)
    try:
        if "conventions" in policy.metadata:
            console = Console(stderr=config.json)
            console.print(
                f"conventions {policy.metadata['conventions']}", soft_wrap=True, highlight=False, markup=False
            )
        asking = _asking(suite, policy, config)
        flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in _MAY_CHANGE}
        settings = {"suite": suite.name, "replan": asking.replan} | flags | identity(policy)
        with evaluation(config.out, settings, suite.tasks, resume=config.resume, overwrite=config.overwrite) as found:
            missing, total = found.missing(suite.tasks, config.episodes), len(suite.tasks) * config.episodes
            if config.resume:
                introduce(Console(), missing, total, suite.tasks)
            with _saying_what_is_saved(found, missing, total):
                _play(suite, missing, policy, asking, processes, found)
            result = _results(suite, policy, asking, found.lines, config)
            found.finish(result, suite.tasks)
    finally:
        policy.close()
    return result


def _asking(suite: Suite, policy: Answering, config: Any) -> Asking:
    horizon, shape = policy.metadata.get("action_horizon"), policy.metadata.get("noise_shape")
    return Asking(
        replan=config.replan or (min(suite.replan, horizon) if horizon else suite.replan),
        seed=config.seed,
        noise_shape=None if shape is None else tuple(shape),
        prompt=config.prompt,
        blank_images=config.blank_images,
        filmed=config.filmed,
    )


def _play(
    suite: Suite, jobs: Sequence[tuple[str, int]], policy: Answering, asking: Asking, processes: int, found: Evaluation
) -> None:
    """Play and save; answers and time are counted to the episode that ends next."""
    last, answered = time.perf_counter(), len(policy.latencies)
    with progress(suite.name, total=len(jobs), unit="episodes") as advance:
        for episode in run_episodes(suite.make, jobs, policy, asking, processes=processes, max_batch=processes):
            now, latencies = time.perf_counter(), policy.latencies
            found.add(Line(episode, now - last, tuple(latencies[answered:])))
            last, answered = now, len(latencies)
            advance(1)


@contextlib.contextmanager
def _saying_what_is_saved(found: Evaluation, missing: Sequence[tuple[str, int]], total: int) -> Iterator[None]:
    before = len(found.lines)
    try:
        yield
    except (InputError, ChildProcessError) as error:
        saved = total - len(missing) + len(found.lines) - before
        if not saved:
            raise
        raise type(error)(
            f"{str(error).rstrip('.')}; {saved} of {total} episodes are saved in {found.folder}, go on with --resume."
        ) from error


def _results(suite: Suite, policy: Answering, asking: Asking, lines: Sequence[Line], config: Any) -> dict[str, Any]:
    asked = [line for line in lines if line.episode.task in suite.tasks and line.episode.number < config.episodes]
    latencies = [seconds for line in asked for seconds in line.latencies]
    return {
        "suite": suite.name,
        **summary(suite.tasks, [line.episode for line in asked], latencies),
        "seconds": sum(line.seconds for line in asked),
        "replan": asking.replan,
        "policy": {key: value for key, value in policy.metadata.items() if key != "keys"},
        "reports": {} if config.checkpoint is None else reports(config.checkpoint),
        "flags": dataclasses.asdict(config),
        "conditions": {"clp-jax": __version__, "python": platform.python_version(), "cpus": os.cpu_count()}
        | versions(),
    }
