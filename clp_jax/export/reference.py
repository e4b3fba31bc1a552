"""What an export is compared with: fixed inputs, and what the JAX model makes of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from clp_jax.models import Architecture, Gates, Lengths, build, family_of

_OF_TRAINING = ("actions", "action_mask", "token_loss_mask")

CHECK_FILE = "check.npz"
"""Inputs, noise and the JAX model's actions, beside an export: whoever loads it can compare again."""


def example_inputs(architecture: Architecture, lengths: Lengths, *, batch_size: int = 2) -> dict[str, np.ndarray]:
    """Random observations by flat key, the same in every run; of several cameras the last is absent, where that can be.

    Args:
      architecture: of the model.
      lengths: chunk and prompt.
      batch_size: observations.
    """
    family, rng = family_of(architecture), np.random.default_rng(0)
    arrays = {
        key: _random(rng, key, (batch_size, *leaf.shape), leaf.dtype, architecture.vocab_size)
        for key, leaf in family.inputs(architecture, lengths).items()
        if key not in _OF_TRAINING
    }
    names = family.camera_names(architecture) or ()
    if len(names) > 1 and f"image_mask/{names[-1]}" in arrays:
        arrays[f"image_mask/{names[-1]}"][:] = False
    sizes = np.linspace(lengths.prompt, max(1, lengths.prompt // 2), batch_size).astype(int)
    arrays["tokenized_prompt_mask"] = np.arange(lengths.prompt) < sizes[:, None]
    if architecture.action_dim is not None:
        arrays["noise"] = rng.standard_normal((batch_size, lengths.horizon, architecture.action_dim), np.float32)
    return family.as_example(architecture, arrays)


def _random(rng: np.random.Generator, key: str, shape: tuple[int, ...], dtype: Any, vocab_size: int) -> np.ndarray:
    if key.startswith("image/"):
        return rng.integers(0, 256, shape).astype(np.uint8)
    if key == "tokenized_prompt":
        return rng.integers(0, vocab_size, shape).astype(np.int32)
    if np.issubdtype(dtype, np.bool_):
        return np.ones(shape, bool)
    return np.zeros(shape, dtype) if dtype.kind in "iu" else rng.standard_normal(shape, np.float32)


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
      Sampled actions [b, horizon, adim]; of a model that samples none, the logits of the prompt tokens.
    """
    family, model = family_of(architecture), build(dataclasses.replace(architecture, dtype=dtype))
    acts = family.why_no_actions(architecture) is None
    if dtype == "float32":
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)

    def run(params, arrays):
        if acts:
            return family.sample(model, params, arrays, noise=arrays["noise"], num_steps=num_steps, gates=Gates())
        return family.forward(model, params, arrays, gates=Gates())[0]

    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(run)(params, arrays), np.float32)


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b|, infinite where either is not finite."""
    difference = float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())
    return difference if np.isfinite(difference) else float("inf")
