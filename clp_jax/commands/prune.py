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
from rich.table import Table

from clp_jax.analysis import loss_of
from clp_jax.checkpoint import FolderSpec, RewriteReport, Spec, read_spec
from clp_jax.commands.depths_flags import trained_cut
from clp_jax.commands.measuring import DepthFlags, MeasureFlags, analysis_of, evidence_options, load, measure
from clp_jax.commands.results import print_json
from clp_jax.data import CalibrationData
from clp_jax.errors import InputError
from clp_jax.folders import is_remote
from clp_jax.healing import heal
from clp_jax.history import REPORT, REPORT_KEY
from clp_jax.loading import LoadedModel, read_architecture
from clp_jax.models import Architecture, Shape
from clp_jax.outputs import check_free
from clp_jax.plan import PrunePlan
from clp_jax.planning import Depth, check_depth, check_plan, choose, plan_of_blocks
from clp_jax.progress import progress, track
from clp_jax.provenance import cuts_of
from clp_jax.prune import Changes, prune_checkpoint
from clp_jax.sensitivity import open_gates, plan_gates
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
    way = _way(config, has_cuts=has_cuts)
    _refuse_unused(config, way)
    if way == "data" and has_cuts and config.criterion is None:
        console.print(
            "note: this step was trained at several depths; --data chooses blocks anew. Without it the trained cut of "
            "--keep-layers comes out.",
            soft_wrap=True,
        )
    shape = _shape(config, spec)
    check_depth(config.depth(), config.rule(), shape)
    measured = _load(config) if config.data else None
    plan, calibration = _plan(config, way, spec, shape, measured, console)
    check_plan(plan, shape)
    changes = _healed(measured, plan, config, console) if config.heal and measured is not None else None
    written = write(spec, plan, config, calibration, changes)
    before, after = stored_count(spec), stored_count(read_spec(config.out))
    notes, report = [*written.notes], report_of(config)
    if (spec.path.parent / "train_state").exists():
        notes.append("The optimiser state (train_state) was not carried over: it belongs to the old depth.")
    for name, tower in plan.towers.items():
        if tower.removed:
            console.print(
                f"{name:7} {tower.depth} -> {len(tower.keep)} blocks; removed {', '.join(map(str, tower.removed))}"
            )
    console.print(
        f"{before:,} -> {after:,} parameters ({after / before:.0%}), "
        f"{decimal(written.bytes_out)} in {written.seconds:.1f} s"
    )
    for note in notes:
        console.print(escape(note))
    console.print(f"Checkpoint: [bold]{escape(config.out)}[/]", soft_wrap=True)
    if report is not None:
        console.print(f"Report behind the plan: [bold]{escape(report)}[/]", soft_wrap=True)
    if config.json:
        print_json(
            {
                "checkpoint": config.out,
                "criterion": plan.criterion,
                "removed": {name: list(tower.removed) for name, tower in plan.towers.items()},
                "parameters": {"before": before, "after": after},
                "bytes": written.bytes_out,
                "seconds": written.seconds,
                "loss": (calibration or {}).get("loss"),
                "healed": None if changes is None else changes.record,
                "notes": notes,
                "report": report,
            }
        )


def _way(config: Prune, *, has_cuts: bool) -> str:
    """The flag that says which blocks go; "trained" where the training of the checkpoint says it.

    Args:
      config: the flags.
      has_cuts: whether the checkpoint was trained at several depths.

    Raises:
      InputError: there is none, or several that contradict each other.
    """
    ways = {name: getattr(config, name) for name in ("data", "analysis", "plan", "keep")}
    given = [name for name, value in ways.items() if value not in (None, ())]
    if config.heal and "data" not in given:
        raise InputError("--heal needs observations: give --data, which may stand beside --plan, --keep or --analysis.")
    of_training = has_cuts and config.keep_layers and config.criterion is None
    if config.heal and (len(given) > 1 or of_training):
        given.remove("data")
    if not given and config.keep_layers:
        return "trained"
    if len(given) != 1:
        raise InputError(
            f"give exactly one of --data, --analysis, --plan and --keep; given: {', '.join(given) or 'none'}."
        )
    if given[0] in ("plan", "keep") and (config.depth() != Depth() or config.criterion is not None):
        raise InputError(f"--{given[0]} already says which blocks stay; leave out the depth and the criterion.")
    if given[0] == "analysis" and config.criterion is not None and config.depth() == Depth():
        raise InputError(
            "--criterion chooses anew from the matrices of --analysis: say how deep, too; without it the plan there "
            "holds as it is."
        )
    if (given[0] == "data" or config.keep_vision_layers is not None) and not config.depth().is_given:
        raise InputError("say how deep: --keep-layers, --keep-ratio, --threshold or --auto.")
    return given[0]


