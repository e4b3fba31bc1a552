"""``clp prune``: write the smaller checkpoint."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape

from clp_jax.analysis import Analysis, loss_of
from clp_jax.checkpoint import FolderSpec, RewriteReport, Spec, fingerprint, read_spec
from clp_jax.commands.measuring import DepthFlags, MeasureFlags, evidence_options, load, measure
from clp_jax.errors import InputError
from clp_jax.loading import read_architecture
from clp_jax.models import Architecture, Gates, Shape
from clp_jax.plan import PrunePlan
from clp_jax.planning import check_depth, check_plan, choose, plan_of_blocks
from clp_jax.progress import progress
from clp_jax.prune import prune_checkpoint
from clp_jax.sensitivity import plan_gates
from clp_jax.trees import flatten


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(MeasureFlags, DepthFlags):
    """Write a checkpoint without the blocks that go. Give one of --data, --analysis, --plan and --keep."""

    checkpoint: str
    """Checkpoint: step folder of openpi or its params, local or gs://; policy folder of lerobot; NVIDIA's folder."""
    out: str
    """Folder to create: the same kind of checkpoint, and clp.json, which says what was removed and why."""
    data: tuple[str, ...] = ()
    """.npz of model-ready observations, LeRobot folder or hub id, or several: analyse, choose and prune in one go."""
    analysis: str | None = None
    """Folder of clp analyse: its plan, or a new choice from its matrices if a depth is given."""
    plan: str | None = None
    """Plan file, perhaps edited."""
    keep: tuple[str, ...] = ()
    """Blocks that stay, e.g. 0,1,2,5; where towers are cut on their own, e.g. llm=0,1,2 dit=0,3,8,9."""
    overwrite: bool = False
    """Replace --out if it exists."""


def run(config: Prune) -> None:
    """Run the command."""
    console = Console()
    ways = {name: getattr(config, name) for name in ("data", "analysis", "plan", "keep")}
    given = [name for name, value in ways.items() if value not in (None, ())]
    if len(given) != 1:
        raise InputError(
            f"give exactly one of --data, --analysis, --plan and --keep; given: {', '.join(given) or 'none'}."
        )
    if given[0] in ("plan", "keep") and config.depth().is_given:
        raise InputError(f"--{given[0]} already says which blocks stay; leave out the depth.")
    if given[0] == "data" and not config.depth().is_given:
        raise InputError("say how deep: --keep-layers, --keep-ratio, --threshold or --auto.")
    spec = read_spec(config.checkpoint)
    shape = _shape(config, spec)
    check_depth(config.depth(), config.rule(), shape)
    plan, calibration = _plan(config, spec, shape, console)
    check_plan(plan, shape)
    report = write(spec, plan, config, calibration)
    before, after = stored_count(spec), stored_count(read_spec(config.out))
    for name, tower in plan.towers.items():
        if tower.removed:
            console.print(
                f"{name:7} {tower.depth} -> {len(tower.keep)} blocks; removed {', '.join(map(str, tower.removed))}"
            )
    console.print(
        f"{before:,} -> {after:,} parameters ({after / before:.0%}), "
        f"{decimal(report.bytes_out)} in {report.seconds:.1f} s"
    )
    for note in report.notes:
        console.print(escape(note))
    if (spec.path.parent / "train_state").exists():
        console.print("The optimiser state (train_state) was not carried over: it belongs to the old depth.")
    console.print(f"Checkpoint: [bold]{escape(config.out)}[/]")


def _shape(config: Prune, spec: Spec) -> Architecture | Shape:
    """What the plan must fit. A folder of safetensors is cut by a given plan without a model."""
    if isinstance(spec, FolderSpec) and (config.plan is not None or config.keep):
        return spec.shape
    return read_architecture(spec, **config.model_settings())


def stored_count(spec: Spec) -> int:
    """Numbers that a checkpoint stores."""
    shapes = spec.tensors.values() if isinstance(spec, FolderSpec) else flatten(spec.tree).values()
    return sum(math.prod(leaf.shape) for leaf in shapes)


