"""The update rule beside one that is written out in NumPy: clipping, AdamW, decay, and the rate of each step."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.training import OptimizerSettings, make_optimizer
from clp_jax.training.optimizer import Schedule, learning_rate

SETTINGS = {
    "peak_lr": 1e-2,
    "warmup_steps": 3,
    "decay_steps": 8,
    "decay_lr": 1e-3,
    "b1": 0.8,
    "b2": 0.9,
    "eps": 1e-4,
    "weight_decay": 0.3,
    "clip_norm": 0.5,
}
"""None of them so small that it could be left out unseen."""

STEPS = 11


def rate(step: int, schedule: Schedule) -> float:
    """Linear to the peak, from 0 or from the share of a first step; then the cosine, which may have begun before."""
    peak, warmup, decay, end = (SETTINGS[name] for name in ("peak_lr", "warmup_steps", "decay_steps", "decay_lr"))
    if step < warmup:
        first = 0.0 if schedule == "zero-warmup-cosine" else peak / (warmup + 1)
        return first + (peak - first) * step / warmup
    start = 0 if schedule == "cosine-from-start" else warmup
    share = (min(step, decay) - start) / (decay - start)
    return end + (peak - end) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize("schedule", ["warmup-cosine", "zero-warmup-cosine", "cosine-from-start"])
def test_learning_rate_of_every_step(schedule):
    ours = learning_rate(OptimizerSettings(**SETTINGS, schedule=schedule))
    found = [float(ours(step)) for step in range(STEPS)]
    np.testing.assert_allclose(found, [rate(step, schedule) for step in range(STEPS)], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["warmup-cosine", "zero-warmup-cosine", "cosine-from-start"])
def test_steps_are_those_of_adamw_on_gradients_clipped_together(schedule):
    """The norm is over all leaves; every second gradient is below it and stays; the decay does not go through Adam."""
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape) for name, shape in (("w", (3, 2)), ("bias", (4,)))}
    ours = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in params.items()}
    optimizer = make_optimizer(OptimizerSettings(**SETTINGS, schedule=schedule))
    state = optimizer.init(ours)
    b1, b2, eps = (SETTINGS[name] for name in ("b1", "b2", "eps"))
    mean, square = ({name: np.zeros_like(leaf) for name, leaf in params.items()} for _ in range(2))
    for step in range(STEPS):
        gradient = {name: rng.standard_normal(leaf.shape) for name, leaf in params.items()}
        gradient["bias"] *= 1e-3 if step % 2 else 4.0
        gradient["w"] *= 1e-2 if step % 2 else 1.0
        updates, state = optimizer.update({k: jnp.asarray(x, jnp.float32) for k, x in gradient.items()}, state, ours)
        ours = {name: leaf + updates[name] for name, leaf in ours.items()}
        norm = math.sqrt(sum(np.square(leaf).sum() for leaf in gradient.values()))
        assert (norm > SETTINGS["clip_norm"]) == (step % 2 == 0)
        for name, leaf in params.items():
            clipped = gradient[name] * min(1.0, SETTINGS["clip_norm"] / norm)
            mean[name] = b1 * mean[name] + (1 - b1) * clipped
            square[name] = b2 * square[name] + (1 - b2) * clipped**2
            unbiased = mean[name] / (1 - b1 ** (step + 1)), square[name] / (1 - b2 ** (step + 1))
            update = unbiased[0] / (np.sqrt(unbiased[1]) + eps) + SETTINGS["weight_decay"] * leaf
            params[name] = leaf - rate(step, schedule) * update
            np.testing.assert_allclose(ours[name], params[name], rtol=2e-5, atol=1e-6, err_msg=f"{name}, step {step}")
