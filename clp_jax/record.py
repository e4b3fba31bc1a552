"""``clp.json``: what was done to a checkpoint, written beside it."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import Any

from clp_jax.errors import InputError
from clp_jax.plan import PrunePlan, compose
from clp_jax.version import __version__

SCHEMA = 1
_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class Record:
    """Content of ``clp.json``.

    Attributes:
      plan: from the *original* model to this checkpoint: pruning a pruned checkpoint composes the plans.
      steps: the single prunings in order, each with its plan, criterion, source, data and settings.
    """

    plan: PrunePlan
    steps: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values for the file."""
        return {
            "schema": SCHEMA,
            "kind": self.plan.kind,
            "plan": self.plan.to_json(),
            "steps": list(self.steps),
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
) -> Record:
    """The record of a checkpoint made from one whose record is ``previous``.

    Args:
      previous: the source's ``clp.json``, None for an unpruned checkpoint.
      plan: what was done now, in the source's own block numbers.
      source: path of the source.
      source_fingerprint: its fingerprint.
      config: resolved flags of the command.
      calibration: counts and fingerprint of the data, None if no data was used.

    Raises:
      InputError: ``previous`` is no record that this version knows.
    """
    step = {
        "criterion": plan.criterion,
        "plan": plan.to_json(),
        "source": source,
        "source_fingerprint": source_fingerprint,
        "calibration": None if calibration is None else dict(calibration),
        "config": dict(config),
    }
    if previous is None:
        return Record(plan, (step,))
    if previous.get("schema") != SCHEMA or "plan" not in previous:
        raise InputError(f"the source's clp.json has schema {previous.get('schema')}, this version reads {SCHEMA}.")
    return Record(compose(PrunePlan.from_json(previous["plan"]), plan), (*previous.get("steps", ()), step))


def versions() -> dict[str, str]:
    """Installed versions of the packages that shape a result."""
    found = {"clp-jax": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
