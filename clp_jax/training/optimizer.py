"""AdamW with clipping by the global norm and a warm-up cosine schedule; defaults are openpi's."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import optax

from clp_jax.aliases import Array, Leaf, Tree
from clp_jax.errors import InputError
from clp_jax.trees import flatten, unflatten

Schedule = Literal["warmup-cosine", "zero-warmup-cosine", "cosine-from-start"]
"""The cosine begins at the end of the warm-up, which climbs from peak / (steps + 1) (openpi) or from 0 (transformers);
or at the first step, hidden by the warm-up (lerobot)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The update rule (openpi training/optimizer.py, commit 15a9616)."""

    peak_lr: float = 2.5e-5
    """Learning rate after the warm-up."""
    warmup_steps: int = 1000
    """Steps from almost zero to the peak."""
    decay_steps: int = 30_000
    """Step, counted from the start, at which the cosine has reached --decay-lr."""
    decay_lr: float = 2.5e-6
    """Learning rate after the decay."""
    b1: float = 0.9
    """Decay of AdamW's first moment."""
    b2: float = 0.95
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 1e-10
    """Decoupled weight decay."""
    not_decayed: str = ""
    """Regular expression over whole names of parameters without weight decay; an empty one decays all."""
    clip_norm: float = 1.0
    """The gradient's global norm is clipped to this."""
    schedule: Schedule = "warmup-cosine"
    """Where warm-up and cosine begin: see `Schedule`."""

    @classmethod
    def among(cls, values: Mapping[str, Any]) -> "OptimizerSettings":
        """Those of the values that are settings of the update rule, by name."""
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})


def learning_rate(settings: OptimizerSettings) -> optax.Schedule:
    """The learning rate as a function of the number of steps done.

    >>> float(learning_rate(OptimizerSettings(warmup_steps=10, peak_lr=1.0))(10))
    1.0
    """
    if settings.schedule == "cosine-from-start":
        return _cosine_from_start(settings)
    from_zero = settings.schedule == "zero-warmup-cosine"
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if from_zero else settings.peak_lr / (settings.warmup_steps + 1),
        peak_value=settings.peak_lr,
        warmup_steps=settings.warmup_steps,
        # A run may end with its warm-up; optax wants one step of the cosine.
        decay_steps=max(settings.decay_steps, settings.warmup_steps + 1),
        end_value=settings.decay_lr,
    )


def check_schedule(settings: OptimizerSettings) -> None:
    """Raise where the cosine would be over before the warm-up.

    Raises:
      InputError: names both flags.
    """
    if settings.decay_steps < settings.warmup_steps:
        raise InputError(
            f"--decay-steps {settings.decay_steps} is reached before the warm-up of --warmup-steps "
            f"{settings.warmup_steps} ends, so nothing decays; give fewer --warmup-steps or more --decay-steps."
        )


def what_is_odd(settings: OptimizerSettings, steps: int) -> list[str]:
    """What a run's learning rate does that its flags do not let expect, in sentences.

    Args:
      settings: of the run.
      steps: of the run.

    >>> what_is_odd(OptimizerSettings(), 30_000)
    []
    >>> what_is_odd(OptimizerSettings(peak_lr=1.0, warmup_steps=9, decay_lr=0.0), 5)
    ['the run ends within the warm-up of 9 steps: its highest learning rate is 0.5, not the 1 of --peak-lr']
    """
    odd = []
    if steps <= settings.warmup_steps:
        highest = float(learning_rate(settings)(steps - 1))
        odd.append(
            f"the run ends within the warm-up of {settings.warmup_steps} steps: its highest learning rate is "
            f"{highest:.3g}, not the {settings.peak_lr:g} of --peak-lr"
        )
    if settings.decay_lr > settings.peak_lr:
        odd.append(
            f"--decay-lr {settings.decay_lr:g} is above --peak-lr {settings.peak_lr:g}: the learning rate climbs"
        )
    return odd


def _cosine_from_start(settings: OptimizerSettings) -> optax.Schedule:
    peak, end = settings.peak_lr, settings.decay_lr

    def rate(step: Leaf) -> Array:
        done = jnp.asarray(step, jnp.float32)
        first = 1.0 / (settings.warmup_steps + 1)
        warmup = peak * (first + (1.0 - first) * done / max(settings.warmup_steps, 1))
        share = jnp.minimum(done, settings.decay_steps) / settings.decay_steps
        cosine = end + (peak - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * share))
        return jnp.where(done < settings.warmup_steps, warmup, cosine)

    return rate


def undecayed(pattern: str, paths: Iterable[str]) -> frozenset[str]:
    """The parameters whose whole names match, which have no weight decay.

    Raises:
      InputError: the pattern is no regular expression.

    >>> sorted(undecayed(".*/bias", ["dense/kernel", "dense/bias"]))
    ['dense/bias']
    """
    try:
        rule = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--not-decayed {pattern!r} is no regular expression: {error}.") from None
    return frozenset(path for path in paths if rule.fullmatch(path))


def check_undecayed(pattern: str | None, trained: Iterable[str]) -> None:
    """Raise where ``--not-decayed``, as the user gave it, matches nothing that is trained.

    Raises:
      InputError: the pattern matches no name, or is no regular expression.
    """
    if pattern and not undecayed(pattern, trained):
        raise InputError(
            f"--not-decayed {pattern!r} matches the name of no parameter that is trained; correct it, or give '' to "
            "decay all."
        )


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """The transformation; where all is decayed its state has openpi's structure, so openpi can go on with our runs."""

    def decayed(params: Tree) -> Tree:
        exempt = undecayed(settings.not_decayed, flatten(params))
        return unflatten({path: path not in exempt for path in flatten(params)})

    adamw = optax.adamw(
        learning_rate(settings),
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=decayed if settings.not_decayed else None,
    )
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw)
