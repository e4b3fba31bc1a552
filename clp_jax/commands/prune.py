"""``clp prune``: write the smaller checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.filesize import decimal

from clp_jax.analysis import Analysis, loss_of
from clp_jax.checkpoint import CheckpointSpec, RewriteReport, fingerprint, read_spec
from clp_jax.commands.analyse import DepthFlags, MeasureFlags, check_depth, load, measure, evidence_options, removals
from clp_jax.errors import InputError
from clp_jax.flops import parameter_count
from clp_jax.loading import LoadedModel, read_architecture
from clp_jax.models import Architecture, Gates
from clp_jax.plan import PrunePlan
from clp_jax.progress import progress
from clp_jax.prune import prune_checkpoint
from clp_jax.selection import select
from clp_jax.sensitivity import make_group_loss, plan_gates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(MeasureFlags, DepthFlags):
    """Write an openpi checkpoint without the blocks that go. Give one of --data, --analysis, --plan and --keep."""

    checkpoint: str
    """openpi checkpoint: step folder or its params, local or gs://."""
    out: str
    """Folder to create: params, assets and clp.json."""
    data: str | None = None
    """.npz of model-ready observations, LeRobot folder or hub id: analyse, choose and prune in one go."""
    analysis: str | None = None
    """Folder of clp analyse: its plan, or a new choice from its matrices if a depth is given."""
    plan: str | None = None
    """Plan file, perhaps edited."""
    keep: str | None = None
    """Blocks of the language stack that stay, e.g. 0,1,2,5."""
    overwrite: bool = False
    """Replace --out if it exists."""


def run(config: Prune) -> None:
    """Run the command."""
    console = Console()
    ways = {name: getattr(config, name) for name in ("data", "analysis", "plan", "keep")}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise InputError(
            f"give exactly one of --data, --analysis, --plan and --keep; given: {', '.join(given) or 'none'}."
        )
    if given[0] in ("plan", "keep") and config.asks_for_depth():
        raise InputError(f"--{given[0]} already says which blocks stay; leave out the depth.")
    if given[0] == "data" and not config.asks_for_depth():
        raise InputError("say how deep: --keep-layers, --keep-ratio, --threshold or --auto.")
    spec = read_spec(config.checkpoint)
    architecture = read_architecture(spec, lora_scale=config.lora_scale)
    check_depth(config, architecture)
    plan, calibration = _plan(config, spec, architecture, console)
    _check_plan(plan, architecture)
    report = write(spec, plan, config, calibration)
    smaller = architecture.with_depths({name: len(tower.keep) for name, tower in plan.towers.items()})
    before, after = parameter_count(architecture), parameter_count(smaller)
    for name, tower in plan.towers.items():
        if tower.removed:
            console.print(
                f"{name:7} {tower.depth} -> {len(tower.keep)} blocks; removed {', '.join(map(str, tower.removed))}"
            )
    console.print(
        f"{before:,} -> {after:,} parameters ({after / before:.0%}), "
        f"{decimal(report.bytes_out)} in {report.seconds:.1f} s"
    )
    if (spec.path.parent / "train_state").exists():
        console.print("The optimiser state (train_state) was not carried over: it belongs to the old depth.")
    console.print(f"Checkpoint: [bold]{config.out}[/]")


def write(spec: CheckpointSpec, plan: PrunePlan, config: Prune, calibration: Mapping[str, Any] | None) -> RewriteReport:
    """Stream the checkpoint without the blocks that go, with a progress bar of the bytes written."""
    with progress("writing", total=None, unit="MB") as advance:
        shown = 0

        def show(done: int, _: int) -> None:
            nonlocal shown
            advance(done // 10**6 - shown)
            shown = done // 10**6

        settings = dataclasses.asdict(config)
        return prune_checkpoint(
            spec, plan, config.out, config=settings, calibration=calibration, overwrite=config.overwrite, progress=show
        )


def _plan(
    config: Prune, spec: CheckpointSpec, architecture: Architecture, console: Console
) -> tuple[PrunePlan, dict | None]:
    """The plan, and what is to be recorded of the data behind it."""
    if config.plan is not None:
        return PrunePlan.load(config.plan), None
    if config.keep is not None:
        language = [name for name in architecture.depths if name != "vision"]
        keep = dict.fromkeys(language, _indices(config.keep))
        return PrunePlan.of(architecture.kind, architecture.depths, keep, coupled=architecture.coupled), None
    if config.analysis is not None:
        return _plan_of_analysis(config, spec)
    assert config.data is not None
    model, calibration, evaluation = load(config.checkpoint, config.data, config)
    analysis = measure(model, calibration, config, [config.rule()])
    loss = loss_of(model, calibration) if config.rule() == "greedy" else None
    plan = choose(analysis, config, model=model, loss=loss)
    held, name = (calibration, "calibration") if evaluation is None else (evaluation, "held-out")
    evaluate = loss_of(model, held)
    full, pruned = evaluate(Gates()), evaluate(plan_gates(model.architecture, plan))
    console.print(
        f"zero-shot loss on {len(held)} {name} observations: {full:.4f} -> {pruned:.4f} (before any fine-tuning)"
    )
    return plan, analysis.meta | {"loss": {"data": name, "full": full, "pruned": pruned}}


def choose(analysis: Analysis, config: Prune, *, model: LoadedModel | None = None, loss=None) -> PrunePlan:
    """Select with the criterion of the flags, each group of towers on its own.

    Args:
      analysis: what was measured.
      config: flags.
      model: for the criterion greedy, which runs it.
      loss: of the model on calibration data, as a function of its gates.
    """
    options = evidence_options(config)
    picks = {}
    for group, count in removals(analysis, config, options).items():
        group_loss = None if loss is None or model is None else make_group_loss(model.architecture, group, loss)
        evidence = analysis.evidence(group, options, loss=group_loss)
        picks[group] = select(config.rule(), evidence, remove=count, seed=config.seed)
    return analysis.plan(picks, config.rule())


def _plan_of_analysis(config: Prune, spec: CheckpointSpec) -> tuple[PrunePlan, dict]:
    folder = config.analysis
    analysis = Analysis.load(f"{folder}/similarity.npz")
    if analysis.meta.get("checkpoint_fingerprint") != fingerprint(spec):
        raise InputError(
            f"{folder} is the analysis of {analysis.meta.get('checkpoint')}, whose content differs from {spec.path}; "
            "analyse this checkpoint, or give the plan alone with --plan."
        )
    if not config.asks_for_depth() and config.keep_vision_layers is None:
        return PrunePlan.load(f"{folder}/plan.json"), analysis.meta
    return choose(analysis, config), analysis.meta


def _check_plan(plan: PrunePlan, architecture: Architecture) -> None:
    if plan.kind != architecture.kind:
        raise InputError(f"the plan is for a {plan.kind} model, the checkpoint is a {architecture.kind}.")
    plan.check_against(architecture.depths)
    for group in architecture.coupled:
        kept = {plan.removed(name) for name in group}
        if len(kept) > 1:
            raise InputError(
                f"towers {' and '.join(group)} share one stack and must keep the same blocks; the plan removes "
                f"{' and '.join(str(list(blocks)) for blocks in sorted(kept))}."
            )


def _indices(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--keep {text!r} is no list of block numbers; write for example 0,1,2,5.") from None
