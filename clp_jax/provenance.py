"""``clp.json``: what was done to a checkpoint, written beside it."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import Any

from clp_jax.checkpoint.record import SCHEMA
from clp_jax.errors import InputError
from clp_jax.plan import PrunePlan, compose
from clp_jax.processing.conventions import Conventions, conventions_of_json
from clp_jax.version import __version__

STEPS_DONE = "steps_done"
"""Where the entry of a fine-tuning says how many steps it had done: it may have been told to do more."""
_OF_TRAINING = ("action_horizon", "max_token_len", "state_in_prompt")
_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class Record:
    """Content of ``clp.json``.

    Attributes:
      plan: from the *original* model to this checkpoint: pruning a pruned checkpoint composes the plans.
      steps: what was done, in order: prunings (with plan, criterion, source, data, settings) and fine-tunings.
      training: where a fine-tuning stands, for its resumption; None if the checkpoint is not a step of a run.
    """

    plan: PrunePlan
    steps: tuple[dict[str, Any], ...]
    training: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values for the file."""
        return {
            "schema": SCHEMA,
            "kind": self.plan.kind,
            "plan": self.plan.to_json(),
            "steps": list(self.steps),
            **({} if self.training is None else {"training": self.training}),
            "versions": versions(),
        }


def extend_record(
    previous: Mapping[str, Any] | None,
    plan: PrunePlan,
    *,
    source: str,
    source_fingerprint: str,
    config: Mapping[str, Any],
    calibration: Mapping[str, Any] | None,
    healed: Mapping[str, Any] | None = None,
) -> Record:
    """The record of a checkpoint made from one whose record is ``previous``.

    Args:
      previous: the source's ``clp.json``, None for an unpruned checkpoint.
      plan: what was done now, in the source's own block numbers.
      source: path of the source.
      source_fingerprint: its fingerprint.
      config: resolved flags of the command.
      calibration: counts and fingerprint of the data, None if no data was used.
      healed: what was done to the blocks that stay, None if nothing was.

    Raises:
      InputError: ``previous`` is no record that this version knows.
    """
    step = {
        "command": "prune",
        "criterion": plan.criterion,
        "plan": plan.to_json(),
        "source": source,
        "source_fingerprint": source_fingerprint,
        "calibration": None if calibration is None else dict(calibration),
        "config": dict(config),
        **({} if healed is None else {"healed": dict(healed)}),
    }
    if previous is None:
        return Record(plan, (step,))
    _check_schema(previous)
    return Record(compose(PrunePlan.from_json(previous["plan"]), plan), (*previous.get("steps", ()), step))


def training_record(
    previous: Mapping[str, Any] | None, unpruned: PrunePlan, step: Mapping[str, Any], training: Mapping[str, Any]
) -> Record:
    """The record of a saved step of a run that began from a checkpoint whose record is ``previous``.

    Args:
      previous: the source's ``clp.json``, None if it has none.
      unpruned: the plan that keeps all of the source's blocks.
      step: source, data and settings of the run.
      training: where it stands; nothing before the first step.

    Raises:
      InputError: ``previous`` is no record that this version knows.
    """
    done = {STEPS_DONE: training["step"] + 1} if "step" in training else {}
    step = {"command": "finetune", **step, **done}
    if previous is None:
        return Record(unpruned, (step,), dict(training))
    _check_schema(previous)
    return Record(PrunePlan.from_json(previous["plan"]), (*previous.get("steps", ()), step), dict(training))


def refitted(healed: Mapping[str, Any]) -> int:
    """How many blocks have other weights than before, by the record of a healing."""
    return sum(bool(block.get("ridges")) for block in healed.get("blocks") or [])


def healing(healed: Mapping[str, Any], data: str | None = None) -> str:
    """The record of a healing, and on which data, in a phrase.

    >>> blocks = [{"ridges": {"mlp": 0.1}}, {"ridges": {}}]
    >>> healing({"observations": 64, "blocks": blocks, "loss": {"pruned": 2, "healed": 1}}, "pushes")
    'healed, 1 of 2 blocks on 64 observations of pushes, held-out loss 2.0000 to 1.0000'
    """
    blocks, loss = healed.get("blocks") or [], healed.get("loss") or {}
    text = f"healed, {refitted(healed)} of {len(blocks)} blocks on {healed.get('observations')} observations"
    text += "" if data is None else f" of {data}"
    if not {"pruned", "healed"} <= loss.keys():
        return text
    return f"{text}, held-out loss {loss['pruned']:.4f} to {loss['healed']:.4f}"


def was_trained(record: Mapping[str, Any] | None) -> bool:
    """Whether a fine-tuning of ours made the checkpoint what it is."""
    return _last_training(record) is not None


def conventions_of(record: Mapping[str, Any] | None) -> Conventions | None:
    """What the last fine-tuning used between robot and model; None if there was none, or it did not record them.

    Raises:
      InputError: they are damaged.
    """
    step = _last_training(record)
    if step is None or step.get("conventions") is None:
        return None
    try:
        return conventions_of_json(step["conventions"])
    except InputError as error:
        raise InputError(f"the checkpoint's clp.json is damaged: {error}.") from error


def trained_with(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """Horizon, prompt length and state in the prompt of the last fine-tuning, where it recorded them."""
    step, conventions = _last_training(record), conventions_of(record)
    if step is None:
        return {}
    found = step.get("config", {}) if conventions is None else dataclasses.asdict(conventions)
    return {key: found[key] for key in _OF_TRAINING if found.get(key) is not None}


def adapters_scale(record: Mapping[str, Any] | None) -> float | None:
    """alpha / rank that the last fine-tuning that was told one gave adapters; None if none was told."""
    steps = [] if record is None else record.get("steps", ())
    told = [(step.get("config") or {}).get("lora_scale") for step in steps if step.get("command") == "finetune"]
    return next((scale for scale in reversed(told) if scale is not None), None)


def cuts_of(record: Mapping[str, Any] | None) -> list[PrunePlan]:
    """Plans of the cuts that the last thing that was done trained; none if it was no fine-tuning of several depths."""
    steps = () if record is None else record.get("steps", ())
    return [PrunePlan.from_json(plan) for plan in (steps[-1].get("cuts") or [] if steps else [])]


def _last_training(record: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    steps = [] if record is None else [step for step in record.get("steps", ()) if step.get("command") == "finetune"]
    return steps[-1] if steps else None


def _check_schema(record: Mapping[str, Any]) -> None:
    """Raise unless this version reads the record.

    Raises:
      InputError: names both schemas.
    """
    if record.get("schema") != SCHEMA or "plan" not in record:
        raise InputError(f"the source's clp.json has schema {record.get('schema')}, this version reads {SCHEMA}.")


def versions() -> dict[str, str]:
    """Installed versions of the packages that shape a result."""
    found = {"clp-jax": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
