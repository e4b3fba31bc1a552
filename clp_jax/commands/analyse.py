"""``clp analyse``: measure which blocks are twins of their neighbours, and propose a plan."""

import dataclasses
import json
from collections.abc import Collection
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from clp_jax.analysis import Analysis, EvidenceOptions, analyse, loss_of
from clp_jax.checkpoint import fingerprint, read_spec, staged
from clp_jax.commands.data_flags import DataFlags, open_data
from clp_jax.data import CalibrationData
from clp_jax.errors import InputError
from clp_jax.findings import Choice, Findings, clp_stability, compare_criteria, intervals, size_of, warnings_of
from clp_jax.loading import LoadedModel, load_model, read_architecture
from clp_jax.models import Architecture, Gates
from clp_jax.progress import track
from clp_jax.report import write_report
from clp_jax.selection import CRITERIA, Evidence, how_many
from clp_jax.similarity import Estimator, Samples, Sampling, StateScale
from clp_jax.version import __version__

_LEROBOT_OBSERVATIONS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthFlags:
    """How much to remove; at most one of the first four."""

    keep_layers: int | None = None
    """Blocks of the language stack that stay."""
    keep_ratio: float | None = None
    """Share of the blocks that stay, rounded up."""
    threshold: float | None = None
    """Remove every twin with a CKA of at least this to its predecessor."""
    auto: bool = False
    """Remove up to the knee of the jump-cost curve, at most half."""
    keep_vision_layers: int | None = None
    """Blocks of the image encoder that stay (needs --vision); all if absent."""
    criterion: str | None = None
    """Which blocks go: clp (the paper's rule; the default where a depth or threshold is given), jumps (the default with
    --auto), greedy, gauss-newton, gateprobe, cosine, angular, mse, residual, first, random."""

    def asks_for_depth(self) -> bool:
        """Whether any of the four ways was used."""
        return self.auto or any(x is not None for x in (self.keep_layers, self.keep_ratio, self.threshold))

    def finds_depth(self) -> bool:
        """Whether the depth is that of the knee."""
        return self.auto or not self.asks_for_depth()

    def rule(self) -> str:
        """The criterion that is asked for, or the default."""
        return self.criterion or ("jumps" if self.finds_depth() else "clp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureFlags(DataFlags):
    """On which observations and how to measure."""

    max_observations: int | None = None
    """At most this many observations, held-out ones included; all of a .npz, 256 of a LeRobot set if absent."""

    samples: Samples = "tokens"
    """Rows of CKA: tokens; observations (mean-pooled); tokens-per-observation (one CKA each, then averaged)."""
    states: StateScale = "raw"
    """CKA of hidden states as they are (the paper) or RMS-normalised (robust to massive channels)."""
    estimator: Estimator = "biased"
    """The paper's biased CKA, or the debiased one (HSIC_1)."""
    couple: Annotated[str, tyro.conf.arg(metavar="mean|min|vlm|action")] = "mean"
    """How the two experts, which share their blocks, are joined."""
    group_size: int = 4
    """Observations whose tokens form one HSIC estimate."""
    max_samples: int = 2048
    """At most this many tokens of a group are used."""
    groups_per_batch: int = 1
    """Groups of one forward pass."""
    holdout_ratio: float = 0.25
    """Share of the episodes kept apart for the losses of the report."""
    vision: bool = False
    """Also measure the image encoder."""
    dtype: str | None = None
    """Activations: float32 or bfloat16; by default float32 on CPU, bfloat16 (openpi's) elsewhere."""
    lora_scale: float = 1.0
    """alpha / rank of LoRA adapters on attention, if the checkpoint has any."""
    fsdp_devices: int = 1
    """Split large parameters over this many devices."""
    seed: int = 0
    """Of the hold-out, the grouping and the criterion random."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analyse(MeasureFlags, DepthFlags):
    """Measure which blocks of a checkpoint are twins of their neighbours, and propose an editable plan."""

    checkpoint: str
    """openpi checkpoint: step folder or its params, local or gs://."""
    data: str
    """.npz of model-ready observations, LeRobot folder or hub id."""
    out: str
    """Folder to create: similarity.npz, plan.json, findings.json, report.html, heat maps."""
    compare: tuple[str, ...] = tuple(name for name in CRITERIA if name not in ("greedy", "gauss-newton"))
    """Criteria whose losses at the same depth are compared. Not by default: gauss-newton, which runs the model forward
    twice per block, and greedy, which runs it some hundred times."""
    overwrite: bool = False
    """Replace --out if it exists."""


def run(config: Analyse) -> None:
    """Run the command."""
    console = Console()
    for name in config.compare:
        if name not in CRITERIA:
            raise InputError(f"--compare {name} is no criterion; choose from {', '.join(CRITERIA)}.")
    with staged(config.out, overwrite=config.overwrite, sources=[config.checkpoint, config.data]) as folder:
        model, calibration, evaluation = load(config.checkpoint, config.data, config)
        analysis = measure(model, calibration, config, {*config.compare, config.rule()})
        findings = find(model, analysis, calibration, evaluation, config, config.compare)
        analysis.save(folder / "similarity.npz")
        findings.plan.save(folder / "plan.json")
        (folder / "findings.json").write_text(json.dumps(findings.to_json(), indent=2, allow_nan=False) + "\n")
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        write_report(folder, analysis, findings, evidence_options(config))
    print_findings(console, findings)
    console.print(f"\nReport: [bold]{config.out}/report.html[/]   plan to edit: [bold]{config.out}/plan.json[/]")


def evidence_options(config: MeasureFlags) -> EvidenceOptions:
    """The flags that say how matrices become evidence."""
    return EvidenceOptions(config.states, config.estimator, config.couple)


def load(
    checkpoint: str, data: str, config: MeasureFlags
) -> tuple[LoadedModel, CalibrationData, CalibrationData | None]:
    """The model on its devices, calibration data and held-out data (None if there are too few episodes)."""
    if not 0.0 <= config.holdout_ratio < 1.0:
        raise InputError(f"--holdout-ratio {config.holdout_ratio} must be at least 0 and below 1.")
    if config.group_size < 1 or config.max_samples < 4 or config.groups_per_batch < 1:
        raise InputError("--group-size and --groups-per-batch must be at least 1, --max-samples at least 4.")
    spec = read_spec(checkpoint)
    architecture = read_architecture(spec)
    if isinstance(config, DepthFlags):
        check_depth(config, architecture)
    # Small things first: a mistake in the data should not wait for gigabytes of parameters.
    observations = open_data(
        config, data, architecture, assets=spec.assets, hold_out_ratio=config.holdout_ratio, seed=config.seed
    )
    most = config.max_observations
    if most is None and not data.endswith(".npz"):
        most = _LEROBOT_OBSERVATIONS
    held_most = None if most is None else min(max(1, round(config.holdout_ratio * most)), most)
    held = observations.held_out(held_most, seed=config.seed)
    calibration = observations.calibration(None if most is None else most - len(held or ()), seed=config.seed)
    model = load_model(spec, dtype=config.dtype, lora_scale=config.lora_scale, fsdp_devices=config.fsdp_devices)
    return model, calibration, held


def check_depth(config: DepthFlags, architecture: Architecture) -> None:
    """Refuse a depth that no evidence could give, before anything is read or run.

    Raises:
      InputError: two ways of asking for a depth, or a number out of range.
    """
    if config.rule() not in CRITERIA:
        raise InputError(f"there is no criterion {config.criterion!r}; choose one of {', '.join(CRITERIA)}.")
    ways = {"keep_layers": config.keep_layers, "keep_ratio": config.keep_ratio}
    given = {name: value for name, value in ways.items() if value is not None}
    if len(given) + config.auto + (config.threshold is not None) > 1:
        raise InputError("give one of --keep-layers, --keep-ratio, --threshold and --auto.")
    if given:
        how_many(Evidence.unmeasured(architecture.vlm.depth), **given)
    if config.keep_vision_layers is not None:
        how_many(Evidence.unmeasured(architecture.vision.depth), keep_layers=config.keep_vision_layers)


def measure(
    model: LoadedModel, calibration: CalibrationData, config: MeasureFlags, criteria: Collection[str]
) -> Analysis:
    """One pass of similarity statistics, and the loss derivatives if asked for."""
    sampling = Sampling(config.samples, config.max_samples, config.vision)
    analysis = analyse(
        model,
        calibration,
        sampling=sampling,
        group_size=config.group_size,
        groups_per_batch=config.groups_per_batch,
        gates=not {"gateprobe", "gauss-newton"}.isdisjoint(criteria),
        gauss_newton="gauss-newton" in criteria,
        seed=config.seed,
        progress=lambda batches, total: track(batches, "analysing", unit="batches", total=total),
    )
    meta = analysis.meta | {"checkpoint": str(model.spec.path), "checkpoint_fingerprint": fingerprint(model.spec)}
    return dataclasses.replace(analysis, meta=meta | {"clp_jax": __version__})


def removals(analysis: Analysis, config: DepthFlags, options: EvidenceOptions) -> dict[tuple[str, ...], int]:
    """How many blocks go from each group of towers."""
    remove = {}
    for group in analysis.groups:
        evidence = analysis.evidence(group, options)
        if group == ("vision",):
            keep = config.keep_vision_layers
            remove[group] = 0 if keep is None else how_many(evidence, keep_layers=keep)
        else:
            remove[group] = how_many(
                evidence,
                keep_layers=config.keep_layers,
                keep_ratio=config.keep_ratio,
                threshold=config.threshold,
                auto=config.finds_depth(),
            )
    if config.keep_vision_layers is not None and ("vision",) not in remove:
        raise InputError("--keep-vision-layers needs a measured image encoder: analyse with --vision.")
    return remove


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
    remove = removals(analysis, config, options)
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
        seed=config.seed,
    )
    plan = choices[0].plan
    smaller = architecture.with_depths({tower: len(p.keep) for tower, p in plan.towers.items()})
    shape = observation_shape(data)
    return Findings(
        checkpoint=str(model.spec.path),
        plan=plan,
        choices=choices,
        full_loss=evaluation_loss(Gates()),
        loss_data=f"{len(data)} {name} observations",
        before=size_of(architecture, **shape),
        after=size_of(smaller, **shape),
        intervals=intervals(analysis, options),
        stability=clp_stability(analysis, remove, options),
        warnings=warnings_of(analysis, options),
    )


