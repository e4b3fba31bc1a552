"""Everything that is run, in the order of its worth, so that the study can be cut off anywhere."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from studies.metaworld import protocol
from studies.metaworld.arms import Mask, make_arm, make_scratch, masks_of_criteria, name_of
from studies.metaworld.base import statistics
from studies.metaworld.recover import recover
from studies.metaworld.rollouts import roll_out

FULL = "full"
FULL_SHORT = "full-equal-time"
SCRATCH = "scratch"


@dataclasses.dataclass(frozen=True)
class Job:
    """One fine-tuning, perhaps with rollouts after it.

    Attributes:
      name: of the run: the blocks that stay, or one of the names above with its depth.
      mask: the blocks that stay; None for a model from nothing.
      depth: number of blocks.
      regime: a key of `protocol.REGIMES`.
      seed: of fine-tuning.
      simulate: whether success is measured too.
      steps: instead of the regime's.
    """

    name: str
    mask: Mask | None
    depth: int
    regime: str
    seed: int
    simulate: bool = True
    steps: int | None = None

    @property
    def lock(self) -> str:
        """Name of the file that a process holds while it does this job."""
        return f"{self.regime}-{self.name}-{self.seed}"


def all_jobs(work: Path, base: Path) -> Iterator[Job]:
    """The study: at half of the depth first, every arm with one seed before the next seed, the ranks in between."""
    main_depth = protocol.DEPTHS[0]
    for number, seed in enumerate(protocol.SEEDS):
        yield from _arms(work, base, main_depth, "scarce", seed)
        if number == 0:
            for mask in protocol.random_masks(main_depth, protocol.RANDOM_MASKS):
                yield Job(name_of(mask), mask, main_depth, "scarce", seed, simulate=False)
    for seed in protocol.SEEDS:
        yield from _arms(work, base, main_depth, "rich", seed)
    for seed in protocol.SEEDS:
        for depth in protocol.DEPTHS[1:]:
            yield from _arms(work, base, depth, "scarce", seed)


def _arms(work: Path, base: Path, depth: int, regime: str, seed: int) -> Iterator[Job]:
    whole = tuple(range(protocol.DEPTH))
    yield Job(FULL, whole, protocol.DEPTH, regime, seed)
    if depth == protocol.DEPTHS[0]:
        steps = round(protocol.REGIMES[regime].steps * protocol.STEP_TIME_RATIO)
        yield Job(FULL_SHORT, whole, protocol.DEPTH, regime, seed, steps=steps)
    for mask in dict.fromkeys(masks_by_arm(work, base, depth).values()):
        yield Job(name_of(mask), mask, depth, regime, seed)
    yield Job(f"{SCRATCH}-{depth}", None, depth, regime, seed)


def masks_by_arm(work: Path, base: Path, depth: int) -> dict[str, Mask]:
    """The blocks that stay by arm: criteria on new tasks, on the base's tasks, and random draws."""
    masks = masks_of_criteria(work, base, depth, "scarce")
    others = masks_of_criteria(work, base, depth, "base")
    names = set(others) - {"first"} if depth == protocol.DEPTHS[0] else {"greedy"}
    masks |= {f"{name} (base tasks)": mask for name, mask in others.items() if name in names}
    draws = protocol.random_masks(depth, protocol.RANDOM_ARMS)
    return masks | {f"random {i + 1}": mask for i, mask in enumerate(draws)}


def do(job: Job, work: Path, base: Path) -> None:
    """Run what of a job is not there yet."""
    checkpoint = make_scratch(work, job.depth) if job.mask is None else make_arm(work, base, job.mask)
    run = work / "runs" / job.regime / job.name / str(job.seed)
    step = recover(
        run,
        checkpoint,
        data=work / "data" / job.regime,
        held_out=work / "data" / "test",
        stats=statistics(base),
        steps=job.steps or protocol.REGIMES[job.regime].steps,
        rate=protocol.RECOVERY_LR,
        seed=job.seed,
    )
    if job.simulate:
        roll_out(step, run / "rollouts")
