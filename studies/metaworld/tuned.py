"""The second round: every arm at its own learning rate, and arms that are healed or taught.

The first round gave all arms one learning rate. Here each arm is fine-tuned with every rate of a grid, the rate is
chosen by the loss on episodes that serve for nothing else, and with it the arm is run with the seeds that count. Where
the best rate is the grid's first or last, the grid is extended.
"""

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path

from clp_jax.advising.costs import measure_costs
from clp_jax.checkpoint import read_spec
from clp_jax.commands.data_flags import open_data
from clp_jax.commands.finetune import Finetune
from clp_jax.commands.prune import Prune
from clp_jax.commands.prune import run as prune
from clp_jax.loading import read_architecture
from clp_jax.sharding import make_mesh
from clp_jax.training import OptimizerSettings, Run, StepSettings
from studies.metaworld import protocol
from studies.metaworld.arms import Mask, make_arm, make_scratch, masks_of_criteria, name_of
from studies.metaworld.base import statistics
from studies.metaworld.recover import recover
from studies.metaworld.rollouts import roll_out
from studies.metaworld.tables import final_loss

CRITERIA = {"jumps": "jumps", "clp": "clp", "greedy": "greedy", "mse": "mse", "first": "drop the deepest"}
"""Of the arms that are chosen, with their names in the table."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is fine-tuned.

    Attributes:
      name: of its folder.
      label: of its row.
      depth: number of blocks.
      mask: the blocks that stay; None for a model from nothing.
      in_time_of: a depth; the arm gets the steps that take as long as the regime's steps of this depth.
      healed: whether what the cut breaks is repaired before.
      taught: whether the fine-tuned full model teaches.
    """

    name: str
    label: str
    depth: int
    mask: Mask | None
    in_time_of: int
    healed: bool = False
    taught: bool = False


def arms(work: Path, base: Path, depth: int) -> list[Arm]:
    """What is compared at a depth, the arms that matter most first."""
    whole, full = tuple(range(protocol.DEPTH)), protocol.DEPTH
    chosen = masks_of_criteria(work, base, depth, "scarce")
    draws = protocol.random_masks(depth, protocol.RANDOM_MASKS)
    found = [
        Arm("full", "full", full, whole, full),
        Arm(f"full-{depth}", f"full, in the time of {depth} blocks", full, whole, depth),
        *(Arm(name_of(chosen[name]), label, depth, chosen[name], depth) for name, label in CRITERIA.items()),
    ]
    jumps = found[2]
    found += [
        dataclasses.replace(jumps, name=f"healed-{depth}", label="jumps, healed", healed=True),
        dataclasses.replace(jumps, name=f"taught-{depth}", label="jumps, taught", taught=True),
        dataclasses.replace(jumps, name=f"longer-{depth}", label="jumps, in the time of the full", in_time_of=full),
    ]
    for label, has_first in {"random with block 0": True, "random without block 0": False}.items():
        mask = next(mask for mask in draws if (0 in mask) is has_first)
        found.append(Arm(name_of(mask), label, depth, mask, depth))
    found.append(Arm(f"scratch-{depth}", "from nothing", depth, None, depth))
    return list({arm.name: arm for arm in reversed(found)}.values())[::-1]  # of two that keep the same, the first


@dataclasses.dataclass(frozen=True)
class Job:
    """One arm of one regime.

    Attributes:
      arm: what is fine-tuned.
      regime: a key of `protocol.REGIMES`.
      simulate: whether success is measured, of runs that are there.
      times: the regime's steps.
    """

    arm: Arm
    regime: str
    simulate: bool = False
    times: int = 1

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.arm.name}-x{self.times}" if self.times > 1 else self.arm.name

    @property
    def lock(self) -> str:
        """Name of the file that a process holds while it does this job."""
        return f"{self.regime}-{self.name}"


def all_jobs(work: Path, base: Path) -> Iterator[Job]:
    """The round in the order of worth: the main arms everywhere, their success, the others, then what takes long."""
    step_seconds(work, base)
    settings = [(regime, depth) for regime in protocol.REGIMES for depth in protocol.TUNED_DEPTHS]
    main_depth = protocol.TUNED_DEPTHS[0]
    for regime, depth in settings:
        yield from (Job(arm, regime) for arm in arms(work, base, depth)[:4])
    for regime in protocol.REGIMES:
        yield from (Job(arm, regime, simulate=True) for arm in arms(work, base, main_depth)[:4])
    for regime, depth in settings:
        yield from (Job(arm, regime) for arm in arms(work, base, depth)[4:])
    full, _, jumps, *_ = arms(work, base, main_depth)
    yield from (Job(arm, "rich", times=protocol.LONGER) for arm in (full, jumps))


def folder(work: Path, regime: str, name: str) -> Path:
    """Where the runs of an arm are."""
    return work / "tuned" / regime / name


