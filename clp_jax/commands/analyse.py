"""``clp analyse``: measure which blocks are twins of their neighbours, and propose a plan."""

import dataclasses
import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clp_jax.analysis import Analysis, loss_of
from clp_jax.commands.healing_table import repairs_table
from clp_jax.commands.measuring import (
    DepthFlags,
    MeasureFlags,
    check_heals,
    check_vision,
    evidence_options,
    few_held_out,
    healed_cuts,
    load,
    load_to_heal,
    measure,
)
from clp_jax.commands.results import print_json
from clp_jax.data import CalibrationData
from clp_jax.errors import InputError
from clp_jax.findings import Choice, Findings, clp_stability, compare_criteria, intervals, size_of, warnings_of
from clp_jax.loading import LoadedModel
from clp_jax.outputs import staged
from clp_jax.plan import PrunePlan
from clp_jax.planning import removals
from clp_jax.report import write_report
from clp_jax.selection import CRITERIA
from clp_jax.sensitivity import open_gates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analyse(MeasureFlags, DepthFlags):
    """Measure which blocks of a checkpoint are twins of their neighbours, and propose an editable plan."""

    checkpoint: str
    """Checkpoint: step folder of openpi or its params, local or gs://; policy folder of lerobot; NVIDIA's folder."""
    data: tuple[str, ...]
    """.npz of model-ready observations, LeRobot folder or hub id; or several of one robot."""
    out: str
    """Folder to create: similarity.npz, plan.json, findings.json, report.html, heat maps."""
    compare: tuple[str, ...] = tuple(name for name in CRITERIA if name not in ("greedy", "gauss-newton", "healed"))
    """Criteria whose losses at the same depth are compared. Not by default: gauss-newton, which runs the model forward
    twice per block, greedy, which runs it some hundred times, and healed, which heals several cuts."""
    heal: bool = False
    """Also heal what each criterion leaves, on some of the observations: what the loss would be after clp prune --heal,
    and how far the stream after every kept block is off before and after."""
    json: bool = False
    """Print JSON instead of tables: what findings.json holds."""
    overwrite: bool = False
    """Replace --out if it exists."""


def run(config: Analyse) -> None:
    """Run the command."""
    for name in config.compare:
        if name not in CRITERIA:
            raise InputError(f"--compare {name} is no criterion; choose from {', '.join(CRITERIA)}.")
    check_heals(config, (*config.compare, config.rule()))
    check_vision(config, shows=True)
    with staged(
        config.out, by="clp analyse", overwrite=config.overwrite, sources=[config.checkpoint, *config.data]
    ) as folder:
        model, calibration, evaluation = (load_to_heal if config.heal else load)(config.checkpoint, config.data, config)
        analysis = measure(model, calibration, config, {*config.compare, config.rule()})
        findings = find(model, analysis, calibration, evaluation, config, config.compare)
        analysis.save(folder / "similarity.npz")
        findings.plan.save(folder / "plan.json")
        (folder / "findings.json").write_text(json.dumps(findings.to_json(), indent=2, allow_nan=False) + "\n")
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        write_report(folder, analysis, findings, evidence_options(config))
    if config.json:
        print_json(findings.to_json())
        return
    console = Console()
    print_findings(console, findings)
    out = escape(config.out)
    console.print(f"\nReport: [bold]{out}/report.html[/]   plan to edit: [bold]{out}/plan.json[/]", soft_wrap=True)


def find(
    model: LoadedModel,
    analysis: Analysis,
    calibration: CalibrationData,
    evaluation: CalibrationData | None,
    config: "Analyse",
    criteria: tuple[str, ...],
) -> Findings:
    """Choose with every criterion and measure what each choice costs before fine-tuning."""
    options, architecture = evidence_options(config), model.architecture
    remove = removals(analysis, config.depth(), options)
    data, name = (calibration, "calibration") if evaluation is None else (evaluation, "held-out")
    evaluation_loss = loss_of(model, data)
    calibration_loss = loss_of(model, calibration) if "greedy" in (config.rule(), *criteria) else None
    choices = compare_criteria(
        analysis,
        remove,
        chosen=config.rule(),
        criteria=criteria,
        options=options,
        architecture=architecture,
        calibration_loss=calibration_loss,
        evaluation_loss=evaluation_loss,
        healed=healed_cuts(model, calibration, evaluation, config) if config.heal else None,
        seed=config.seed,
    )
    plan = choices[0].plan
    smaller = architecture.with_depths({tower: len(p.keep) for tower, p in plan.towers.items()})
    lengths, cameras = data.lengths, len(data.cameras)
    return Findings(
        checkpoint=str(model.spec.path),
        plan=plan,
        choices=choices,
        full_loss=evaluation_loss(open_gates(architecture)),
        loss_data=f"{len(data)} {name} observations",
        before=size_of(architecture, lengths, cameras=cameras),
        after=size_of(smaller, lengths, cameras=cameras),
        intervals=intervals(analysis, options),
        stability=clp_stability(analysis, remove, options),
        warnings=(*warnings_of(analysis, options), *(_of_healing(plan, evaluation) if config.heal else ())),
    )


def _of_healing(plan: PrunePlan, held: CalibrationData | None) -> tuple[str, ...]:
    if plan.is_identity:
        return ("The plan removes nothing, so there is nothing to heal.",)
    return few_held_out(held)


def print_findings(console: Console, findings: Findings) -> None:
    """The plan, what it saves and what it costs, as tables on the terminal."""
    for warning in findings.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    table = Table(title=f"Zero-shot loss on {findings.loss_data}; unpruned {findings.full_loss:.4f}")
    columns = ["criterion", "removed blocks", "loss", "x unpruned"]
    for column in columns if findings.healed is None else [*columns, "loss, healed"]:
        table.add_column(column, justify="left" if column in ("criterion", "removed blocks") else "right")
    for choice in findings.choices:
        healed = [] if choice.healed is None else [f"{choice.healed.loss:.4f}"]
        loss = f"{choice.loss:.4f}", f"{choice.loss / findings.full_loss:.3f}"
        table.add_row(escape(choice.criterion), _removed(choice), *loss, *healed)
    console.print(table)
    if findings.healed is not None:
        console.print(repairs_table(findings.healed.repairs))
    before, after = findings.before, findings.after
    rows = [("parameters", before.parameters, after.parameters), ("FLOPs, forward", before.forward, after.forward)]
    if before.sample is not None and after.sample is not None:
        rows.append(("FLOPs, sampling", before.sample, after.sample))
    sizes = Table(title=f"Size per observation under '{escape(findings.plan.criterion)}' (counted)")
    for column in ("", "before", "after", "share that stays"):
        sizes.add_column(column, justify="right" if column else "left")
    for label, full, pruned in rows:
        sizes.add_row(label, f"{full:.4g}", f"{pruned:.4g}", f"{pruned / full:.0%}")
    console.print(sizes)


def _removed(choice: Choice) -> str:
    """Removed blocks of each group, coupled towers once."""
    shown = {}
    for name, tower in choice.plan.towers.items():
        group = next((g for g in choice.plan.coupled if name in g), (name,))
        if tower.removed:
            shown["+".join(group)] = " ".join(map(str, tower.removed))
    if len(shown) == 1:
        return next(iter(shown.values()))
    return "; ".join(f"{group}: {blocks}" for group, blocks in shown.items()) or "none"
