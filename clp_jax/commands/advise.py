"""``clp advise``: how deep for this checkpoint, these data and this budget."""

import contextlib
import dataclasses
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from etils import epath
from rich.console import Console
from rich.markup import escape

from clp_jax.advising import Candidate, Trial, candidates_of, halve, judge
from clp_jax.advising.candidates import FULL
from clp_jax.advising.costs import measure_costs
from clp_jax.advising.halving import mean_loss
from clp_jax.advising.trials import HeldOut, Stopped, Trainer, smaller
from clp_jax.analysis import Analysis, loss_of
from clp_jax.checkpoint import Spec, read_spec
from clp_jax.commands.advise_output import save, show
from clp_jax.commands.advise_record import Costs, check_same, known_candidates, known_costs, read_trial, write_settings
from clp_jax.commands.advise_runs import frozen, run_of, trial_of
from clp_jax.commands.data_flags import open_data
from clp_jax.commands.measuring import DepthFlags, MeasureFlags, check_couple, check_vision, evidence_options, measure
from clp_jax.commands.results import print_json
from clp_jax.commands.upstream_flags import UpstreamFlags
from clp_jax.data import TrainingData
from clp_jax.errors import InputError
from clp_jax.folders import is_remote
from clp_jax.loading import default_dtype, load_model, read_architecture
from clp_jax.models import Architecture, abstract_params, family_of
from clp_jax.outputs import append_line, resumable, whole_lines
from clp_jax.plan import PrunePlan
from clp_jax.planning import check_depth, choose, groups_of
from clp_jax.sharding import make_mesh
from clp_jax.training import OptimizerSettings, Run, check_batch_size, check_schedule
from clp_jax.training.optimizer import check_undecayed
from clp_jax.training.resumption import Entry
from clp_jax.trees import flatten

_BY = "clp advise"
_NAMES = r"(advise|advice|plan)\.json(\.partial)?|trials\.jsonl|advice\.png|report\.html|cuts|runs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advise(MeasureFlags, UpstreamFlags):
    """Find the depth for a checkpoint and its task by short fine-tunes of equal time.

    Cuts of every depth by several criteria, each with several learning rates, train for a while; the better half of
    each depth trains anew for twice as long, and so on. A killed command goes on with the same flags and --resume.
    Disk: the cuts, and the parameters and optimiser state of the one run that is under way.
    """

    checkpoint: str
    """Checkpoint to begin from."""
    data: tuple[str, ...]
    """LeRobot data set, or .npz of model-ready observations, or several: what the model is to be fine-tuned on."""
    out: str
    """Folder to create: report.html, advice.json, plan.json of the advised depth, and what --resume needs."""
    norm_stats: str | None = "data"
    """What normalises a LeRobot data set: its own statistics ("data"), a norm_stats.json, or None: the checkpoint's."""
    steps: int
    """Steps of the whole model in the longest trial; a smaller one does as many as take the same time."""
    keep_layers: tuple[str, ...] = ()
    """Depths to try: 12 9 6, or where towers are cut on their own llm=8+dit=12 llm=5+dit=8. If absent two thirds, one
    half and one third of the blocks of every tower, but for the image encoder's, which stay."""
    criteria: tuple[str, ...] = ("jumps", "clp", "mse")
    """Rules that choose the blocks; where two choose the same blocks they are tried once."""
    learning_rates: tuple[float, ...] = ()
    """Learning rates to try. If absent --peak-lr or the authors' own, and twice as much."""
    rungs: int = 3
    """How many rounds of runs there are, each twice as long as the one before, the last of --steps; the better half of
    each depth goes on to the next. A depth that has one candidate left is trained in the last alone."""
    tolerance: float = 0.02
    """The fastest depth is advised whose held-out loss exceeds the whole model's by at most this share."""
    max_observations: int | None = None
    """Observations at most by which blocks are chosen, none of them held out; 256 if absent."""
    evaluate_observations: int = 256
    """Held-out observations at most."""
    workers: int = 4
    """Threads that read data ahead."""
    resume: bool = False
    """Go on with what a killed command left."""
    json: bool = False
    """Print JSON instead of a table: what advice.json holds; null for what is advised where a signal came first."""
    overwrite: bool = False
    """Delete --out first if it exists."""


def run(config: Advise) -> None:
    """Run the command."""
    with contextlib.ExitStack() as lifetime:
        _run(config, lifetime)


