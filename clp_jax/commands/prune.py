"""``clp prune``: write the smaller checkpoint."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from etils import epath
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape

from clp_jax.checkpoint import FolderSpec, RewriteReport, Spec, read_spec
from clp_jax.commands.healing_table import repairs_table
from clp_jax.commands.measuring import (
    DepthFlags,
    MeasureFlags,
    check_couple,
    check_heals,
    few_held_out,
    load,
    load_to_heal,
)
from clp_jax.commands.prune_choice import Measured, chosen_plan, refuse_flags_of_other_ways, stated_plan, way_of
from clp_jax.commands.results import print_json
from clp_jax.folders import is_remote
from clp_jax.healing import check_removes, heal
from clp_jax.history import REPORT, REPORT_KEY
from clp_jax.loading import read_architecture
from clp_jax.models import Architecture, Shape
from clp_jax.outputs import check_free
from clp_jax.plan import PrunePlan
from clp_jax.planning import check_depth, check_plan
from clp_jax.progress import progress, track
from clp_jax.provenance import cuts_of
from clp_jax.prune import Changes, prune_checkpoint
from clp_jax.trees import flatten


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(MeasureFlags, DepthFlags):
    """Write a checkpoint without the blocks that go. Give one of --data, --analysis, --plan and --keep.

    With --heal, --data may stand beside one of the others: it says what to heal on. A step of clp finetune --depths
    needs none of them for a depth that it was trained at; with --criterion, --data chooses other blocks to heal.
    """

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
    heal: bool = False
    """Repair what the cut breaks, without training: refit the last weights of the kept blocks, from the first gap on,
    on --data, so that what is left does what the full model does. For models that are used as they are; who fine-tunes
    does not need it."""
    json: bool = False
    """Print JSON instead of sentences."""
    overwrite: bool = False
    """Replace --out if it exists."""


def run(config: Prune) -> None:
    """Run the command."""
    console, spec = Console(stderr=config.json), read_spec(config.checkpoint)
    check_free(config.out, by="clp prune", overwrite=config.overwrite, sources=[spec.path])
    has_cuts = bool(cuts_of(spec.plan_record))
    check_heals(config, [config.rule()])
    way = way_of(config, has_cuts=has_cuts)
    refuse_flags_of_other_ways(config, way, spec)
    if way == "data" and has_cuts and config.criterion is None:
        console.print(
            "note: this step was trained at several depths; --data chooses blocks anew. Without it the trained cut of "
            "--keep-layers comes out.",
            soft_wrap=True,
        )
    shape = _shape(config, spec)
    check_depth(config.depth(), config.rule(), shape)
    check_couple(config, shape)
    stated = stated_plan(config, way, spec, shape)
    if stated is not None:  # before minutes of reading
        check_plan(stated, shape)
    if stated is not None and config.heal:
        check_removes(stated)
    measured = (load_to_heal if config.heal else load)(config.checkpoint, config.data, config) if config.data else None
    plan, calibration = (stated, None) if stated is not None else chosen_plan(config, spec, measured, console)
    check_plan(plan, shape)
    changes = _healed(measured, plan, config, console) if config.heal and measured is not None else None
    written = write(spec, plan, config, calibration, changes)
    notes = [*written.notes]
    if (spec.path.parent / "train_state").exists():
        notes.append("The optimiser state (train_state) was not carried over: it belongs to the old depth.")
    record = {
        "checkpoint": config.out,
        "criterion": plan.criterion,
        "removed": {name: list(tower.removed) for name, tower in plan.towers.items()},
        "parameters": {"before": stored_count(spec), "after": stored_count(read_spec(config.out))},
        "bytes": written.bytes_out,
        "seconds": written.seconds,
        "loss": (calibration or {}).get("loss"),
        "healed": None if changes is None else changes.record,
        "notes": notes,
        "report": report_of(config),
    }
    _tell(console, plan, record)
    if config.json:
        print_json(record)


def _tell(console: Console, plan: PrunePlan, record: Mapping[str, Any]) -> None:
    """Print what was written."""
    for name, tower in plan.towers.items():
        if tower.removed:
            console.print(
                f"{name:7} {tower.depth} -> {len(tower.keep)} blocks; removed {', '.join(map(str, tower.removed))}"
            )
    before, after = record["parameters"]["before"], record["parameters"]["after"]
    console.print(
        f"{before:,} -> {after:,} parameters ({after / before:.0%}), "
        f"{decimal(record['bytes'])} in {record['seconds']:.1f} s"
    )
    for note in record["notes"]:
        console.print(escape(note))
    console.print(f"Checkpoint: [bold]{escape(record['checkpoint'])}[/]", soft_wrap=True)
    if record["report"] is not None:
        console.print(f"Report behind the choice: [bold]{escape(record['report'])}[/]", soft_wrap=True)


def _healed(measured: Measured, plan: PrunePlan, config: Prune, console: Console) -> Changes:
    """What healing changes, and a table of what it won."""
    model, calibration, evaluation = measured
    assert evaluation is not None
    for sentence in few_held_out(evaluation):
        console.print(f"[yellow]warning:[/] {escape(sentence)}")
    healed = heal(
        model,
        plan,
        calibration,
        evaluation,
        batch_size=config.group_size * config.groups_per_batch,
        progress=lambda fits, total: track(fits, "healing", unit="fits", total=total),
    )
    console.print(repairs_table(healed.repairs))
    won = "" if math.isnan(healed.won_back) else f": {healed.won_back:.0%} of what the cut added is won back"
    console.print(
        f"loss on {len(evaluation)} held-out observations: full {healed.full:.4f}, cut {healed.pruned:.4f}, healed "
        f"{healed.healed:.4f}{won}"
    )
    return healed.changes


def _shape(config: Prune, spec: Spec) -> Architecture | Shape:
    """What the plan must fit. A folder of safetensors is cut by a given plan without a model."""
    if isinstance(spec, FolderSpec) and (config.plan is not None or config.keep):
        return spec.shape
    return read_architecture(spec, **config.model_settings())


def stored_count(spec: Spec) -> int:
    """Numbers that a checkpoint stores."""
    shapes = spec.tensors.values() if isinstance(spec, FolderSpec) else flatten(spec.tree).values()
    return sum(math.prod(leaf.shape) for leaf in shapes)


def write(
    spec: Spec,
    plan: PrunePlan,
    config: Prune,
    calibration: Mapping[str, Any] | None,
    changes: Changes | None = None,
) -> RewriteReport:
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
            REPORT_KEY: report_of(config),
        }
        return prune_checkpoint(
            spec,
            plan,
            config.out,
            config=settings,
            calibration=calibration,
            changes=changes,
            overwrite=config.overwrite,
            progress=show,
        )


def report_of(config: Prune) -> str | None:
    """The page that ``clp analyse`` or ``clp advise`` wrote beside the plan; None if there is none."""
    if config.analysis is None and config.plan is None:
        return None
    folder = epath.Path(config.analysis) if config.plan is None else epath.Path(config.plan).parent
    page = folder.expanduser() / REPORT
    return os.fspath(page if is_remote(page) else page.resolve()) if page.exists() else None
