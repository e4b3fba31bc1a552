"""``clp.json`` of a checkpoint: what was done to it, step by step."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from clp_jax.checkpoint import Spec
from clp_jax.errors import InputError
from clp_jax.plan import PrunePlan, compose
from clp_jax.provenance import STEPS_DONE, refitted

REPORT = "report.html"
"""The page in an output folder that a person opens first."""
REPORT_KEY = "report"
"""Where a pruning's settings say which page stood beside the plan that it followed."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One thing that was done to a checkpoint.

    Attributes:
      command: "prune" or "finetune".
      source: path of the checkpoint it was done to.
      source_fingerprint: its fingerprint.
      criterion: how blocks were chosen; None if none were.
      removed: per tower the blocks that went, in the source's numbers; None if it was no pruning.
      steps: of training that were done; None if it was none, or nothing says so.
      steps_asked: of training that were asked for.
      data: that a training read, or by which the blocks of a pruning were chosen; None if nothing says so.
      healed: the record of the healing of a cut, None if it was not healed.
      healed_on: the data that it was healed on.
      plan: of a pruning, JSON values.
      cuts: per cut that was trained beside the whole model, the blocks that stay of every tower that loses some.
      report: path of the page of ``analyse`` or ``advise`` beside the plan that a pruning followed, which may have
        moved since; None if there was none.
    """

    command: str
    source: str | None
    source_fingerprint: str | None
    criterion: str | None
    removed: dict[str, tuple[int, ...]] | None
    steps: int | None
    steps_asked: int | None
    data: str | None
    healed: dict[str, Any] | None
    healed_on: str | None
    plan: dict[str, Any] | None
    cuts: tuple[dict[str, tuple[int, ...]], ...]
    report: str | None


def history_of(spec: Spec) -> tuple[PrunePlan | None, tuple[Step, ...]]:
    """The plan from the original model to a checkpoint and what was done, by its ``clp.json``.

    Args:
      spec: the checkpoint.

    Returns:
      None and nothing without such a file.
    """
    record = spec.plan_record
    if record is None:
        return None, ()
    return PrunePlan.from_json(record["plan"]), steps_of(record)


def steps_of(record: Mapping[str, Any]) -> tuple[Step, ...]:
    """What was done, by the content of a ``clp.json``."""
    return tuple(map(_step, record["steps"]))


def reports_of(spec: Spec) -> dict[str, bool]:
    """Paths of the pages behind a checkpoint's cuts, and of the run that saved it, with whether they are still there.

    Args:
      spec: the checkpoint.
    """
    record = spec.plan_record
    if record is None:
        return {}
    found = {step.report: _is_there(step.report) for step in steps_of(record) if step.report is not None}
    page = spec.path.parent.parent / REPORT
    if record.get("training") is not None and page.exists():
        found[os.fspath(page)] = True
    return found


def _is_there(path: str) -> bool:
    """Whether a page can be looked at from here; without a network, or the package for gs://, it cannot."""
    try:
        return epath.Path(path).exists()
    except Exception:  # noqa: BLE001
        return False


def places_of(reports: Mapping[str, bool]) -> list[str]:
    """`reports_of` as lines for a person.

    >>> places_of({"analysis/report.html": True, "old/report.html": False})
    ['analysis/report.html', 'not found, it was at old/report.html']
    """
    return [path if there else f"not found, it was at {path}" for path, there in reports.items()]


def length_of(step: Step) -> str:
    """How long a fine-tuning was, in words; empty where nothing says so."""
    done, asked = step.steps, step.steps_asked
    if done is None:
        return "" if asked is None else f"at most {asked:,} steps"
    return f"{done:,} steps" if asked is None or asked <= done else f"{done:,} of {asked:,} steps"


class Descent(NamedTuple):
    """How a checkpoint was made of another.

    Attributes:
      blocks: per tower that was cut the blocks of the other, in order.
      healed: whether any of its blocks were refitted.
      trained: whether it was trained.
    """

    blocks: dict[str, tuple[int, ...]]
    healed: bool
    trained: bool


def blocks_of_source(spec: Spec, source_fingerprint: str) -> Descent | None:
    """Which blocks of another checkpoint a checkpoint consists of, by its ``clp.json``.

    Args:
      spec: the checkpoint.
      source_fingerprint: of the other.

    Returns:
      None if it was not made of it.
    """
    whole, steps = history_of(spec)
    begin = next((i for i, step in enumerate(steps) if step.source_fingerprint == source_fingerprint), None)
    if begin is None:
        return None
    plan = None
    try:
        for step in steps[begin:]:
            if step.plan is not None:
                then = PrunePlan.from_json(step.plan)
                plan = then if plan is None else compose(plan, then)
    except InputError as error:
        raise InputError(f"the steps in clp.json of {spec.path} do not follow each other: {error}") from None
    keep = {} if plan is None else {name: tower.keep for name, tower in plan.towers.items() if tower.removed}
    for name, blocks in keep.items():
        if len(blocks) != len(whole.towers[name].keep if whole and name in whole.towers else blocks):
            raise InputError(f"clp.json of {spec.path} gives tower {name!r} two depths; copy the checkpoint again")
    since = steps[begin:]
    healed = any(step.healed is not None and refitted(step.healed) for step in since)
    return Descent(keep, healed, any(step.plan is None for step in since))


def _step(step: Mapping[str, Any]) -> Step:
    config, calibration = step.get("config") or {}, step.get("calibration") or {}
    plan = None if step.get("plan") is None else PrunePlan.from_json(step["plan"])
    given, healed = config.get("data"), step.get("healed")
    # Beside a plan, a list of blocks, a trained cut or an analysis, --data says what to heal on and chooses nothing,
    # unless the criterion heals to choose.
    chosen = healed is None or (calibration and not config.get("analysis")) or step.get("criterion") == "healed"
    return Step(
        step["command"],
        source=step.get("source"),
        source_fingerprint=step.get("source_fingerprint"),
        criterion=step.get("criterion"),
        removed=None if plan is None else {name: tower.removed for name, tower in plan.towers.items()},
        steps=_count(step.get(STEPS_DONE)),
        steps_asked=_count(config.get("steps")),
        data=_joined((given if chosen else None) or calibration.get("data")),
        healed=healed,
        healed_on=None if healed is None else _joined(given),
        plan=None if plan is None else plan.to_json(),
        cuts=tuple(map(_blocks_left, step.get("cuts") or [])),
        report=config.get(REPORT_KEY),
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _joined(data: Any) -> str | None:
    """Names of data sets as one; None without."""
    return " + ".join(map(str, data if isinstance(data, list) else [data])) if data else None


def _blocks_left(cut: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tower.keep for name, tower in PrunePlan.from_json(cut).towers.items() if tower.removed}
