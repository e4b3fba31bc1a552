"""What is trained by default, and how: NVIDIA's fine-tuning script and lerobot's."""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Literal

from clp_jax.models.groot.architecture import Architecture

Flavour = Literal["isaac", "lerobot"]

_PARTS = {
    "llm": r"backbone/llm/.*",
    "visual": r"backbone/(?:vision|mlp1)/.*",
    "projector": r"action_head/(?:state_encoder|action_encoder|action_decoder|position_embedding)(?:/.*)?",
    "diffusion_model": r"action_head/dit/.*",
}

_UNREAD = r"backbone/(?:vision_head/.*|llm/lm_head)"
"""Nothing reads these, so no gradient reaches them, and weight decay alone must not change them."""

FROZEN = tuple((pattern, True) for pattern in (_PARTS["llm"], _PARTS["visual"], r"backbone/vision_head/.*"))
"""Upstream's defaults as rules over whole names."""

_NOT_DECAYED = r"(?:.*/)?bias|.*/(?:vlln|norm[13]|encoder_norm|LayerNorm_[01])/scale"
"""Biases and layer norms; the biases ``b`` of the embodiments' layers have another name and are decayed."""

_LEROBOT_STEPS = 10_000
_WARMUP = 0.05


def frozen_paths(
    architecture: Architecture,
    paths: Iterable[str],
    *,
    tune_llm: bool = False,
    tune_visual: bool = False,
    tune_projector: bool = True,
    tune_diffusion_model: bool = True,
) -> frozenset[str]:
    """Names of the parameters that stay as they are under upstream's four flags.

    The norm and the transformer before the diffusion model and the future tokens have no flag: they are always trained.

    Args:
      architecture: of the model.
      paths: names of all parameters, keys joined by "/".
      tune_llm: train the language model.
      tune_visual: train the image encoder and the layer that projects its tokens.
      tune_projector: train the encoders of state and actions, the decoder and the position embedding.
      tune_diffusion_model: train the diffusion transformer.

    >>> from clp_jax.models.groot.architecture import GROOT_N15
    >>> names = ["backbone/llm/norm/scale", "action_head/vlln/scale", "action_head/dit/time_1/bias"]
    >>> sorted(frozen_paths(GROOT_N15, names, tune_diffusion_model=False))
    ['action_head/dit/time_1/bias', 'backbone/llm/norm/scale']
    """
    del architecture
    tuned = {
        "llm": tune_llm,
        "visual": tune_visual,
        "projector": tune_projector,
        "diffusion_model": tune_diffusion_model,
    }
    frozen = re.compile("|".join([_UNREAD, *(rule for part, rule in _PARTS.items() if not tuned[part])]))
    return frozenset(path for path in paths if frozen.fullmatch(path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingDefaults:
    """AdamW with clipping by the global norm, and a linear warm-up to a cosine.

    Attributes:
      peak_lr: learning rate after the warm-up.
      first_lr: learning rate of the first step.
      warmup_steps: steps of the warm-up.
      cosine_start: step from which the cosine counts.
      decay_steps: step, counted from the start, at which the cosine has reached its end.
      decay_lr: learning rate there and after.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled weight decay.
      not_decayed: regular expression over whole names of parameters without weight decay; None decays all.
      clip_norm: the gradient's global norm is clipped to this.
    """

    peak_lr: float = 1e-4
    first_lr: float
    warmup_steps: int
    cosine_start: int
    decay_steps: int
    decay_lr: float
    b1: float = 0.95
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-5
    not_decayed: str | None
    clip_norm: float


def training_defaults(architecture: Architecture, steps: int, flavour: Flavour = "isaac") -> TrainingDefaults:
    """How upstream fine-tunes for so many steps.

    Args:
      architecture: of the model; the defaults are the same for all.
      steps: of the whole run.
      flavour: NVIDIA's script (biases and layer norms are not decayed, clip 1, a cosine to 0 behind the warm-up) or
        lerobot's (all is decayed, clip 10, a cosine to a tenth that counts from the start and ends after 10,000 steps).

    >>> from clp_jax.models.groot.architecture import GROOT_N15
    >>> [training_defaults(GROOT_N15, steps, "lerobot").warmup_steps for steps in (20, 10_000)]
    [1, 500]
    """
    del architecture
    if flavour == "isaac":
        warmup = math.ceil(_WARMUP * steps)
        return TrainingDefaults(
            first_lr=0.0,
            warmup_steps=warmup,
            cosine_start=warmup,
            decay_steps=steps,
            decay_lr=0.0,
            not_decayed=_NOT_DECAYED,
            clip_norm=1.0,
        )
    decay = min(steps, _LEROBOT_STEPS)
    warmup = int(_WARMUP * decay)
    return TrainingDefaults(
        first_lr=1e-4 / (warmup + 1),
        warmup_steps=warmup,
        cosine_start=0,
        decay_steps=decay,
        decay_lr=1e-5,
        not_decayed=None,
        clip_norm=10.0,
    )


def learning_rate(defaults: TrainingDefaults, step: int) -> float:
    """Learning rate of a step, counted from 0.

    >>> from clp_jax.models.groot.architecture import GROOT_N15
    >>> learning_rate(training_defaults(GROOT_N15, 20), 1)
    0.0001
    """
    if step < defaults.warmup_steps:
        return defaults.first_lr + (defaults.peak_lr - defaults.first_lr) * step / defaults.warmup_steps
    done = min(step, defaults.decay_steps) - defaults.cosine_start
    cosine = 0.5 * (1 + math.cos(math.pi * done / max(1, defaults.decay_steps - defaults.cosine_start)))
    return defaults.decay_lr + (defaults.peak_lr - defaults.decay_lr) * cosine