def do(job: Job, work: Path, base: Path) -> None:
    """Run what of a job is not there yet."""
    if job.times > 1:
        rate = tune(Job(job.arm, job.regime), work, base)
        _run(job, work, base, rate, protocol.SEEDS[0])
        return
    rate = tune(job, work, base)
    for seed in protocol.SEEDS:
        step = _run(job, work, base, rate, seed)
        if job.simulate:
            roll_out(step, step.parent / "rollouts")


def tune(job: Job, work: Path, base: Path) -> float:
    """The rate whose last loss on the tuning episodes is least."""
    losses: dict[float, float] = {}
    while (rate := protocol.next_rate(losses)) is not None:
        run = _run(job, work, base, rate, protocol.TUNING_RUN).parent
        losses[rate] = final_loss(json.loads((run / "curve.json").read_text()))
    return min(losses, key=lambda rate: losses[rate])


def _run(job: Job, work: Path, base: Path, rate: float, seed: int) -> Path:
    steps = steps_of(job.arm, job.regime, step_seconds(work, base)) * job.times
    tuning = seed == protocol.TUNING_RUN
    return recover(
        folder(work, job.regime, job.name) / f"{rate:g}-{seed}",
        _checkpoint(job.arm, work, base),
        data=work / "data" / job.regime,
        held_out=work / "data" / ("tuning" if tuning else "test"),
        stats=statistics(base),
        steps=steps,
        rate=rate,
        seed=seed,
        teacher=_teacher(job.regime, work, base) if job.arm.taught else None,
        evaluate_every=steps if tuning else job.times * protocol.EVALUATE_EVERY,
    )


def _checkpoint(arm: Arm, work: Path, base: Path) -> Path:
    """What an arm begins from. Healing sees the demonstrations that fine-tuning sees, of the scarce regime."""
    if arm.mask is None:
        return make_scratch(work, arm.depth)
    if not arm.healed:
        return make_arm(work, base, arm.mask)
    healed = work / "arms" / f"{name_of(arm.mask)}-healed"
    if not healed.exists():
        prune(
            Prune(
                checkpoint=str(base),
                keep=(",".join(map(str, arm.mask)),),
                heal=True,
                data=(str(work / "data" / "scarce"),),
                out=str(healed),
                robot="metaworld",
                norm_stats=statistics(base),
                action_horizon=protocol.HORIZON,
                max_token_len=protocol.PROMPT_TOKENS,
                max_observations=protocol.CALIBRATION,
            )
        )
    return healed


def _teacher(regime: str, work: Path, base: Path) -> Path:
    """The full model after its own fine-tuning with the first seed. Its time is not counted."""
    full = Job(arms(work, base, protocol.TUNED_DEPTHS[0])[0], regime)
    with exclusively(work, full):
        return _run(full, work, base, tune(full, work, base), protocol.SEEDS[0])


@contextlib.contextmanager
def exclusively(work: Path, job: Job) -> Iterator[None]:
    """Wait until no other process is at an arm, and keep it from the others."""
    locks = work / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / f"tuned-{job.lock}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def steps_of(arm: Arm, regime: str, seconds: dict[int, float]) -> int:
    """Steps of an arm: those of the regime, or as many as take their time at another depth."""
    return round(protocol.REGIMES[regime].steps * seconds[arm.in_time_of] / seconds[arm.depth])


def step_seconds(work: Path, base: Path) -> dict[int, float]:
    """Seconds of a training step by depth, measured in turns, once for all."""
    file = work / "tuned" / "step_seconds.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(_measure(work, base)))
    return {int(depth): seconds for depth, seconds in json.loads(file.read_text()).items()}


def _measure(work: Path, base: Path) -> dict[str, float]:
    flags = Finetune(
        checkpoint=str(base),
        data=(str(work / "data" / "scarce"),),
        out="",
        steps=1,
        robot="metaworld",
        norm_stats=statistics(base),
        action_horizon=protocol.HORIZON,
        max_token_len=protocol.PROMPT_TOKENS,
    )
    spec = read_spec(str(base))
    whole = read_architecture(spec, dtype="float32")
    data = open_data(flags, flags.data, whole, assets=spec.assets, hold_out_ratio=0.0, seed=0)
    run = Run(
        steps=protocol.REGIMES["scarce"].steps,
        batch_size=protocol.BATCH,
        optimizer=OptimizerSettings(),
        step=StepSettings(ema_decay=None, action_samples=protocol.DRAWS, augment=False),
    )
    depths = (protocol.DEPTH, *protocol.TUNED_DEPTHS)
    models = {str(depth): (whole.with_depths(dict.fromkeys(("vlm", "action"), depth)), run) for depth in depths}
    return {depth: cost.step_seconds for depth, cost in measure_costs(models, data, make_mesh()).items()}
