"""``clp.json`` of a checkpoint: what was done to it, step by step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clp_jax.checkpoint import Spec
from clp_jax.errors import InputError
from clp_jax.plan import PrunePlan, compose


@dataclasses.dataclass(frozen=True)
class Step:
    """One thing that was done to a checkpoint.

    Attributes:
      command: "prune" or "finetune".
      source: path of the checkpoint it was done to.
      source_fingerprint: its fingerprint.
      criterion: how blocks were chosen; None if none were.
      removed: per tower the blocks that went, in the source's numbers; None if it was no pruning.
      steps: of training, as asked for; None if it was none.
      data: that were used, if any.
      healed: the record of the healing of a cut, None if it was not healed.
      plan: of a pruning, JSON values.
    """

    command: str
    source: str | None
    source_fingerprint: str | None
    criterion: str | None
    removed: dict[str, tuple[int, ...]] | None
    steps: int | None
    data: str | None
    healed: dict[str, Any] | None
    plan: dict[str, Any] | None


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
    return PrunePlan.from_json(record["plan"]), tuple(map(_step, record["steps"]))


def blocks_of_source(spec: Spec, source_fingerprint: str) -> tuple[dict[str, tuple[int, ...]], bool] | None:
    """Which blocks of another checkpoint a checkpoint consists of, by its ``clp.json``.

    Args:
      spec: the checkpoint.
      source_fingerprint: of the other.

    Returns:
      Per tower that was cut the blocks of the other, and whether it was trained since; None if it was not made of it.
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
    return keep, any(step.plan is None for step in steps[begin:])


def _step(step: Mapping[str, Any]) -> Step:
    config, calibration = step.get("config") or {}, step.get("calibration") or {}
    plan = None if step.get("plan") is None else PrunePlan.from_json(step["plan"])
    data = config.get("data") or calibration.get("data")
    return Step(
        step["command"],
        source=step.get("source"),
        source_fingerprint=step.get("source_fingerprint"),
        criterion=step.get("criterion"),
        removed=None if plan is None else {name: tower.removed for name, tower in plan.towers.items()},
        steps=config.get("steps") if isinstance(config.get("steps"), int) else None,
        data=None if data is None else " + ".join(map(str, data if isinstance(data, list) else [data])),
        healed=step.get("healed"),
        plan=None if plan is None else plan.to_json(),
    )
