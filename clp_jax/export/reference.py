"""What an export is compared with: fixed inputs, and what the JAX model makes of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from clp_jax.data import observation_of
from clp_jax.models import CAMERAS, FAST_CAMERAS, Architecture, Pi0, build
from clp_jax.models.pi0 import sample_actions

CHECK_FILE = "check.npz"
"""Inputs, noise and the JAX model's actions, beside an export: whoever loads it can compare again."""


def example_inputs(
    architecture: Architecture, *, horizon: int, prompt_length: int, batch_size: int = 2
) -> dict[str, np.ndarray]:
    """Random observations by flat key (openpi's model inputs), the same in every run; the last camera is absent.

    Args:
      architecture: of the model.
      horizon: actions of a chunk.
      prompt_length: tokens of a prompt, padding included.
      batch_size: observations.
    """
    rng, size = np.random.default_rng(0), architecture.vision.image_size
    cameras = FAST_CAMERAS if architecture.kind == "pi0_fast" else CAMERAS
    arrays: dict[str, np.ndarray] = {}
    for camera in cameras:
        arrays[f"image/{camera}"] = rng.integers(0, 256, (batch_size, size, size, 3)).astype(np.uint8)
        arrays[f"image_mask/{camera}"] = np.full(batch_size, camera != cameras[-1])
    dim = architecture.action_dim or 32
    arrays["state"] = rng.standard_normal((batch_size, dim), np.float32)
    arrays["tokenized_prompt"] = rng.integers(0, architecture.vocab_size, (batch_size, prompt_length)).astype(np.int32)
    lengths = np.linspace(prompt_length, max(1, prompt_length // 2), batch_size).astype(int)
    arrays["tokenized_prompt_mask"] = np.arange(prompt_length) < lengths[:, None]
    if architecture.kind == "pi0_fast":
        arrays["token_ar_mask"] = np.zeros((batch_size, prompt_length), np.int32)
    else:
        arrays["noise"] = rng.standard_normal((batch_size, horizon, dim), np.float32)
    return arrays


def run_model(
    architecture: Architecture,
    params: dict,
    arrays: dict[str, np.ndarray],
    *,
    num_steps: int = 10,
    dtype: str = "float32",
) -> Float[np.ndarray, "..."]:
    """What the JAX model answers, with float32 products at full precision on any device.

    Args:
      architecture: of the parameters.
      params: below ``params``.
      arrays: from `example_inputs`.
      num_steps: Euler steps.
      dtype: of activations; float32 also casts the parameters.

    Returns:
      Sampled actions [b, horizon, adim]; for π0-FAST, logits of the prompt tokens.
    """
    model = build(dataclasses.replace(architecture, dtype=dtype))
    if dtype == "float32":
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)

    def run(params, arrays):
        if isinstance(model, Pi0):
            return sample_actions(model, params, observation_of(arrays), noise=arrays["noise"], num_steps=num_steps)
        return model.apply({"params": params}, observation_of(arrays))[0]

    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(run)(params, arrays), np.float32)


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b|, infinite where either is not finite."""
    difference = float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())
    return difference if np.isfinite(difference) else float("inf")
