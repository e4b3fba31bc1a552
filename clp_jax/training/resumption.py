"""Whether a run that goes on would go on with the same computation: identity by content, not by names of files."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from clp_jax.checkpoint import Spec, fingerprint
from clp_jax.cuts import cut_of
from clp_jax.data import TrainingData
from clp_jax.errors import InputError
from clp_jax.plan import PrunePlan
from clp_jax.processing import norm_stats
from clp_jax.processing.conventions import Conventions, conventions_of_json

_CONTENT = ("source_fingerprint", "data_fingerprint", "teacher_fingerprint", "cuts")
_PLACES = ("checkpoint", "data", "teacher", "analysis", "holdout_data", "depths")
"""Flags that say where something is: another path to the same content is the same run, and so are the same cuts."""
_DECIDES_CONVENTIONS = (
    *("openpi_config", "data_config", "robot", "image", "state_key", "action_key", "prompt", "asset_id", "norm_stats"),
    *("action_horizon", "max_token_len", "state_in_prompt"),
)
"""Flags whose outcome is recorded and compared in their place: a robot's file may move, but not change."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a run read and was told, as its saved steps record it.

    Attributes:
      source: path of the checkpoint.
      source_fingerprint: identity of its content.
      data_fingerprint: identity of the data's rows.
      pictures_fingerprint: identity of its videos or pictures; None without.
      config: resolved flags of the command.
      conventions: between the robot and the model, which several flags and files decide.
      statistics_fingerprint: identity of the values that normalise; None where the data are normalised.
      teacher_fingerprint: identity of the content of the checkpoint that teaches; None without.
      cuts: plans of the smaller depths that are trained, as JSON values; None without.
      held_out_fingerprint: identity of the rows of a data set of its own for the held-out loss; None without.
    """

    source: str
    source_fingerprint: str
    data_fingerprint: str
    pictures_fingerprint: str | None
    config: Mapping[str, Any]
    conventions: Conventions | None = None
    statistics_fingerprint: str | None = None
    teacher_fingerprint: str | None = None
    cuts: Sequence[Mapping[str, Any]] | None = None
    held_out_fingerprint: str | None = None

    @classmethod
    def of(
        cls,
        spec: Spec,
        data: TrainingData,
        config: Mapping[str, Any],
        *,
        teacher: Spec | None = None,
        cuts: Sequence[PrunePlan] = (),
        held_out: str | None = None,
    ) -> "Entry":
        """The entry of a run that begins from a checkpoint, with these data and flags."""
        return cls(
            str(spec.path),
            fingerprint(spec),
            data.fingerprint,
            data.pictures,
            config,
            data.conventions,
            None if data.norm_stats is None else norm_stats.fingerprint(data.norm_stats),
            None if teacher is None else fingerprint(teacher),
            [dataclasses.replace(plan, scores={}).to_json() for plan in cuts] or None,
            held_out,
        )

    def to_json(self) -> dict[str, Any]:
        """JSON values for the record."""
        conventions = None if self.conventions is None else self.conventions.to_json()
        return json.loads(json.dumps(dataclasses.asdict(self) | {"conventions": conventions}))


def check_same_run(
    before: Mapping[str, Any], now: Entry, *, may_change: Collection[str], defaults: Mapping[str, Any]
) -> str | None:
    """Compare a resumed run with the one that it goes on with.

    Args:
      before: the entry of the newest saved step.
      now: of this run.
      may_change: flags that do not change what is computed.
      defaults: values of flags that a run from before they existed did not record.

    Returns:
      A sentence for the user where the videos or pictures are others than before, as after a repair; else None.

    Raises:
      InputError: settings, checkpoint or rows differ; all differences are listed.
    """
    new = now.to_json()
    old_flags, new_flags = (
        {name: _unset(value) for name, value in (dict(defaults) | entry["config"]).items() if name not in may_change}
        for entry in (before, new)
    )
    recorded = before.get("conventions") is not None
    by_content = (*_PLACES, *(_DECIDES_CONVENTIONS if recorded else ()))
    old = {name: value for name, value in old_flags.items() if name not in by_content}
    # Runs from before it was recorded say nothing about the last one.
    content = [*_CONTENT, *(("held_out_fingerprint",) if "held_out_fingerprint" in before else ())]
    old |= {name: before.get(name) for name in content}
    wanted = {name: value for name, value in new_flags.items() if name not in by_content}
    wanted |= {name: new[name] for name in content}
    if recorded:
        old |= _conventions(before)
        wanted |= dict.fromkeys(_conventions(before)) | _conventions(new)
    changed = [
        f"{name} was {_told(name, old.get(name))}, is {_told(name, value)}"
        for name, value in wanted.items()
        if old.get(name) != value
    ]
    if changed:
        raise InputError(f"--resume goes on with the same settings: {'; '.join(changed)}. Or begin in another --out.")
    pictures = before.get("pictures_fingerprint")
    if pictures is None or pictures == now.pictures_fingerprint:
        return None
    return "The rows are those of the run, but its videos or pictures have changed since; going on with what is there."


def _conventions(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Everything between robot and model by name, without the name of the robot's file."""
    values = conventions_of_json(entry["conventions"]).to_json()
    robot = {f"robot.{name}": value for name, value in (values.pop("robot") or {}).items() if name != "name"}
    return values | robot | {"statistics_fingerprint": entry.get("statistics_fingerprint")}


def _told(name: str, value: Any) -> str:
    """A value in a message; of cuts the blocks that stay."""
    if name != "cuts" or value is None:
        return str(value)
    cuts = (cut_of(PrunePlan.from_json(plan)) for plan in value)
    return " and ".join(", ".join(f"{tower} {' '.join(map(str, blocks))}" for tower, blocks in cut) for cut in cuts)


def _unset(value: Any) -> Any:
    """None for the empty list of a flag that is not given, which older runs recorded as None."""
    return None if value in ([], ()) else value
