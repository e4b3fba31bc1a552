"""A π0 for measurements on a CPU: wide enough for matrix products to dominate, small enough to wait for."""

import numpy as np

from clp_jax.data import CalibrationData
from clp_jax.models import Architecture, Lengths, family_of, pi0
from clp_jax.models.layers.siglip import SiglipSizes
from clp_jax.models.pi0 import GemmaSizes

SMALL = pi0.Architecture(
    kind="pi0",
    vision=SiglipSizes(width=128, depth=4, mlp_dim=512, num_heads=4, patch_size=14, num_tokens=64),
    vlm=GemmaSizes(width=256, depth=18, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64),
    action=GemmaSizes(width=128, depth=18, mlp_dim=512, num_heads=8, num_kv_heads=1, head_dim=64),
    vocab_size=512,
    action_dim=32,
    dtype="float32",
)

LENGTHS = Lengths(horizon=50, prompt=48)


def random_observations(architecture: Architecture, count: int, lengths: Lengths = LENGTHS) -> CalibrationData:
    """Made-up observations that fit a model, full prompts and all cameras; one episode each."""
    family, rng = family_of(architecture), np.random.default_rng(0)
    described = family.inputs(architecture, lengths)
    arrays = {key: _random(rng, key, (count, *leaf.shape), leaf.dtype, architecture) for key, leaf in described.items()}
    return CalibrationData(family.fixed_draw(architecture, arrays) | arrays, "random")


def _random(
    rng: np.random.Generator, key: str, shape: tuple[int, ...], dtype: np.dtype, architecture: Architecture
) -> np.ndarray:
    if np.issubdtype(dtype, np.bool_):
        return np.ones(shape, bool)
    if dtype == np.float32:
        return rng.standard_normal(shape, np.float32)
    return rng.integers(0, architecture.vocab_size if key == "tokenized_prompt" else 256, shape).astype(dtype)