def _run(config: Advise, lifetime: contextlib.ExitStack) -> None:
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if is_remote(config.out):
        raise InputError(
            f"--out {config.out} is an address; give a local folder, to which trials are added one by one."
        )
    console = Console(stderr=config.json)
    spec = read_spec(config.checkpoint)
    settings = {"dtype": config.dtype or default_dtype(), **config.model_settings()}
    architecture = dataclasses.replace(read_architecture(spec, **settings), remat="all")  # as clp finetune
    check_undecayed(config.not_decayed, flatten(abstract_params(architecture)).keys() - frozen(architecture))
    check_vision(config, shows=False)
    _check_rungs(config)
    depths = _depths(config, architecture)
    check_couple(config, architecture)
    rates = _learning_rates(config, architecture)
    data = open_data(
        config,
        config.data,
        architecture,
        assets=spec.assets,
        hold_out_ratio=config.holdout_ratio,
        seed=config.seed,
        record=spec.plan_record,
        new_run=True,
    )
    held = HeldOut.of(data, config.evaluate_observations)
    check_batch_size(run_of(config, rates[0], architecture, config.steps), make_mesh(config.fsdp_devices))
    folder = Path(config.out).expanduser()
    lifetime.enter_context(
        resumable(
            epath.Path(folder),
            by=_BY,
            what=f"advising in {folder}",
            resume=config.resume,
            overwrite=config.overwrite,
            names=_NAMES,
        )
    )
    entry = Entry.of(spec, data, dataclasses.asdict(config))
    check_same(folder, entry, console)
    candidates = known_candidates(folder) or _choose(config, spec, data, depths, rates)
    tried = {candidate.depth for candidate in candidates}
    console.print(
        f"{len(candidates)} candidates at {len(tried)} depths, {len(data)} observations for training, "
        f"{sum(map(len, held.episodes))} observations of {len(held.episodes)} other episodes held out"
    )
    costs = known_costs(folder)
    measuring = "" if costs else " Measuring a training step and sampling at every depth."
    console.print(
        "Learning rates climb over a tenth of each run and fall to a tenth of the peak at its end, where no flag says "
        f"otherwise; all else is as in clp finetune.{measuring}",
        soft_wrap=True,
    )
    costs = costs or _costs(config, folder, entry, architecture, candidates, data)
    trainer = _trainer(config, entry, folder, spec, architecture, data, held, costs)
    trials = _trials(config, folder, trainer, candidates, console)
    if trials is None:
        if config.json:
            print_json({"advised": None})
        console.print(f"Stopped; go on with --resume. What was measured is in {escape(str(folder))}/trials.jsonl")
        return
    seconds = {depth: cost.step_seconds for depth, cost in costs.items()}
    named = {candidate.name: candidate for candidate in candidates}
    verdict = judge(named, trials, held.weights, seconds, tolerance=config.tolerance, seed=config.seed)
    advice = save(folder, verdict, costs, config.checkpoint, config.tolerance)
    show(console, verdict, costs, config.checkpoint, config.out, config.tolerance)
    if config.json:
        print_json(advice)


def _depths(config: Advise, architecture: Architecture) -> dict[str, DepthFlags]:
    """The depths to try, by the words that name them."""
    if not config.criteria:
        raise InputError("--criteria names no rule, so no smaller depth could be tried; leave it out, or name one.")
    if "healed" in config.criteria:
        raise InputError("--criteria healed is for models that are not fine-tuned, and clp advise fine-tunes all.")
    words = config.keep_layers or tuple(_shares(architecture))
    found: dict[str, DepthFlags] = {}
    for word in words:
        flags = DepthFlags(keep_layers=tuple(word.split("+")))
        if flags.depth() not in [other.depth() for other in found.values()]:
            found[word] = flags
    for flags in found.values():
        for criterion in config.criteria:
            check_depth(flags.depth(), criterion, architecture)
    return found


def _shares(architecture: Architecture) -> Iterator[str]:
    """Two thirds, one half and one third of the blocks of every group, in words of --keep-layers."""
    groups, _ = groups_of(architecture)
    towers = {tower.name: tower for tower in architecture.towers}
    for gone in (1 / 3, 1 / 2, 2 / 3):
        kept = {}
        for first, *_ in groups:
            depth, period = towers[first].depth, towers[first].period
            kept[first] = max(depth - period * round(depth * gone / period), period)
        yield "+".join(f"{name}={count}" for name, count in kept.items()) if len(kept) > 1 else str(*kept.values())


def _learning_rates(config: Advise, architecture: Architecture) -> tuple[float, ...]:
    if config.learning_rates:
        if config.peak_lr is not None:
            raise InputError("--learning-rates says all rates to try; leave out --peak-lr.")
        rates = tuple(dict.fromkeys(config.learning_rates))
        if len({f"{rate:g}" for rate in rates}) < len(rates):
            raise InputError("--learning-rates holds two that differ by less than a millionth; leave one out.")
        return rates
    peak = config.peak_lr or family_of(architecture).training_defaults(architecture, config.steps)["peak_lr"]
    return (peak, 2 * peak)


