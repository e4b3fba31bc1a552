"""What was fixed before any result was seen."""

import dataclasses

import numpy as np

from clp_jax.models import Architecture, GemmaSizes, SiglipSizes

BASE_TASKS = (
    *("drawer-open", "drawer-close", "faucet-close", "window-open", "door-lock", "door-unlock"),
    *("button-press-topdown", "coffee-button", "plate-slide-back", "push"),
)
"""Pre-training. Objects lie in random places, so the picture matters; door-lock and door-unlock share one scene, so the
instruction does."""

NEW_TASKS = ("faucet-open", "window-close", "coffee-pull", "plate-slide")
"""Fine-tuning and evaluation. The base saw three of these objects, but never what is asked for."""

IMAGE_SIZE, PATCH = 84, 14
TOKENS = (IMAGE_SIZE // PATCH) ** 2
HORIZON = 8
REPLAN = 4
"""Actions of a chunk, and those that are executed before the next one is asked for."""
PROMPT_TOKENS = 12
VOCABULARY = 256

BASE_EPISODES = 50
BASE_STEPS = 6000
"""Demonstrations of each pre-training task."""

DEPTH = 18
DEPTHS = (12, 9, 6)
"""Blocks that stay. 9 is where every arm is run."""

SEEDS = (0, 1, 2)

BATCH, DRAWS = 32, 4
"""Observations of a step, and draws of noise and time for each."""
BASE_LR, RECOVERY_LR = 1e-3, 5e-4


@dataclasses.dataclass(frozen=True)
class Regime:
    """How much there is to fine-tune on.

    Attributes:
      episodes: demonstrations of each new task.
      steps: of fine-tuning.
    """

    episodes: int
    steps: int


REGIMES = {"scarce": Regime(episodes=8, steps=150), "rich": Regime(episodes=50, steps=400)}


def architecture(depth: int = DEPTH) -> Architecture:
    """The study's π0 at a depth of the language stack: 2.4 M parameters with 18 blocks."""
    return Architecture(
        kind="pi0",
        vision=SiglipSizes(
            width=96, depth=4, mlp_dim=192, num_heads=4, patch_size=14, num_tokens=(IMAGE_SIZE // 14) ** 2
        ),
        vlm=GemmaSizes(width=64, depth=depth, mlp_dim=256, num_heads=8, num_kv_heads=1, head_dim=16),
        action=GemmaSizes(width=48, depth=depth, mlp_dim=192, num_heads=8, num_kv_heads=1, head_dim=16),
        vocab_size=VOCABULARY,
        action_dim=4,
        dtype="float32",
    )


CALIBRATION = 128
"""Observations of the new tasks that the criteria see."""


def random_masks(depth: int, count: int) -> list[tuple[int, ...]]:
    """Blocks that stay, drawn uniformly; the first masks are the same however many are asked for."""
    rng = np.random.default_rng(depth)
    return [tuple(sorted(rng.choice(DEPTH, depth, replace=False).tolist())) for _ in range(count)]
