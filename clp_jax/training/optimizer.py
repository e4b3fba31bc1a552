"""AdamW with clipping by the global norm and a warm-up cosine schedule; defaults are openpi's."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import optax

from clp_jax.aliases import Array, Leaf

Schedule = Literal["warmup-cosine", "cosine-from-start"]
"""The cosine begins at the end of the warm-up (openpi), or at the first step, hidden by the warm-up (lerobot)."""


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
    clip_norm: float = 1.0
    """The gradient's global norm is clipped to this."""
    schedule: Schedule = "warmup-cosine"
    """Where the cosine begins: after the warm-up, as in openpi, or at the start, as in lerobot."""


def learning_rate(settings: OptimizerSettings) -> optax.Schedule:
    """The learning rate as a function of the number of steps done.

    >>> float(learning_rate(OptimizerSettings(warmup_steps=10, peak_lr=1.0))(10))
    1.0
    """
    if settings.schedule == "cosine-from-start":
        return _cosine_from_start(settings)
    return optax.warmup_cosine_decay_schedule(
        init_value=settings.peak_lr / (settings.warmup_steps + 1),
        peak_value=settings.peak_lr,
        warmup_steps=settings.warmup_steps,
        decay_steps=settings.decay_steps,
        end_value=settings.decay_lr,
    )


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


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """The transformation; its state has openpi's structure, so that openpi can go on with our runs."""
    adamw = optax.adamw(
        learning_rate(settings),
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw)
