"""What the values of lerobot's ``config.json`` of a SmolVLA may be where no shape of a parameter tells.

A number that only fails in the middle of a run, or a word that counts as true, is refused where the file is read.
"""

from collections.abc import Mapping
from typing import Any

from clp_jax.errors import InputError
from clp_jax.limits import Limits, check_flag
from clp_jax.processing.conventions import LONGEST

_LENGTH, _POSITIVE, _SHARE = Limits(1, most=LONGEST, whole=True), Limits(0, above=True), Limits(0, 1)
_COUNT, _NOT_NEGATIVE = Limits(1, whole=True), Limits(0)

_NUMBERS = {
    "chunk_size": _LENGTH,
    "n_action_steps": _LENGTH,
    "tokenizer_max_length": _LENGTH,
    "num_steps": _COUNT,
    "empty_cameras": Limits(0, most=LONGEST, whole=True),
    "prefix_length": Limits(-1, most=LONGEST, whole=True),
    "min_period": _POSITIVE,
    "max_period": _POSITIVE,
    "optimizer_lr": _POSITIVE,
    "optimizer_eps": _NOT_NEGATIVE,
    "optimizer_weight_decay": _NOT_NEGATIVE,
    "optimizer_grad_clip_norm": _NOT_NEGATIVE,
    "scheduler_warmup_steps": Limits(0, whole=True),
    "scheduler_decay_steps": _COUNT,
    "scheduler_decay_lr": _NOT_NEGATIVE,
}

_FLAGS = ("freeze_vision_encoder", "train_expert_only", "train_state_proj", "add_image_special_tokens")


def check_values(config: Mapping[str, Any], file: str, *, state_dim: int, action_dim: int) -> None:
    """Raise on the first value that cannot be.

    Args:
      config: of the policy.
      file: that holds it, for the message.
      state_dim: dimensions of the model's state, padded.
      action_dim: dimensions of the model's actions, padded.

    Raises:
      InputError: names the key, its value and what it may be.
    """
    for key in _NUMBERS.keys() & config.keys():
        _NUMBERS[key].check(config[key], f"{file} says {key}")
    for key in _FLAGS:
        check_flag(config.get(key, False), f"{file} says {key}")
    betas = config.get("optimizer_betas", [0.9, 0.95])
    if not isinstance(betas, list) or len(betas) != 2:
        raise InputError(f"{file} says optimizer_betas = {betas!r}; give a list of two numbers.")
    for beta in betas:
        _SHARE.check(beta, f"{file} says optimizer_betas")
    chunk = config.get("chunk_size", 50)
    if (executed := config.get("n_action_steps", 50)) > chunk:
        raise InputError(
            f"{file} says n_action_steps = {executed}, but chunk_size = {chunk}; it executes at most these."
        )
    for side, name, most in (
        ("input_features", "observation.state", state_dim),
        ("output_features", "action", action_dim),
    ):
        if (feature := (config.get(side) or {}).get(name)) is not None:
            _check_vector(feature.get("shape"), most, f"{file} says {side}.{name}.shape")
    for name, feature in (config.get("input_features") or {}).items():
        if feature.get("type") == "VISUAL" and feature.get("shape"):
            _check_picture(feature["shape"], f"{file} says input_features.{name}.shape")


def _check_vector(shape: Any, most: int, what: str) -> None:
    """Raise unless it is the shape of a vector that the model has room for."""
    if not isinstance(shape, list) or len(shape) != 1:
        raise InputError(f"{what} = {shape!r}; give one number in a list.")
    Limits(1, most=most, whole=True).check(shape[0], f"{what}[0]")


def _check_picture(shape: Any, what: str) -> None:
    """Raise unless it is the shape of a picture with its three channels first."""
    if not isinstance(shape, list) or len(shape) != 3 or shape[0] != 3:
        raise InputError(f"{what} = {shape!r}; give [3, height, width].")
    for size in shape[1:]:
        _COUNT.check(size, what)