def observation_shape(data: CalibrationData) -> dict[str, int]:
    """Cameras, prompt tokens and action horizon: what operation counts depend on."""
    horizon = data.arrays["actions"].shape[1] if "actions" in data.arrays else 0
    return {"cameras": len(data.cameras), "prompt": data.arrays["tokenized_prompt"].shape[1], "horizon": horizon}


def print_findings(console: Console, findings: Findings) -> None:
    """The plan, what it saves and what it costs, as tables on the terminal."""
    for warning in findings.warnings:
        console.print(f"[yellow]warning:[/] {warning}")
    table = Table(title=f"Zero-shot loss on {findings.loss_data}; unpruned {findings.full_loss:.4f}")
    for column in ("criterion", "removed blocks", "loss", "x unpruned"):
        table.add_column(column, justify="left" if column in ("criterion", "removed blocks") else "right")
    for choice in findings.choices:
        table.add_row(
            choice.criterion, _removed(choice), f"{choice.loss:.4f}", f"{choice.loss / findings.full_loss:.3f}"
        )
    console.print(table)
    before, after = findings.before, findings.after
    rows = [("parameters", before.parameters, after.parameters), ("FLOPs, forward", before.forward, after.forward)]
    if before.sample is not None and after.sample is not None:
        rows.append(("FLOPs, sampling", before.sample, after.sample))
    sizes = Table(title=f"Size per observation under '{findings.plan.criterion}' (counted)")
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
