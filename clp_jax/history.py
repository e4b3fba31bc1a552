"""``clp.json`` of a checkpoint, read back strictly: what was done to it, step by step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clp_jax.checkpoint import Spec
from clp_jax.editable_json import typed
from clp_jax.errors import InputError
from clp_jax.plan import PrunePlan, compose
from clp_jax.provenance import SCHEMA


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
      plan: of a pruning, JSON values.
    """

    command: str
    source: str | None
    source_fingerprint: str | None
    criterion: str | None
    removed: dict[str, tuple[int, ...]] | None
    steps: int | None
    data: str | None
    plan: dict[str, Any] | None


def history_of(spec: Spec) -> tuple[PrunePlan | None, tuple[Step, ...]]:
    """The plan from the original model to a checkpoint and what was done, by its ``clp.json``.

    Args:
      spec: the checkpoint.

    Returns:
      None and nothing without such a file.

    Raises:
      InputError: the file is damaged or of another version.
    """
    record: Any = spec.plan_record
    if record is None:
        return None, ()
    try:
        typed(record, dict, "it")
        for key in ("schema", "plan", "steps"):
            if key not in record:
                raise InputError(f"it lacks {key!r}")
        if typed(record["schema"], int, "schema") != SCHEMA:
            raise InputError(f"it has schema {record['schema']}, this version reads {SCHEMA}")
        plan = PrunePlan.from_json(record["plan"])
        return plan, tuple(map(_step, typed(record["steps"], list, "steps")))
    except InputError as error:
        raise InputError(f"clp.json of {spec.path} is damaged: {error}; copy the checkpoint again") from None


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


def _step(value: Any) -> Step:
    step: Mapping[str, Any] = typed(value, dict, "every one of steps")
    if "command" not in step:
        raise InputError("one of steps lacks 'command'")
    command = typed(step["command"], str, "command of a step")
    texts = {key: _optional(step, key, str) for key in ("source", "source_fingerprint", "criterion")}
    config = _optional(step, "config", dict) or {}
    calibration = _optional(step, "calibration", dict) or {}
    plan = None if step.get("plan") is None else PrunePlan.from_json(step["plan"])
    data = config.get("data") or calibration.get("data")
    return Step(
        command,
        **texts,
        removed=None if plan is None else {name: tower.removed for name, tower in plan.towers.items()},
        steps=config.get("steps") if isinstance(config.get("steps"), int) else None,
        data=None if data is None else " + ".join(map(str, data if isinstance(data, list) else [data])),
        plan=None if plan is None else plan.to_json(),
    )


def _optional(step: Mapping[str, Any], key: str, wanted: type) -> Any:
    return None if step.get(key) is None else typed(step[key], wanted, f"{key} of a step")
