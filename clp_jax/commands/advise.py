"""``clp advise``: how deep for this checkpoint, these data and this budget."""

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clp_jax.advising import Candidate, Trial, Verdict, candidates_of, halve, judge
from clp_jax.advising.candidates import FULL
from clp_jax.advising.costs import Cost, measure_costs
from clp_jax.advising.halving import mean_loss
from clp_jax.advising.picture import draw
from clp_jax.advising.trials import HeldOut, Stopped, Trainer, smaller
from clp_jax.analysis import Analysis, loss_of
from clp_jax.checkpoint import Spec, fingerprint, read_spec
from clp_jax.commands.data_flags import open_data
from clp_jax.commands.measuring import DepthFlags, MeasureFlags, evidence_options, measure
from clp_jax.commands.upstream_flags import UpstreamFlags, with_upstream_defaults
from clp_jax.data import TrainingData
from clp_jax.errors import InputError
from clp_jax.files import read_json_object
from clp_jax.loading import default_dtype, load_model, read_architecture
from clp_jax.models import Architecture, abstract_params, family_of
from clp_jax.outputs import resumable
from clp_jax.plan import PrunePlan
from clp_jax.planning import check_depth, choose
from clp_jax.sharding import make_mesh
from clp_jax.training import OptimizerSettings, Run, StepSettings, check_batch_size
from clp_jax.training.freezing import frozen_paths
from clp_jax.trees import flatten

