"""Samples per second, and the share of the chips' peak that does the model's own arithmetic (MFU)."""

import jax

from clp_jax.flops import forward_flops
from clp_jax.models import Architecture, Lengths

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}
"""Dense bfloat16 FLOP/s of a chip by the beginning of JAX's ``device_kind``, from the makers' data sheets."""


def peak_flops(device_kind: str) -> float | None:
    """Peak of one chip; None if it is not in the table (all CPUs).

    >>> peak_flops("NVIDIA H100 80GB HBM3")
    989000000000000.0
    """
    names = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def step_flops(
    architecture: Architecture,
    trained_share: float,
    lengths: Lengths,
    *,
    cameras: int,
    action_samples: int = 1,
    teacher: Architecture | None = None,
) -> float:
    """One observation in a training step: forward, gradients of activations and of the weights that are trained.

    Recomputation is not counted. ``trained_share`` is that of all parameters, so a partly frozen model's count is an
    estimate. A teacher's forward pass comes on top.
    """
    once, taught = (
        0.0 if model is None else forward_flops(model, lengths, cameras=cameras, action_samples=action_samples)
        for model in (architecture, teacher)
    )
    return once * (2 + trained_share) + taught


def utilisation(flops_per_second: float) -> float | None:
    """MFU over all devices of all processes; None where the peak is unknown."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return None if peak is None else flops_per_second / (peak * jax.device_count())
