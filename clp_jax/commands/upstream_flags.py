"""Flags of training whose defaults are those of a model's authors, and differ from family to family."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from clp_jax.training.optimizer import Schedule

_UPSTREAM = "upstream"
"""For a flag of which None is a value of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpstreamFlags:
    """How to train; what is left out is as openpi trains π0, lerobot SmolVLA and NVIDIA GR00T."""

    peak_lr: float | None = None
    """Learning rate after the warm-up. If absent openpi's 2.5e-5 for π0; 1e-4 for SmolVLA and GR00T."""
    warmup_steps: int | None = None
    """Steps from almost zero to the peak. If absent 1000, in short runs of a SmolVLA fewer; a twentieth of the run for
    GR00T."""
    decay_steps: int | None = None
    """Step, counted from the start, at which the cosine has reached --decay-lr. If absent 30000, or the last step of a
    shorter run of a SmolVLA; the last step for GR00T."""
    decay_lr: float | None = None
    """Learning rate after the decay. If absent 2.5e-6, 0 for GR00T."""
    schedule: Schedule | None = None
    """Where the cosine begins: after the warm-up, which climbs from almost zero, as in openpi, or from zero, as for
    GR00T; or at the first step, as in lerobot."""
    b1: float | None = None
    """Decay of AdamW's first moment."""
    b2: float | None = None
    """Decay of AdamW's second moment."""
    eps: float | None = None
    """Added to the root of AdamW's second moment."""
    weight_decay: float | None = None
    """Decoupled weight decay."""
    not_decayed: str | None = None
    """Parameters without weight decay: regular expression over whole names, an empty one decays all. If absent biases
    and layer norms for GR00T, else none."""
    clip_norm: float | None = None
    """The gradient's global norm is clipped to this. If absent 1, 10 for SmolVLA."""
    batch_size: int | None = None
    """Observations of a step, over all devices. If absent 32, 8 for SmolVLA."""
    frozen_dtype: Literal["bfloat16", "keep"] | None = None
    """How frozen parameters are stored: bfloat16, as openpi does, or as they are, as lerobot and NVIDIA do."""
    ema_decay: float | Literal["upstream"] | None = _UPSTREAM
    """Decay of the average that is saved for inference; None for none. If absent 0.99 for π0, none for others."""


Config = TypeVar("Config", bound=UpstreamFlags)


def with_upstream_defaults(config: Config, defaults: Mapping[str, Any]) -> tuple[Config, str]:
    """The flags with the family's values where none was given, and these as a text.

    Args:
      config: the command's flags.
      defaults: a value for every flag of `UpstreamFlags`.
    """
    open_flags = [
        field.name
        for field in dataclasses.fields(UpstreamFlags)
        if getattr(config, field.name) == field.default  # None, or the word that stands for it
    ]
    chosen = {name: defaults[name] for name in open_flags}
    text = ", ".join(
        f"{name.replace('_', ' ')} {'none' if value in (None, '') else value}" for name, value in chosen.items()
    )
    return dataclasses.replace(config, **chosen), text
