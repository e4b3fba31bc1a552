"""What ``clp finetune`` reads and which parameters it trains, known to be good before anything is written."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from clp_jax.checkpoint import Spec
from clp_jax.commands.data_flags import open_data
from clp_jax.commands.depths_flags import open_cuts
from clp_jax.commands.teacher_flags import Teacher, open_teacher
from clp_jax.cuts import WHOLE, Cut, cut_of, smaller
from clp_jax.data import CalibrationData, TrainingData
from clp_jax.errors import InputError
from clp_jax.loading import default_dtype, read_architecture
from clp_jax.models import Architecture, abstract_params, family_of
from clp_jax.plan import PrunePlan
from clp_jax.training.adapters import with_adapters
from clp_jax.training.freezing import frozen_paths
from clp_jax.training.optimizer import check_undecayed
from clp_jax.training.resumption import Entry
from clp_jax.training.throughput import step_flops
from clp_jax.trees import flatten


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
      spec: the checkpoint that it begins from.
      architecture: of the model that is trained, running as the flags say.
      data: what it is trained on.
      held: observations of the held-out loss by the number of their data set, with its weight; perhaps none.
      plans: of the cuts that are trained beside the whole model.
      teacher: if one teaches.
      begun: the ``clp.json`` of the newest saved step of a resumed run; None without.
    """

    spec: Spec
    architecture: Architecture
    data: TrainingData
    held: dict[int, tuple[float, CalibrationData]]
    plans: list[PrunePlan]
    teacher: Teacher | None
    begun: Mapping[str, Any] | None

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """What takes turns: the whole model, and its cuts."""
        return (WHOLE, *map(cut_of, self.plans))

    def entry(self, flags: Mapping[str, Any]) -> Entry:
        """What saved steps record of it and of the flags."""
        teacher = None if self.teacher is None else self.teacher.spec
        held_out = None if flags["holdout_data"] is None else self.held[0][1].fingerprint
        return Entry.of(self.spec, self.data, flags, teacher=teacher, cuts=self.plans, held_out=held_out)

    def step_flops(self, trained_share: float, *, action_samples: int) -> float:
        """One observation in a step, the mean over what takes turns."""
        lengths = CalibrationData(self.data.read(self.data.rows[:1]), self.data.fingerprint).lengths
        each = [
            step_flops(
                smaller(self.architecture, cut),
                trained_share,
                lengths,
                cameras=len(self.data.cameras),
                action_samples=action_samples,
                teacher=None if self.teacher is None else self.teacher.teaching.architecture,
            )
            for cut in self.cuts
        ]
        return sum(each) / len(each)


def read_inputs(config: Any, spec: Spec, architecture: Architecture, begun: Mapping[str, Any] | None) -> Inputs:
    """Read and compare all that a run needs.

    Args:
      config: the command's flags.
      spec: the checkpoint that is trained.
      architecture: of the model that is trained.
      begun: the ``clp.json`` of the newest saved step of a resumed run.

    Raises:
      InputError: something is missing or damaged, or does not go with something else.
    """
    data = open_data(
        config,
        config.data,
        architecture,
        assets=spec.assets,
        hold_out_ratio=config.holdout_ratio if config.holdout_data is None else 0.0,
        seed=config.seed,
        record=spec.plan_record if begun is None else begun,
        new_run=begun is None,
    )
    held = _held_out(config, architecture, spec, data, begun)
    plans = open_cuts(config, spec, architecture)
    teacher = open_teacher(config, spec, architecture, data, lambda one: _as_asked(config, one))
    return Inputs(spec, architecture, data, held, plans, teacher, begun)


@dataclasses.dataclass(frozen=True)
class Trained:
    """Which parameters are trained.

    Attributes:
      frozen: names of those that are not.
      frozen_rows: rows of axis 0 that are not, by the name of a parameter that otherwise is.
      count: numbers that are trained.
      total: numbers that there are.
    """

    frozen: frozenset[str]
    frozen_rows: dict[str, tuple[int, ...]]
    count: int
    total: int


