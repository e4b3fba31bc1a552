"""``python -m studies.metaworld STAGE --work DIR``: a piece of the study; what is finished is skipped."""

import argparse
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from studies.metaworld import base, collect, example, jobs, page, protocol, rollouts, tuned

STAGES = ("base", "data", "arms", "tuned", "screen", "collect", "collect-tuned", "page", "example")
RESULTS = Path(__file__).parent / "results.json"


def main() -> None:
    """Run the stage of the command line."""
    parser = argparse.ArgumentParser(prog="python -m studies.metaworld", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, checkpoints and runs (some GB)")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    trained = base.finished_or_committed(work)
    if arguments.stage == "base":
        base.make_base(work)
    elif arguments.stage == "data":
        _record(work)
    elif arguments.stage == "screen":
        rollouts.screen(work, trained)
        collect.collect_screen(work, RESULTS)
    elif arguments.stage == "collect":
        collect.collect(work, base.finished(work), RESULTS)
    elif arguments.stage == "collect-tuned":
        collect.collect_tuned(work, trained, RESULTS)
    elif arguments.stage == "example":
        example.make_example(work)
    elif arguments.stage == "page":
        page.write(RESULTS, RESULTS.parent)
    elif arguments.stage == "arms":
        _work_off(work, jobs.all_jobs(work, base.finished(work)), lambda job: jobs.do(job, work, base.finished(work)))
    else:
        if not jax.__version__.startswith("0.5."):  # whose cache gives wrong numbers on CPU
            jax.config.update("jax_compilation_cache_dir", str(work / "compiled"))  # the same programs for all masks
        _work_off(work, tuned.all_jobs(work, trained), lambda job: tuned.do(job, work, trained), by="tuned-")


def _record(work: Path) -> None:
    new = protocol.NEW_TASKS
    for name, regime in protocol.REGIMES.items():
        base.record_demonstrations(work / "data" / name, new, regime.episodes)
    base.record_demonstrations(work / "data" / "test", new, protocol.TEST_EPISODES, seed=protocol.TEST_SEED)
    base.record_demonstrations(work / "data" / "tuning", new, protocol.TUNING_EPISODES, seed=protocol.TUNING_SEED)


def _work_off(work: Path, todo: Iterator[Any], do: Callable[[Any], None], by: str = "") -> None:
    """Do all jobs; several processes share them, each takes those that no other is at.

    One process per core is a third faster than one on two cores: the matrices are small.
    """
    locks = work / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    while True:
        with (locks / "list").open("w") as file:  # the next job may need an analysis: one process makes it
            fcntl.flock(file, fcntl.LOCK_EX)
            job = next(todo, None)
        if job is None:
            return
        with (locks / f"{by}{job.lock}").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            Console().rule(job.lock)
            do(job)


if __name__ == "__main__":
    main()
