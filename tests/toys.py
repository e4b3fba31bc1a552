"""Models and data small enough to compile and run in a moment."""

import dataclasses
import functools

import numpy as np

from clp_jax.data import CalibrationData
from clp_jax.models import Lengths, abstract_params, family_of
from clp_jax.models.layers.siglip import SiglipSizes
from clp_jax.models.pi0 import PI0, PI0_FAST, PI05, Architecture, GemmaSizes
from clp_jax.trees import flatten, unflatten

DEPTH, PROMPT, HORIZON = 4, 5, 4
VISION = SiglipSizes(width=8, depth=2, mlp_dim=12, num_heads=2, patch_size=4, num_tokens=4)
VLM = GemmaSizes(width=16, depth=DEPTH, mlp_dim=20, num_heads=2, num_kv_heads=1, head_dim=8)
ACTION = GemmaSizes(width=12, depth=DEPTH, mlp_dim=18, num_heads=2, num_kv_heads=1, head_dim=8)


def architecture(kind: str = "pi0") -> Architecture:
    """A float32 toy of that kind."""
    full = {"pi0": PI0, "pi05": PI05, "pi0_fast": PI0_FAST}[kind]
    fast = kind == "pi0_fast"
    return dataclasses.replace(
        full,
        vision=VISION,
        vlm=VLM,
        action=None if fast else ACTION,
        vocab_size=23,
        action_dim=None if fast else 6,
        dtype="float32",
    )


def params(arch: Architecture, seed: int = 0) -> dict[str, dict]:
    """Random parameters in NumPy; no leaf is zero, so that every branch is alive."""
    return unflatten({path: leaf.copy() for path, leaf in _params(arch, seed).items()})


@functools.cache
def _params(arch: Architecture, seed: int) -> dict[str, np.ndarray]:
    """Of the size of an initialiser's, which would take a minute to compile."""
    rng, drawn = np.random.default_rng(seed), {}
    for path, leaf in flatten(abstract_params(arch)).items():
        layer_norm = "/img/" in path and path.endswith("/scale")
        fan_in = leaf.shape[-2] if len(leaf.shape) > 1 and path.endswith(("/w", "kernel", "linear", "einsum")) else 100
        drawn[path] = (layer_norm + rng.standard_normal(leaf.shape) / fan_in**0.5).astype(np.float32)
    return drawn


def data(arch: Architecture, observations: int = 12, *, per_episode: int = 1, seed: int = 0) -> CalibrationData:
    """Random observations; some cameras are absent and some prompts padded."""
    rng, family = np.random.default_rng(seed), family_of(arch)
    described = family.inputs(arch, Lengths(HORIZON, PROMPT))
    arrays: dict[str, np.ndarray] = {}
    for i, camera in enumerate(family.camera_names(arch)):
        image = described[f"image/{camera}"]
        arrays[f"image/{camera}"] = rng.integers(0, 256, (observations, *image.shape)).astype(np.uint8)
        arrays[f"image_mask/{camera}"] = rng.random(observations) < (1.0 if i == 0 else 0.7)
    arrays["state"] = rng.standard_normal((observations, 6), np.float32)
    arrays["tokenized_prompt"] = rng.integers(0, 23, (observations, PROMPT)).astype(np.int32)
    arrays["tokenized_prompt_mask"] = np.arange(PROMPT) < rng.integers(2, PROMPT + 1, (observations, 1))
    arrays["episode_index"] = np.arange(observations) // per_episode
    if "actions" in described:
        arrays["actions"] = rng.standard_normal((observations, HORIZON, 6), np.float32)
    else:
        arrays["token_ar_mask"] = np.ones((observations, PROMPT), np.int32)
        arrays["token_loss_mask"] = arrays["tokenized_prompt_mask"]
    return CalibrationData(family.fixed_draw(arch, arrays) | arrays, "toy")
