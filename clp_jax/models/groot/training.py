"""What NVIDIA's fine-tuning script, Isaac-GR00T release n1.5, trains, and how."""

import math
from typing import Any

from clp_jax.models.groot.architecture import Architecture

FROZEN = ((r"backbone/.*", True),)
"""Rules over whole names: the language model and the image encoder stay as they are, all of the action head is trained.

Upstream's tune_llm is ``--train 'backbone/llm/.*'`` here, tune_visual ``--train 'backbone/(vision|mlp1)/.*'``.
"""

_UNREAD = r"backbone/(?:vision_head/.*|llm/lm_head)"
_NOT_DECAYED = rf"(?:.*/)?bias|.*/(?:vlln|norm[13]|encoder_norm|LayerNorm_[01])/scale|{_UNREAD}"
"""Biases and layer norms, as transformers has it; the biases ``b`` of the embodiments' layers have another name and are
decayed. And what nothing reads: no gradient reaches it, so that without decay it stays as it is whatever is trained."""

_WARMUP = 0.05
_BATCH_SIZE = 32


def training_defaults(architecture: Architecture, steps: int) -> dict[str, Any]:
    """NVIDIA's settings of a run of ``steps`` steps, by the names of the flags of ``clp finetune``.

    lerobot's own fine-tuning of the same model differs: all is decayed, the gradient is clipped at 10, and the cosine
    counts from the start and ends at a tenth of the rate.

    >>> from clp_jax.models.groot.architecture import GROOT_N15
    >>> training_defaults(GROOT_N15, 30)["warmup_steps"]
    2
    """
    del architecture
    return {
        "schedule": "zero-warmup-cosine",
        "peak_lr": 1e-4,
        "warmup_steps": math.ceil(_WARMUP * steps),
        "decay_steps": steps,
        "decay_lr": 0.0,
        "b1": 0.95,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 1e-5,
        "not_decayed": _NOT_DECAYED,
        "clip_norm": 1.0,
        "ema_decay": None,
        "frozen_dtype": "keep",
        "batch_size": _BATCH_SIZE,
    }
