"""``python -m studies.metaworld STAGE --work DIR``: a piece of the study; what is finished is skipped."""

import argparse
import fcntl
from pathlib import Path

from rich.console import Console

from clp_jax.example import CHECKPOINT
from studies.metaworld import base, collect, example, jobs, page, protocol, rollouts

STAGES = ("base", "data", "arms", "screen", "collect", "page", "example")
RESULTS = Path(__file__).parent / "results.json"


def main() -> None:
    """Run the stage of the command line."""
    parser = argparse.ArgumentParser(prog="python -m studies.metaworld", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, checkpoints and runs (some GB)")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    if arguments.stage == "base":
        base.make_base(work)
    elif arguments.stage == "data":
        new, test = protocol.NEW_TASKS, protocol.TEST_SEED
        for name, regime in protocol.REGIMES.items():
            base.record_demonstrations(work / "data" / name, new, regime.episodes)
        base.record_demonstrations(work / "data" / "test", new, protocol.TEST_EPISODES, seed=test)
    elif arguments.stage == "screen":
        rollouts.screen(work, base.finished(work) if base.finished(work).exists() else Path(CHECKPOINT))
        collect.collect_screen(work, RESULTS)
    elif arguments.stage == "collect":
        collect.collect(work, base.finished(work), RESULTS)
    elif arguments.stage == "example":
        example.make_example(work)
    elif arguments.stage == "page":
        page.write(RESULTS, RESULTS.parent)
    else:
        _work_off(work, base.finished(work))


def _work_off(work: Path, checkpoint: Path) -> None:
    """Do all jobs; several processes share them, each takes those that no other is at.

    One process per core is a third faster than one on two cores: the matrices are small.
    """
    locks = work / "locks"
    locks.mkdir(exist_ok=True)
    todo = jobs.all_jobs(work, checkpoint)
    while True:
        with (locks / "list").open("w") as file:  # the next job may need an analysis: one process makes it
            fcntl.flock(file, fcntl.LOCK_EX)
            job = next(todo, None)
        if job is None:
            return
        with (locks / f"{job.regime}-{job.name}-{job.seed}").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            Console().rule(f"{job.regime}, {job.name}, seed {job.seed}")
            jobs.do(job, work, checkpoint)


if __name__ == "__main__":
    main()
