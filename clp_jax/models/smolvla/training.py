"""What lerobot trains of a SmolVLA, and how fast."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from clp_jax.models.smolvla.architecture import Architecture
from clp_jax.models.smolvla.layout import STACKS
from clp_jax.models.stacks import stack_of

_OF_THE_VLM = r"(?:vision|connector|vlm)/.*|embed_tokens|lm_head"
_BATCH_SIZE = 8
"""Of lerobot's command for training."""
_NEVER_TRAINED = r"lm_head|vlm/norm"
_NO_CLIPPING = 1e30
"""Longer than any gradient: lerobot clips none where ``optimizer_grad_clip_norm`` is 0."""


def trainable(architecture: Architecture, paths: Iterable[str]) -> frozenset[str]:
    """The paths of the leaves that lerobot does not train at all.

    By default only the expert and the projections of state, actions and time are trained. Where the VLM is trained too,
    its last block stays as it is: see `frozen_rows`.
    """
    patterns = [pattern for pattern, _ in frozen_patterns(architecture)]
    return frozenset(path for path in paths if any(re.fullmatch(pattern, path) for pattern in patterns))


def frozen_patterns(architecture: Architecture) -> tuple[tuple[str, bool], ...]:
    """The same as rules over whole names; each says that what it matches is frozen."""
    settings = architecture.training
    patterns = [_OF_THE_VLM] if settings.train_expert_only else [_NEVER_TRAINED]
    # Where the whole VLM is frozen, so is its image encoder: a rule must decide about something.
    apart = settings.freeze_vision_encoder and not settings.train_expert_only
    patterns += [r"vision/.*"] if apart else []
    patterns += [] if settings.train_state_proj else [r"state_proj/.*"]
    return tuple((pattern, True) for pattern in patterns)


def frozen_rows(architecture: Architecture, paths: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Rows on axis 0 of leaves that are trained otherwise: lerobot freezes the last block of a VLM that it trains.

    Args:
      architecture: of the model.
      paths: leaves, or what has their shapes, by path.
    """
    if architecture.training.train_expert_only:
        return {}
    last = architecture.vlm.depth - 1
    rows = {}
    for path, leaf in paths.items():
        stack = stack_of(STACKS, path)
        if stack is not None and stack.tower == "vlm" and last in stack.blocks(leaf.shape[0]):
            rows[path] = (stack.blocks(leaf.shape[0]).index(last),)
    return rows


def training_defaults(architecture: Architecture, steps: int) -> dict[str, Any]:
    """lerobot's settings of a run of ``steps`` steps, by the names of the flags of ``clp finetune``.

    A run that is shorter than the cosine has a cosine of its own length, and a warm-up shortened alike.
    """
    t = architecture.training
    warmup, decay = t.warmup_steps, t.decay_steps
    if steps < decay:
        warmup, decay = int(warmup * (steps / decay)), steps
    return {
        "schedule": "cosine-from-start",
        "peak_lr": t.lr,
        "b1": t.betas[0],
        "b2": t.betas[1],
        "eps": t.eps,
        "weight_decay": t.weight_decay,
        "not_decayed": "",
        "clip_norm": t.clip_norm or _NO_CLIPPING,
        "warmup_steps": warmup,
        "decay_steps": decay,
        "decay_lr": t.end_lr,
        "ema_decay": None,
        "frozen_dtype": "keep",
        "batch_size": _BATCH_SIZE,
    }


def learning_rate(defaults: Mapping[str, Any], step: int) -> float:
    """lerobot's learning rate: linear from ``peak_lr / (warmup_steps + 1)``, then a cosine that began at step 0.

    >>> learning_rate({"peak_lr": 1.0, "decay_lr": 0.0, "warmup_steps": 0, "decay_steps": 4}, 2)
    0.5
    """
    peak, warmup, decay = defaults["peak_lr"], defaults["warmup_steps"], defaults["decay_steps"]
    if step < warmup:
        first = 1.0 / (warmup + 1)
        return peak * (first + (1.0 - first) * step / warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(step, decay) / decay))
    return defaults["decay_lr"] + (peak - defaults["decay_lr"]) * cosine