def read_trained_architecture(config: Any, spec: Spec) -> Architecture:
    """The architecture of the model that is trained, with the adapters that the flags add.

    Raises:
      InputError: flags that do not go with the checkpoint or with each other.
    """
    dtype = config.dtype or default_dtype()
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype} is not an activation dtype; give float32 or bfloat16.")
    architecture = read_architecture(spec, dtype=dtype, may_lack_adapters=config.lora, **config.model_settings())
    if config.lora_ranks and not config.lora:
        raise InputError("--lora-ranks is for new adapters; give --lora, too, or leave it out.")
    if config.lora:
        architecture = with_adapters(architecture, config.lora_ranks)
    if architecture.action_dim is None and config.action_samples != 1:
        raise InputError(f"--action-samples is for flow matching; a {architecture.kind} draws no noise, leave it out.")
    return _as_asked(config, architecture)


def _as_asked(config: Any, architecture: Architecture) -> Architecture:
    """The architecture, running as the flags say."""
    changes: dict[str, Any] = {"remat": config.remat}
    if not config.dropout:
        if not hasattr(architecture, "dropout"):
            raise InputError(f"a {architecture.kind} has no dropout; leave out --no-dropout.")
        changes["dropout"] = False
    if config.skip_dead is not None:
        if not hasattr(architecture, "skip_dead"):
            raise InputError(f"--skip-dead is not for a {architecture.kind} model; leave it out.")
        changes["skip_dead"] = config.skip_dead
    return dataclasses.replace(architecture, **changes)


def trained_parameters(config: Any, architecture: Architecture, not_decayed: str | None) -> Trained:
    """Upstream's choice of what is trained, but where a flag decides.

    Args:
      config: the command's flags.
      architecture: of the model that is trained.
      not_decayed: ``--not-decayed`` as it was given, not upstream's.

    Raises:
      InputError: nothing would be trained, or a rule matches no name.
    """
    leaves, family = flatten(abstract_params(architecture)), family_of(architecture)
    frozen = frozen_paths(
        tuple(leaves), freeze=config.freeze, train=config.train, default=family.frozen_rules(architecture)
    )
    check_undecayed(not_decayed, set(leaves) - frozen)
    decided = {path for path in leaves if any(re.fullmatch(rule, path) for rule in config.train)} | frozen
    rows = family.frozen_rows(architecture, leaves)
    rows = {path: numbers for path, numbers in rows.items() if path not in decided}
    total = sum(leaf.size for leaf in leaves.values())
    still = sum(leaves[path].size for path in frozen)
    still += sum(len(numbers) * leaves[path].size // leaves[path].shape[0] for path, numbers in rows.items())
    return Trained(frozen, rows, total - still, total)


def _held_out(
    config: Any, architecture: Architecture, spec: Spec, data: TrainingData, begun: Mapping[str, Any] | None
) -> dict[int, tuple[float, CalibrationData]]:
    """The observations of the held-out loss of each set, perhaps none. ``begun`` is the record of a resumed run."""
    if not config.evaluate_every:
        if config.holdout_data is not None:
            raise InputError(
                "--holdout-data is for the held-out loss, which --evaluate-every 0 leaves out; give one of them."
            )
        return {}
    if config.holdout_data is None:
        return data.held_out_sets(config.evaluate_observations)
    other = open_data(
        dataclasses.replace(config, weights=(), episodes=()),
        config.holdout_data,
        architecture,
        assets=spec.assets,
        hold_out_ratio=0.0,
        seed=config.seed,
        stats=data.norm_stats,
        record=spec.plan_record if begun is None else begun,
        new_run=begun is None,
    )
    if config.holdout_data in config.data or other.fingerprint == data.fingerprint:
        raise InputError(
            f"--holdout-data {config.holdout_data} is what the run trains on; give other data, or leave it out, so "
            "that --holdout-ratio keeps some of its episodes apart."
        )
    return {0: (1.0, other.calibration(config.evaluate_observations))}