_BY = "clp advise"
_NAMES = r"advise\.json|trials\.jsonl|advice\.(json|png)|plan\.json|cuts|runs"
_MAY_CHANGE = ("out", "resume", "overwrite", "tolerance", "workers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advise(MeasureFlags, UpstreamFlags):
    """Find the depth for a checkpoint and its task by short fine-tunes of equal time.

    Cuts of every depth by several criteria, each with several learning rates, train for a while; the better half of
    each depth trains on. A killed command goes on with the same flags and --resume. Disk: every candidate that is still
    in holds its optimiser state; those that are out are removed at once.
    """

    checkpoint: str
    """Checkpoint to begin from."""
    data: tuple[str, ...]
    """LeRobot data set, or .npz of model-ready observations, or several: what the model is to be fine-tuned on."""
    out: str
    """Folder to create: advice.json, advice.png, plan.json of the advised depth, and what --resume needs."""
    steps: int
    """Steps of the whole model in the longest trial; a smaller one does as many as take the same time."""
    keep_layers: tuple[str, ...] = ()
    """Depths to try: 12 9 6, or where towers are cut on their own llm=8+dit=12 llm=5+dit=8. If absent two thirds, one
    half and one third of the blocks of a model with one group of towers."""
    criteria: tuple[str, ...] = ("jumps", "clp", "mse")
    """Rules that choose the blocks; where two choose the same blocks they are tried once."""
    learning_rates: tuple[float, ...] = ()
    """Learning rates to try. If absent --peak-lr or the authors' own, and twice as much."""
    rungs: int = 3
    """How often the better half of each depth goes on: the first rung has --steps / 2^(rungs - 1) steps."""
    tolerance: float = 0.02
    """The fastest depth is advised whose held-out loss exceeds the whole model's by at most this share."""
    evaluate_observations: int = 256
    """At most so many held-out observations."""
    workers: int = 4
    """Threads that read data ahead."""
    resume: bool = False
    """Go on with what a killed command left."""
    overwrite: bool = False
    """Delete --out first if it exists."""


def run(config: Advise) -> None:
    """Run the command."""
    with contextlib.ExitStack() as lifetime:
        _run(config, lifetime)


def _run(config: Advise, lifetime: contextlib.ExitStack) -> None:
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    console = Console()
    spec = read_spec(config.checkpoint)
    architecture = read_architecture(spec, dtype=config.dtype or default_dtype(), **config.model_settings())
    depths = _depths(config, architecture)
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
    check_batch_size(_run_of(config, rates[0], architecture, 1, config.steps), make_mesh(config.fsdp_devices))
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
    entry = {"checkpoint": fingerprint(spec), "data": data.fingerprint, "config": _lasting(config)}
    _check_same(folder, entry)
    candidates = _choose(config, spec, data, depths, rates)
    console.print(
        f"{len(candidates)} candidates at {len(depths) + 1} depths, {len(data)} observations for training, "
        f"{sum(map(len, held.episodes))} observations of {len(held.episodes)} other episodes held out"
    )
    console.print("Measuring a training step and sampling at every depth")
    costs = _costs(config, folder, entry, architecture, candidates, data)
    trainer = _trainer(config, folder, spec, architecture, data, held, costs)
    trials = _trials(config, folder, trainer, candidates, console)
    if trials is None:
        console.print(f"Stopped; go on with --resume. What was measured is in {escape(str(folder))}/trials.jsonl")
        return
    seconds = {depth: cost.step_seconds for depth, cost in costs.items()}
    named = {candidate.name: candidate for candidate in candidates}
    verdict = judge(named, trials, held.weights, seconds, tolerance=config.tolerance, seed=config.seed)
    _save(folder, verdict, costs, config)
    _show(console, verdict, costs, config)


def _depths(config: Advise, architecture: Architecture) -> dict[str, DepthFlags]:
    """The depths to try, by the words that name them."""
    words = config.keep_layers
    if len(words) == 0:
        if len(architecture.groups) > 1:
            half = "+".join(f"{group[0]}={architecture.depths[group[0]] // 2}" for group in architecture.groups)
            raise InputError(
                f"a {architecture.kind} has several groups of towers; say which depths to try, for example "
                f"--keep-layers {half}."
            )
        blocks = max(architecture.depths[name] for group in architecture.groups for name in group)
        words = tuple(str(max(round(blocks * share), 1)) for share in (2 / 3, 1 / 2, 1 / 3))
    found = {word: DepthFlags(keep_layers=tuple(word.split("+"))) for word in dict.fromkeys(words)}
    for flags in found.values():
        for criterion in config.criteria:
            check_depth(flags.depth(), criterion, architecture)
    return found


def _learning_rates(config: Advise, architecture: Architecture) -> tuple[float, ...]:
    if config.learning_rates:
        return tuple(dict.fromkeys(config.learning_rates))
    peak = config.peak_lr or family_of(architecture).training_defaults(architecture, config.steps)["peak_lr"]
    return (peak, 2 * peak)


def _lasting(config: Advise) -> dict[str, Any]:
    """What must be as it was on a resumption."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in _MAY_CHANGE}


def _check_same(folder: Path, entry: Mapping[str, Any]) -> None:
    file = folder / "advise.json"
    if not file.exists():
        return
    before, now = read_json_object(file), json.loads(json.dumps(entry))
    changed = [key for key in ("checkpoint", "data") if before.get(key) != now[key]]
    then = before.get("config") or {}
    changed += [f"--{key.replace('_', '-')}" for key, value in now["config"].items() if then.get(key) != value]
    if changed:
        raise InputError(
            f"{folder} was begun with another {', '.join(changed)}; go on with the same, or begin anew with --overwrite"
            "."
        )


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


Costs = dict[str, Cost]
"""By depth."""


def _costs(
    config: Advise,
    folder: Path,
    entry: Mapping[str, Any],
    architecture: Architecture,
    candidates: list[Candidate],
    data: TrainingData,
) -> Costs:
    """Measured once, for the steps of a trial depend on it."""
    file = folder / "advise.json"
    if file.exists():
        return {depth: Cost(**cost) for depth, cost in read_json_object(file)["costs"].items()}
    models = {}
    for one in candidates:
        cut = smaller(architecture, one.plan)
        models.setdefault(one.depth, (cut, _run_of(config, one.peak_lr, cut, config.steps, config.steps)))
    costs = measure_costs(models, data, make_mesh(config.fsdp_devices))
    unfinished = file.with_name("advise.json.new")
    known = {depth: dataclasses.asdict(cost) for depth, cost in costs.items()}
    unfinished.write_text(json.dumps({**entry, "costs": known}, indent=2) + "\n")
    unfinished.replace(file)
    return costs


def _trials(
    config: Advise, folder: Path, trainer: Trainer, candidates: list[Candidate], console: Console
) -> list[Trial] | None:
    """Those of the last rung; None if a signal ended them before. Each is written down as soon as it is known."""
    file, last, weights = folder / "trials.jsonl", list[Trial](), trainer.held.weights
    lines = file.read_text().splitlines() if file.exists() else []
    known = {(trial.candidate, trial.rung): trial for trial in map(_read_trial, lines) if trial is not None}

    def measured(candidate: Candidate, rung: int) -> Trial:
        if (found := known.get((candidate.name, rung))) is not None:
            return found
        trial = trainer.measure(candidate, rung)
        with file.open("a") as stream:
            stream.write(json.dumps(trial.to_json()) + "\n")
        return trial

    try:
        for trial, is_out in halve(candidates, config.rungs, measured, weights):
            if is_out:
                shutil.rmtree(folder / "runs" / trial.candidate, ignore_errors=True)
                continue
            loss = mean_loss(trial.losses, weights)
            console.print(
                f"rung {trial.rung + 1} of {config.rungs}: {escape(trial.candidate):24} {trial.steps:6} steps, "
                f"held-out loss {loss:.4f}"
            )
            last += [trial] if trial.rung + 1 == config.rungs else []
    except Stopped:
        return None
    shutil.rmtree(folder / "runs", ignore_errors=True)
    return last


def _read_trial(line: str) -> Trial | None:
    """A line; None for one that a crash cut off."""
    try:
        found = json.loads(line)
        return Trial(found["candidate"], found["rung"], found["steps"], tuple(found["losses"]))
    except (ValueError, KeyError, TypeError):
        return None


def _trainer(
    config: Advise,
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

    def settings(candidate: Candidate, architecture: Architecture, steps: int, whole: int) -> Run:
        return _run_of(config, candidate.peak_lr, architecture, steps, whole)

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
        config=_lasting(config),
    )


def _run_of(config: Advise, peak_lr: float, architecture: Architecture, steps: int, whole: int) -> Run:
    """The authors' settings, but for the schedule: theirs is made for runs a hundred times as long."""
    family, leaves = family_of(architecture), flatten(abstract_params(architecture))
    given = {name: getattr(config, name) for name in ("warmup_steps", "decay_steps", "decay_lr")}
    own = {"warmup_steps": max(whole // 10, 1), "decay_steps": whole, "decay_lr": peak_lr / 10}
    schedule = {name: own[name] if value is None else value for name, value in given.items()}
    told = dataclasses.replace(config, peak_lr=peak_lr, **schedule)
    told, _ = with_upstream_defaults(told, family.training_defaults(architecture, whole))
    assert told.batch_size is not None and not isinstance(told.ema_decay, str)
    return Run(
        steps=steps,
        batch_size=told.batch_size,
        optimizer=OptimizerSettings.among(vars(told)),
        step=StepSettings(
            ema_decay=told.ema_decay,
            frozen=frozen_paths(tuple(leaves), default=family.frozen_rules(architecture)),
            frozen_rows=tuple(sorted(family.frozen_rows(architecture, leaves).items())),
        ),
        frozen_dtype=None if told.frozen_dtype == "keep" else told.frozen_dtype,
        seed=told.seed,
        workers=told.workers,
        evaluate_every=0,
        save_every=0,
    )


def _save(folder: Path, verdict: Verdict, costs: Costs, config: Advise) -> None:
    """The plan and the picture first: whoever finds advice.json finds all."""
    verdict.best.candidate.plan.save(folder / "plan.json")
    shown = [costs[place.candidate.depth] for place in verdict.places]
    axes = {
        "training step, ms": [1e3 * cost.step_seconds for cost in shown],
        "sampling a chunk, ms": [1e3 * cost.sample_seconds for cost in shown if cost.sample_seconds is not None],
        "parameters and optimiser, GB": [cost.state_bytes / 1e9 for cost in shown],
    }
    axes = {label: costs for label, costs in axes.items() if costs}
    draw(verdict, axes, f"Depth against loss, {config.checkpoint}", folder / "advice.png")
    found = {
        "advised": verdict.best.to_json(),
        "tolerance": config.tolerance,
        "depths": [place.to_json() | dataclasses.asdict(costs[place.candidate.depth]) for place in verdict.places],
    }
    (folder / "advice.json").write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")


def _show(console: Console, verdict: Verdict, costs: Costs, config: Advise) -> None:
    table = Table(title="Equal training time; held-out loss at its end")
    columns = ("depth", "blocks by", "peak lr", "steps", "loss", "to full", "95 %", "step", "chunk", "advised in")
    for column in columns:
        table.add_column(column, justify="left" if column in ("depth", "blocks by") else "right")
    full = costs[FULL]
    for place in verdict.places:
        one, cost = place.candidate, costs[place.candidate.depth]
        table.add_row(
            escape(one.depth),
            escape(" ".join(one.criteria)),
            f"{one.peak_lr:g}",
            f"{place.trial.steps}",
            f"{place.loss:.4f}",
            f"{place.ratio:.3f}",
            f"{place.interval[0]:.3f} - {place.interval[1]:.3f}",
            f"{cost.step_seconds / full.step_seconds:.2f}",
            _share(cost.sample_seconds, full.sample_seconds),
            f"{place.chosen:.0%}",
        )
    console.print(table)
    best, out = verdict.best, escape(config.out)
    console.print(
        f"Advised: [bold]{escape(best.candidate.depth)}[/], the fastest within {config.tolerance:.0%} of the whole "
        f"model's loss; so in {best.chosen:.0%} of the resamples of held-out episodes."
    )
    console.print(f"Saved: {out}/advice.json, {out}/advice.png and {out}/plan.json. Next:")
    source = escape(config.checkpoint)
    if best.candidate.depth == FULL:
        console.print(f"  clp finetune --checkpoint {source} --peak-lr {best.candidate.peak_lr:g} ...")
        return
    console.print(f"  clp prune --checkpoint {source} --plan {out}/plan.json --out PRUNED")
    console.print(f"  clp finetune --checkpoint PRUNED --peak-lr {best.candidate.peak_lr:g} ...")


def _share(seconds: float | None, of: float | None) -> str:
    return "" if seconds is None or of is None else f"{seconds / of:.2f}"