def write(spec: Spec, plan: PrunePlan, config: Prune, calibration: Mapping[str, Any] | None) -> RewriteReport:
    """Stream the checkpoint without the blocks that go, with a progress bar of the bytes written."""
    with progress("writing", total=None, unit="MB") as advance:
        shown = 0

        def show(done: int, _: int) -> None:
            nonlocal shown
            advance(done // 10**6 - shown)
            shown = done // 10**6

        depth = config.depth()
        settings = dataclasses.asdict(config) | {
            "keep": " ".join(config.keep) or None,
            "keep_layers": depth.keep_layers,
            "keep_ratio": depth.keep_ratio,
        }
        return prune_checkpoint(
            spec, plan, config.out, config=settings, calibration=calibration, overwrite=config.overwrite, progress=show
        )


def _plan(config: Prune, spec: Spec, shape: Architecture | Shape, console: Console) -> tuple[PrunePlan, dict | None]:
    """The plan, and what is to be recorded of the data behind it."""
    if config.plan is not None:
        return PrunePlan.load(config.plan), None
    if config.keep:
        return plan_of_blocks(shape, blocks_of(config.keep)), None
    if config.analysis is not None:
        return _plan_of_analysis(config, spec)
    model, calibration, evaluation = load(config.checkpoint, config.data, config)
    analysis = measure(model, calibration, config, [config.rule()])
    loss = loss_of(model, calibration) if config.rule() == "greedy" else None
    options = evidence_options(config)
    plan = choose(analysis, config.rule(), config.depth(), options, loss=loss, seed=config.seed)
    held, name = (calibration, "calibration") if evaluation is None else (evaluation, "held-out")
    evaluate = loss_of(model, held)
    full, pruned = evaluate(Gates()), evaluate(plan_gates(model.architecture, plan))
    console.print(
        f"zero-shot loss on {len(held)} {name} observations: {full:.4f} -> {pruned:.4f} (before any fine-tuning)"
    )
    return plan, analysis.meta | {"loss": {"data": name, "full": full, "pruned": pruned}}


def _plan_of_analysis(config: Prune, spec: Spec) -> tuple[PrunePlan, dict]:
    folder = config.analysis
    analysis = Analysis.load(f"{folder}/similarity.npz")
    if analysis.meta.get("checkpoint_fingerprint") != fingerprint(spec):
        raise InputError(
            f"{folder} is the analysis of {analysis.meta.get('checkpoint')}, whose content differs from {spec.path}; "
            "analyse this checkpoint, or give the plan alone with --plan."
        )
    if not config.depth().is_given and config.keep_vision_layers is None:
        return PrunePlan.load(f"{folder}/plan.json"), analysis.meta
    options = evidence_options(config)
    return choose(analysis, config.rule(), config.depth(), options, seed=config.seed), analysis.meta


def blocks_of(words: tuple[str, ...]) -> list[int] | dict[str, list[int]]:
    """The blocks of ``--keep``: one list, or a list per tower.

    Raises:
      InputError: a word is no list of blocks.

    >>> blocks_of(("0,1,2",)), blocks_of(("llm=0,1", "dit=0,3"))
    ([0, 1, 2], {'llm': [0, 1], 'dit': [0, 3]})
    """
    pairs = [word.rpartition("=") for word in words]
    if len(words) > 1 and any(not equals for _, equals, _ in pairs):
        raise InputError(f"--keep {' '.join(words)}: give one list, or a list for each tower as in llm=0,1 dit=0,3.")
    if len({tower for tower, _, _ in pairs}) < len(pairs):
        raise InputError(f"--keep {' '.join(words)} names a tower twice.")
    found = {tower: _indices(text) for tower, _, text in pairs}
    return found.get("", found)


def _indices(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--keep {text!r} is no list of block numbers; write for example 0,1,2,5, or llm=0,1,2 dit=0,3,8,9."
        ) from None
