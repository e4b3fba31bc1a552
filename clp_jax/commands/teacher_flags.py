"""``--teacher``: a checkpoint that teaches a fine-tuning, and what must be true of it."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from clp_jax.checkpoint import Spec, read_spec
from clp_jax.commands.data_flags import stats_of_checkpoint
from clp_jax.data import CalibrationData, TrainingData
from clp_jax.errors import InputError
from clp_jax.flops import parameter_count
from clp_jax.loading import read_architecture
from clp_jax.models import Architecture
from clp_jax.processing import norm_stats
from clp_jax.processing.conventions import differences
from clp_jax.processing.norm_stats import NormStats
from clp_jax.provenance import conventions_of
from clp_jax.training.teaching import DEFAULT_WEIGHT, Teaching, check_teacher, same_blocks

Config = TypeVar("Config", bound="TeacherFlags")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherFlags:
    """A model that teaches, usually the one that the checkpoint was pruned from."""

    teacher: str | None = None
    """Checkpoint whose output is a second target of the training, on the same images, noise and times: the full model,
    fine-tuned or as it is. It must be of the same kind, with the same conventions and statistics."""
    teacher_weight: float | None = None
    """Share of the teacher in the loss, the task keeps the rest; 0.5 if absent. 1 trains on the teacher alone."""
    teacher_states: float = 0.0
    """Weight of the distance between the hidden states of each block and of the same block of the teacher, on top."""

    def with_teachers_weight(self: Config) -> Config:
        """The flags with the weight that holds.

        Raises:
          InputError: there is no teacher for a weight, or no weight for the teacher.
        """
        if self.teacher is None:
            given = {"--teacher-weight": self.teacher_weight is not None, "--teacher-states": self.teacher_states != 0}
            if any(given.values()):
                raise InputError(f"{next(flag for flag in given if given[flag])} is for --teacher; give one as well.")
            return self
        weight = DEFAULT_WEIGHT if self.teacher_weight is None else self.teacher_weight
        if weight == self.teacher_states == 0:
            raise InputError(
                "--teacher-weight 0 without --teacher-states: the teacher has no say; leave --teacher out."
            )
        return dataclasses.replace(self, teacher_weight=weight)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A checkpoint that teaches, and how."""

    spec: Spec
    teaching: Teaching

    def __str__(self) -> str:
        one = self.teaching
        states = f", of its hidden states {one.states:g}" if one.states else ""
        size = f"{parameter_count(one.architecture):,} parameters in {one.architecture.dtype}"
        return f"Teacher: {self.spec.path}, {size}, weight {one.weight:g}{states}"


def open_teacher(
    config: Any,
    spec: Spec,
    architecture: Architecture,
    data: TrainingData,
    as_asked: Callable[[Architecture], Architecture],
) -> Teacher | None:
    """The teacher of a run, compared with the run before anything is compiled; None without ``--teacher``.

    Args:
      config: the command's flags.
      spec: the checkpoint that is trained.
      architecture: of the model that is trained.
      data: what it is trained on.
      as_asked: an architecture with what the command's flags say about running it.

    Raises:
      InputError: it is no checkpoint, of another kind or size of action, of other conventions or statistics; or states
        are to be compared, and nobody knows which block is which.
    """
    if config.teacher is None:
        return None
    found = read_spec(config.teacher)
    settings = config.model_settings()
    teacher = read_architecture(found, dtype=architecture.dtype, may_lack_adapters=True, **settings)
    weights = {"weight": config.teacher_weight, "states": config.teacher_states}
    teaching = Teaching(architecture=teacher, **weights)
    lengths = CalibrationData(data.read(data.rows[:1]), data.fingerprint).lengths
    check_teacher(architecture, teaching, lengths)
    for note in (_check_conventions(found, data), _check_statistics(found, teacher, data)):
        if note is not None:
            print(f"note: {note}", file=sys.stderr)
    blocks = same_blocks(architecture, teacher, spec.plan_record, found.plan_record) if teaching.states else ()
    return Teacher(found, dataclasses.replace(teaching, architecture=as_asked(teacher), blocks=blocks))


def _check_conventions(spec: Spec, data: TrainingData) -> str | None:
    """Raise where the teacher was trained with others; a sentence for the user where nobody can tell."""
    trained = conventions_of(spec.plan_record)
    if trained is None or data.conventions is None:
        return f"nothing says with which conventions the teacher {spec.path} was trained, so they were not compared"
    # Statistics may have been saved under another name.
    unlike = [entry for entry in differences(trained, data.conventions) if entry[0] != "asset_id"]
    if unlike:
        said = "; ".join(f"{name} is {theirs} by its clp.json, {ours} in this run" for name, theirs, ours in unlike)
        raise InputError(f"the teacher {spec.path} was trained with other conventions: {said}. Train with its own.")
    return None


def _check_statistics(spec: Spec, teacher: Architecture, data: TrainingData) -> str | None:
    """Raise where the teacher's normalise otherwise; a sentence for the user where nobody can tell."""
    theirs = _statistics(spec, teacher, data)
    if theirs is None or data.norm_stats is None:
        whose = "the data are normalised already" if theirs is not None else f"the teacher {spec.path} has none"
        return f"statistics of normalisation were not compared with the teacher's: {whose}"
    if (unlike := norm_stats.difference(theirs, data.norm_stats)) is not None:
        raise InputError(
            f"the teacher {spec.path} was trained with other statistics: {unlike} in this run. Give the teacher's with "
            "--norm-stats."
        )
    return None


def _statistics(spec: Spec, teacher: Architecture, data: TrainingData) -> Mapping[str, NormStats] | None:
    """Those of the name that the teacher's run, or this one, gave them; else the only ones that it has."""
    if spec.assets is None:
        return None
    trained = conventions_of(spec.plan_record)
    for name in (None if trained is None else trained.asset_id, data.asset_id):
        if name is not None and (found := stats_of_checkpoint(spec.assets, name, teacher)[0]) is not None:
            return found
    try:
        return stats_of_checkpoint(spec.assets, None, teacher)[0]
    except InputError as error:
        raise InputError(f"the teacher {spec.path}: {error}") from None