def _refuse_unused(config: Prune, way: str) -> None:
    """Raise on flags that say how blocks are chosen where they are chosen already.

    Args:
      config: the flags.
      way: of `_way`.
    """
    if way == "data":
        return
    chooses = way == "analysis" and config.depth().is_given
    flags = {
        "--samples": config.samples != Prune.samples,
        "--max-samples": config.max_samples != Prune.max_samples,
        "--vision": config.vision != Prune.vision,
    }
    if not chooses:
        flags |= {
            "--states": config.states != Prune.states,
            "--estimator": config.estimator != Prune.estimator,
            "--couple": config.couple != Prune.couple,
        }
    said = " and ".join(flag for flag, is_given in flags.items() if is_given)
    if not said:
        return
    if chooses:
        raise InputError(f"{said}: --analysis was measured already; give it to clp analyse, or leave it out.")
    if way == "analysis":
        raise InputError(
            f"{said}: the plan of --analysis holds as it is; say how deep to choose anew, or leave it out."
        )
    whose = "the training of this checkpoint" if way == "trained" else f"--{way}"
    raise InputError(f"{said}: {whose} already says which blocks stay; leave it out.")


_Measured = tuple[LoadedModel, CalibrationData, CalibrationData | None]


def _load(config: Prune) -> _Measured:
    """The model and its data. Healing fits differences between states, which bfloat16 would round away."""
    dtype = "float32" if config.heal and config.dtype is None else config.dtype
    measured = load(config.checkpoint, config.data, dataclasses.replace(config, dtype=dtype))
    if config.heal and measured[2] is None:
        raise InputError(
            "--heal chooses by episodes that are held out, and there are none: give data of more episodes, or a larger "
            "--holdout-ratio."
        )
    return measured


def _healed(measured: _Measured, plan: PrunePlan, config: Prune, console: Console) -> Changes:
    """What healing changes, and a table of what it won."""
    model, calibration, evaluation = measured
    assert evaluation is not None
    healed = heal(
        model,
        plan,
        calibration,
        evaluation,
        batch_size=config.group_size * config.groups_per_batch,
        progress=lambda fits, total: track(fits, "healing", unit="fits", total=total),
    )
    table = Table(title="Distance of the stream from what the next block expects, held-out data")
    for column in ("tower", "block", "removed after it", "before", "healed"):
        table.add_column(column, justify="right" if column in ("block", "before", "healed") else "left")
    for one in healed.repairs:
        after = f"left alone: {one.why_not}" if one.why_not else f"{one.after:.1%}"
        after = after if one.why_not or one.ridges else "left alone: every fit does worse"
        before = "" if math.isnan(one.before) else f"{one.before:.1%}"
        block = "" if one.block is None else str(one.block)
        table.add_row(escape(one.tower), block, " ".join(map(str, one.removed)), before, after)
    console.print(table)
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


def _plan(
    config: Prune, way: str, spec: Spec, shape: Architecture | Shape, measured: _Measured | None, console: Console
) -> tuple[PrunePlan, dict | None]:
    """The plan, and what is to be recorded of the data behind it."""
    if config.plan is not None:
        return PrunePlan.load(config.plan), None
    if config.keep:
        return plan_of_blocks(shape, blocks_of(config.keep)), None
    if way == "trained":
        return _plan_of_training(config, spec, shape), None
    if way == "analysis":
        return _plan_of_analysis(config, spec)
    assert measured is not None
    model, calibration, evaluation = measured
    analysis = measure(model, calibration, config, [config.rule()])
    loss = loss_of(model, calibration) if config.rule() == "greedy" else None
    options = evidence_options(config)
    plan = choose(analysis, config.rule(), config.depth(), options, loss=loss, seed=config.seed)
    held, name = (calibration, "calibration") if evaluation is None else (evaluation, "held-out")
    evaluate = loss_of(model, held)
    full, pruned = evaluate(open_gates(model.architecture)), evaluate(plan_gates(model.architecture, plan))
    console.print(
        f"zero-shot loss on {len(held)} {name} observations: {full:.4f} -> {pruned:.4f} (before any fine-tuning)"
    )
    return plan, analysis.meta | {"loss": {"data": name, "full": full, "pruned": pruned}}


def _plan_of_analysis(config: Prune, spec: Spec) -> tuple[PrunePlan, dict]:
    assert config.analysis is not None
    analysis = analysis_of(config.analysis, spec, otherwise=", or give the plan alone with --plan")
    if not config.depth().is_given:
        return PrunePlan.load(f"{config.analysis}/plan.json"), analysis.meta
    options = evidence_options(config)
    return choose(analysis, config.rule(), config.depth(), options, seed=config.seed), analysis.meta


def _plan_of_training(config: Prune, spec: Spec, shape: Architecture | Shape) -> PrunePlan:
    """The cut of this depth that a run of ``clp finetune --depths`` trained.

    Raises:
      InputError: there was no such run, it trained other depths, or a criterion is asked for.
    """
    known = cuts_of(spec.plan_record)
    if not known:
        raise InputError("give one of --data, --analysis, --plan and --keep: they say which blocks stay.")
    if config.criterion is not None:
        raise InputError(
            "blocks of a trained cut are chosen; leave out --criterion, or give --data or --analysis to choose others."
        )
    otherwise = "give --data, --analysis, --plan or --keep for another"
    if config.heal:
        otherwise = "say with --criterion how to choose others on --data"
    return trained_cut(known, config.depth(), shape, flag="keep_layers", otherwise=otherwise)


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
