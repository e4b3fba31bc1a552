"""A π0 for measurements on a CPU: wide enough for matrix products to dominate, small enough to wait for."""

import numpy as np

from clp_jax.data import CalibrationData, fixed_noise_and_time
from clp_jax.models import CAMERAS, FAST_CAMERAS, Architecture, GemmaSizes, SiglipSizes

SMALL = Architecture(
    kind="pi0",
    vision=SiglipSizes(width=128, depth=4, mlp_dim=512, num_heads=4, patch_size=14, num_tokens=64),
    vlm=GemmaSizes(width=256, depth=18, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64),
    action=GemmaSizes(width=128, depth=18, mlp_dim=512, num_heads=8, num_kv_heads=1, head_dim=64),
    vocab_size=512,
    action_dim=32,
    dtype="float32",
)

PROMPT, HORIZON = 48, 50


def random_observations(architecture: Architecture, count: int) -> CalibrationData:
    """Made-up observations that fit a model, full prompts and all cameras; one episode each."""
    rng, size = np.random.default_rng(0), architecture.vision.image_size
    width = architecture.action_dim or 32
    actions = rng.standard_normal((count, HORIZON, width), np.float32)
    noise, time = fixed_noise_and_time(actions.shape)
    tokens = rng.integers(0, architecture.vocab_size, (count, PROMPT)).astype(np.int32)
    arrays: dict[str, np.ndarray] = {
        "state": rng.standard_normal((count, width), np.float32),
        "tokenized_prompt": tokens,
        "tokenized_prompt_mask": np.ones((count, PROMPT), bool),
        "actions": actions,
        "noise": noise,
        "time": time,
    }
    for camera in FAST_CAMERAS if architecture.kind == "pi0_fast" else CAMERAS:
        arrays[f"image/{camera}"] = rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8)
        arrays[f"image_mask/{camera}"] = np.ones(count, bool)
    return CalibrationData(arrays, "random")
