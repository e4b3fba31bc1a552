"""What numbers flags may be: a flag of one name means the same in every command, so one table holds for all.

Whoever trains for days with a negative learning rate, or finds out after the first hour that no step can be saved,
should have been told in the first second.
"""

import math
from typing import Any

from clp_jax.errors import InputError
from clp_jax.limits import Limits
from clp_jax.processing.conventions import LONGEST

_COUNT, _NOT_NEGATIVE, _SHARE = Limits(1), Limits(0), Limits(0, 1)
_LENGTH = Limits(1, most=LONGEST)
_POSITIVE, _FINITE = Limits(0, above=True), Limits(-math.inf, above=True)

RANGES = {
    **dict.fromkeys(("steps", "batch_size", "accumulate", "action_samples", "decay_steps", "rungs"), _COUNT),
    **dict.fromkeys(("log_every", "save_every", "keep_period", "evaluate_observations"), _COUNT),
    **dict.fromkeys(("action_horizon", "max_token_len", "prompt_length"), _LENGTH),
    **dict.fromkeys(("num_steps", "fsdp_devices"), _COUNT),
    **dict.fromkeys(("group_size", "groups_per_batch", "max_observations"), _COUNT),
    **dict.fromkeys(("keep_layers", "keep_vision_layers", "shape"), _COUNT),
    **dict.fromkeys(("max_batch", "queue", "processes", "episodes", "replan", "max_steps", "image_size"), _COUNT),
    "max_samples": Limits(4),
    **dict.fromkeys(
        ("evaluate_every", "warmup_steps", "workers", "profile", "filmed", "process_id", "lora_ranks", "tolerance"),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(("decay_lr", "eps", "weight_decay", "teacher_states"), _NOT_NEGATIVE),
    **dict.fromkeys(("b1", "b2", "ema_decay", "holdout_ratio"), _SHARE),
    **dict.fromkeys(
        ("peak_lr", "learning_rates", "clip_norm", "weights", "timestamp_tolerance", "max_message_mb"), _POSITIVE
    ),
    **dict.fromkeys(("lora_scale", "threshold"), _FINITE),
    "teacher_weight": Limits(0, most=1),
    "seed": Limits(0, 2**32),
    "port": Limits(0, 2**16),
}
"""By the name of the field; what is no number (several flags also take a word or None) has no range."""


def check_ranges(config: Any) -> None:
    """Raise on the first number that is outside of its flag's range.

    Args:
      config: the dataclass of a command.

    Raises:
      InputError: names the flag, its value and the range.
    """
    for name, value in vars(config).items():
        for number in value if isinstance(value, tuple) else (value,):
            if name in RANGES and isinstance(number, int | float) and not RANGES[name].holds(number):
                raise InputError(f"--{name.replace('_', '-')} is {number}; give {RANGES[name]}.")
