"""Which blocks ``clp prune`` leaves: chosen on data or from an analysis, or as a plan, a list or the training says."""

import dataclasses
from typing import Any

from rich.console import Console

from clp_jax.analysis import loss_of
from clp_jax.checkpoint import FolderSpec, Spec
from clp_jax.commands.data_flags import DataFlags
from clp_jax.commands.depths_flags import trained_cut
from clp_jax.commands.measuring import (
    MeasureFlags,
    analysis_of,
    check_vision,
    evidence_options,
    healed_cuts,
    measure,
)
from clp_jax.commands.model_flags import ModelFlags
from clp_jax.commands.unused import refuse_unused
from clp_jax.data import CalibrationData
from clp_jax.errors import InputError
from clp_jax.healed_cuts import HealedCuts
from clp_jax.loading import LoadedModel
from clp_jax.models import Architecture, Shape
from clp_jax.plan import PrunePlan
from clp_jax.planning import Depth, choose, plan_of_blocks
from clp_jax.provenance import cuts_of
from clp_jax.sensitivity import open_gates, plan_gates

Measured = tuple[LoadedModel, CalibrationData, CalibrationData | None]
"""The model, calibration data, and held-out data where there are enough episodes."""


def way_of(config: Any, *, has_cuts: bool) -> str:
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
        alone = "; or --keep-layers alone for a depth that this step was trained at" if has_cuts and not given else ""
        raise InputError(
            f"give exactly one of --data, --analysis, --plan and --keep; given: {', '.join(given) or 'none'}{alone}."
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


def _fields(flags: type) -> set[str]:
    return {field.name for field in dataclasses.fields(flags)}


_OF_CHOOSING = {"states", "estimator", "couple"}
_OF_MODELS = _fields(ModelFlags)
_OF_DATA = _fields(DataFlags) | {
    *("max_observations", "holdout_ratio", "group_size", "groups_per_batch", "dtype", "fsdp_devices", "seed")
}
"""What is read with ``--data``, to choose by them or to heal on them."""
_OF_MEASURING = _fields(MeasureFlags) - _OF_CHOOSING - _OF_MODELS - _OF_DATA


def refuse_flags_of_other_ways(config: Any, way: str, spec: Spec) -> None:
    """Raise on flags that are not read where blocks are chosen already.

    Args:
      config: the flags.
      way: of `way_of`.
      spec: the checkpoint.

    Raises:
      InputError: names the flags.
    """
    if way == "data":
        check_vision(config, shows=False)
        return
    if way == "trained" and not cuts_of(spec.plan_record):  # no way at all, which `stated_plan` tells
        return
    chooses = way == "analysis" and config.depth().is_given
    if way == "analysis" and not chooses:
        reason = "the plan of --analysis holds as it is"
        refuse_unused(config, _OF_CHOOSING, reason, instead="say how deep to choose anew")
    reason, instead = "the training of this checkpoint already says which blocks stay", ""
    if way == "analysis":
        reason, instead = "--analysis was measured already", "give {it} to clp analyse"
    elif way != "trained":
        reason = f"--{way} already says which blocks stay"
    names = {*_OF_MEASURING, *(() if chooses else _OF_CHOOSING)}
    if not config.heal:
        names |= _OF_DATA - ({"seed"} if chooses and config.rule() == "random" else set())
        names |= _OF_MODELS if isinstance(spec, FolderSpec) and way in ("plan", "keep") else set()
    refuse_unused(config, names, reason, instead=instead)


def stated_plan(config: Any, way: str, spec: Spec, shape: Architecture | Shape) -> PrunePlan | None:
    """The plan, where a file, a list or the training says it.

    Args:
      config: the flags.
      way: of `way_of`.
      spec: the checkpoint.
      shape: what the plan must fit.

    Raises:
      InputError: the flags, the file that they name and the checkpoint do not fit together.
    """
    if config.plan is not None:
        return PrunePlan.load(config.plan)
    if config.keep:
        return plan_of_blocks(shape, blocks_of(config.keep))
    return _plan_of_training(config, spec, shape) if way == "trained" else None


def chosen_plan(config: Any, spec: Spec, measured: Measured | None, console: Console) -> tuple[PrunePlan, dict]:
    """The plan, where evidence says it, and what is to be recorded of the data behind it.

    Args:
      config: the flags.
      spec: the checkpoint.
      measured: the model and its data, where the plan is chosen by them.
      console: is told what the choice costs.

    Raises:
      InputError: the flags, the analysis and the checkpoint do not fit together.
    """
    if config.analysis is not None:
        return _plan_of_analysis(config, spec, measured)
    assert measured is not None
    model, calibration, evaluation = measured
    analysis = measure(model, calibration, config, [config.rule()])
    loss = loss_of(model, calibration) if config.rule() == "greedy" else None
    healed = _healed_cuts(config, measured)
    options = evidence_options(config)
    plan = choose(analysis, config.rule(), config.depth(), options, loss=loss, healed=healed, seed=config.seed)
    held, name = (calibration, "calibration") if evaluation is None else (evaluation, "held-out")
    evaluate = loss_of(model, held)
    full, pruned = evaluate(open_gates(model.architecture)), evaluate(plan_gates(model.architecture, plan))
    console.print(
        f"zero-shot loss on {len(held)} {name} observations: {full:.4f} -> {pruned:.4f} (before any fine-tuning)"
    )
    return plan, analysis.meta | {"loss": {"data": name, "full": full, "pruned": pruned}}


def _plan_of_analysis(config: Any, spec: Spec, measured: Measured | None) -> tuple[PrunePlan, dict]:
    assert config.analysis is not None
    analysis = analysis_of(config.analysis, spec, otherwise=", or give the plan alone with --plan")
    if not config.depth().is_given:
        return PrunePlan.load(f"{config.analysis}/plan.json"), analysis.meta
    options, healed = evidence_options(config), _healed_cuts(config, measured)
    return choose(analysis, config.rule(), config.depth(), options, healed=healed, seed=config.seed), analysis.meta


def _healed_cuts(config: Any, measured: Measured | None) -> HealedCuts | None:
    if measured is None or config.rule() != "healed":
        return None
    return healed_cuts(*measured, config)


def _plan_of_training(config: Any, spec: Spec, shape: Architecture | Shape) -> PrunePlan:
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
