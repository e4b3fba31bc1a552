"""What was fixed before any result was seen."""

from clp_jax.models import Architecture, GemmaSizes, SiglipSizes

BASE_TASKS = (
    *("drawer-open", "drawer-close", "faucet-close", "window-open", "door-lock", "door-unlock"),
    *("button-press-topdown", "coffee-button", "plate-slide-back", "push"),
)
"""Pre-training. Objects lie in random places, so the picture matters; door-lock and door-unlock share one scene, so the
instruction does."""
BASE_EPISODES = 50
"""Demonstrations of each."""
BASE_STEPS, BASE_LR = 6000, 1e-3
BATCH, DRAWS = 32, 4
"""Observations of a step, and draws of noise and time for each."""

IMAGE_SIZE, PATCH = 84, 14
HORIZON = 8
"""Actions of a chunk."""
PROMPT_TOKENS, VOCABULARY = 12, 256


def architecture(depth: int = 18) -> Architecture:
    """The study's π0 at a depth of the language stack: 2.1 M parameters with 18 blocks."""
    tokens = (IMAGE_SIZE // PATCH) ** 2
    return Architecture(
        kind="pi0",
        vision=SiglipSizes(width=96, depth=4, mlp_dim=192, num_heads=4, patch_size=PATCH, num_tokens=tokens),
        vlm=GemmaSizes(width=64, depth=depth, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=16),
        action=GemmaSizes(width=48, depth=depth, mlp_dim=192, num_heads=4, num_kv_heads=1, head_dim=16),
        vocab_size=VOCABULARY,
        action_dim=4,
        dtype="float32",
    )