def _check_rungs(config: Advise) -> None:
    """Raise where the first rung is too short for what is asked of it."""
    shortest = config.steps // 2 ** (config.rungs - 1)
    if not shortest:
        raise InputError(f"--rungs {config.rungs} leave no step of --steps {config.steps} for the first; give fewer.")
    if config.warmup_steps is not None and config.warmup_steps > shortest:
        raise InputError(
            f"--warmup-steps {config.warmup_steps} are more than the first rung's {shortest} steps; leave them out, or "
            "give fewer --rungs."
        )
    if config.decay_steps is not None:
        warmup = max(config.steps // 10, 1) if config.warmup_steps is None else config.warmup_steps
        check_schedule(OptimizerSettings(warmup_steps=warmup, decay_steps=config.decay_steps))


def _choose(
    config: Advise, spec: Spec, data: TrainingData, depths: Mapping[str, DepthFlags], rates: tuple[float, ...]
) -> list[Candidate]:
    """One analysis, and all the cuts that it leads to."""
    model = load_model(spec, dtype=config.dtype, fsdp_devices=config.fsdp_devices, **config.model_settings())
    most = 256 if config.max_observations is None else config.max_observations
    calibration = data.calibration(most, seed=config.seed)
    analysis: Analysis = measure(model, calibration, config, config.criteria)
    options = evidence_options(config)
    loss = loss_of(model, calibration) if "greedy" in config.criteria else None

    def chosen(depth: str, criterion: str) -> PrunePlan:
        return choose(analysis, criterion, depths[depth].depth(), options, loss=loss, seed=config.seed)

    whole = PrunePlan.of(model.architecture.kind, model.architecture.depths, coupled=model.architecture.coupled)
    return candidates_of(whole, tuple(depths), config.criteria, rates, chosen)


def _costs(
    config: Advise,
    folder: Path,
    entry: Entry,
    architecture: Architecture,
    candidates: list[Candidate],
    data: TrainingData,
) -> Costs:
    """Measured once, for the steps of a trial depend on it, and written down."""
    models = {}
    for one in candidates:
        cut = smaller(architecture, one.plan)
        models.setdefault(one.depth, (cut, run_of(config, one.peak_lr, cut, config.steps)))
    costs = measure_costs(models, data, make_mesh(config.fsdp_devices))
    write_settings(folder, entry, candidates, costs)
    return costs


def _trials(
    config: Advise, folder: Path, trainer: Trainer, candidates: list[Candidate], console: Console
) -> list[Trial] | None:
    """Those of the last rung; None if a signal ended them before. Each is written down as soon as it is known."""
    file, last, weights = folder / "trials.jsonl", list[Trial](), trainer.held.weights
    trials = [read_trial(line, f"{file}, line {number}") for number, line in enumerate(whole_lines(file), 1)]
    known = {(trial.candidate, trial.rung): trial for trial in trials}

    def measured(candidate: Candidate, rung: int) -> Trial:
        trial = known.get((candidate.name, rung))
        if trial is None:
            trial = trainer.measure(candidate, rung)
            append_line(file, trial.to_json())
        trainer.forget(candidate, rung)
        return trial

    try:
        for trial in halve(candidates, config.rungs, measured, weights):
            loss = mean_loss(trial.losses, weights)
            found = f"held-out loss {loss:.4f}" if math.isfinite(loss) else "diverged"
            console.print(
                f"rung {trial.rung + 1} of {config.rungs}: {escape(trial.candidate):24} {trial.steps:6} steps, {found}"
            )
            last += [trial] if trial.rung + 1 == config.rungs else []
    except Stopped:
        return None
    for name in ("runs", "cuts"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return last


def _trainer(
    config: Advise,
    entry: Entry,
    folder: Path,
    spec: Spec,
    architecture: Architecture,
    data: TrainingData,
    held: HeldOut,
    costs: Costs,
) -> Trainer:
    """Trains as the flags say, each depth for the same time."""
    steps = {
        depth: max(round(config.steps * costs[FULL].step_seconds / cost.step_seconds), 1)
        for depth, cost in costs.items()
    }

    def settings(candidate: Candidate, architecture: Architecture, steps: int) -> Run:
        return trial_of(config, candidate.peak_lr, architecture, steps)

    return Trainer(
        folder=folder,
        spec=spec,
        architecture=architecture,
        data=data,
        held=held,
        mesh=make_mesh(config.fsdp_devices),
        settings=settings,
        steps=steps,
        rungs=config.rungs,
        entry=entry.to_json(),
    )
