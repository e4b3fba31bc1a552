"""How the runs of ``clp advise`` train: as ``clp finetune`` would, but for the schedule and the average."""

import dataclasses
from typing import TYPE_CHECKING

from clp_jax.commands.upstream_flags import with_upstream_defaults
from clp_jax.models import Architecture, abstract_params, family_of
from clp_jax.training import OptimizerSettings, Run, StepSettings
from clp_jax.training.freezing import frozen_paths
from clp_jax.trees import flatten

if TYPE_CHECKING:
    from clp_jax.commands.advise import Advise


def trial_of(config: "Advise", peak_lr: float, architecture: Architecture, steps: int) -> Run:
    """A run without the average of parameters, unless a flag asks for it.

    The authors' average is made for long runs, too: after some forty steps it is still near the checkpoint.
    """
    run = run_of(config, peak_lr, architecture, steps)
    if config.ema_decay != "upstream":
        return run
    return dataclasses.replace(run, step=dataclasses.replace(run.step, ema_decay=None))


def run_of(config: "Advise", peak_lr: float, architecture: Architecture, steps: int) -> Run:
    """The authors' settings, but for the schedule: theirs is made for runs a hundred times as long.

    It is of the run's own length, whatever rung that is; where flags name steps, these are the same in every run.
    """
    family, leaves = family_of(architecture), flatten(abstract_params(architecture))
    given = {name: getattr(config, name) for name in ("warmup_steps", "decay_steps", "decay_lr")}
    own = {"warmup_steps": max(steps // 10, 1), "decay_steps": steps, "decay_lr": peak_lr / 10}
    schedule = {name: own[name] if value is None else value for name, value in given.items()}
    told = dataclasses.replace(config, peak_lr=peak_lr, **schedule)
    told, _ = with_upstream_defaults(told, family.training_defaults(architecture, steps))
    assert told.batch_size is not None and not isinstance(told.ema_decay, str)
    return Run(
        steps=steps,
        batch_size=told.batch_size,
        optimizer=OptimizerSettings.among(vars(told)),
        step=StepSettings(
            ema_decay=told.ema_decay,
            frozen=frozen(architecture),
            frozen_rows=tuple(sorted(family.frozen_rows(architecture, leaves).items())),
        ),
        frozen_dtype=None if told.frozen_dtype == "keep" else told.frozen_dtype,
        seed=told.seed,
        workers=told.workers,
        evaluate_every=0,
        save_every=0,
    )


def frozen(architecture: Architecture) -> frozenset[str]:
    """Upstream's choice of what is not trained: no flag changes it here."""
    leaves = flatten(abstract_params(architecture))
    return frozen_paths(tuple(leaves), default=family_of(architecture).frozen_rules(architecture))
