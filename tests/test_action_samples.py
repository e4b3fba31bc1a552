"""Several draws of noise and time against one pass over the prefix equal as many separate passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from clp_jax.benchmarks import action_samples
from clp_jax.errors import InputError
from clp_jax.flops import forward_flops
from clp_jax.models import Lengths, build
from clp_jax.models.pi0 import PI0, Observation, compute_loss, draw_noise_and_time
from clp_jax.training import OptimizerSettings, StepSettings, make_optimizer, make_state, train_step
from clp_jax.training.adapters import with_adapters
from clp_jax.training.freezing import frozen_paths
from clp_jax.trees import flatten

ROUNDING = 2e-6
"""Relative to the largest entry: float32 sums over draws in another order."""

DRAWS = 3
CASES = {"pi0": toys.architecture(), "pi05, LoRA": with_adapters(toys.architecture("pi05"), (2, 3))}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_of_separate_passes(case):
    arch = CASES[case]
    model, params, data = build(arch), toys.params(arch), toys.data(arch, 2)
    actions = data.arrays["actions"]
    noise, time = draw_noise_and_time(jax.random.key(3), actions.shape, DRAWS)

    def loss(params, noise, time):
        losses = compute_loss(model, params, Observation.of(data.arrays), actions, noise=noise, time=time)
        return losses.mean(), losses

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, together), gradient = run(params, noise, time)
    separate = [run(params, noise[:, j], time[:, j]) for j in range(DRAWS)]
    wanted = np.stack([losses for (_, losses), _ in separate], axis=1)
    assert together.shape == (2, DRAWS, toys.HORIZON)
    assert np.ptp(wanted, axis=1).min() > 1e-3  # the draws do differ
    np.testing.assert_allclose(together, wanted, rtol=0, atol=ROUNDING * wanted.max())
    mean = jax.tree.map(lambda *parts: np.mean(parts, axis=0), *(gradient for _, gradient in separate))
    for (path, ours), theirs in zip(flatten(gradient).items(), flatten(mean).values(), strict=True):
        # Key biases and the like cancel: what is left of them is rounding of numbers near 1.
        scale = max(np.abs(theirs).max(), 0.1)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=ROUNDING * scale, err_msg=path)


def test_one_draw_is_openpis_and_all_are_different():
    key, shape = jax.random.key(1), (2, 4, 6)
    one, several = draw_noise_and_time(key, shape), draw_noise_and_time(key, shape, 4)
    for ours, wanted in zip(several, one, strict=True):
        np.testing.assert_array_equal(ours[:, 0], wanted)
    assert several[0].shape == (2, 4, 4, 6) and several[1].shape == (2, 4)
    assert len(np.unique(np.asarray(several[0]))) == several[0].size
    assert len(np.unique(np.asarray(several[1]))) == several[1].size


@pytest.mark.slow
def test_a_step_averages_over_draws_and_microbatches():
    arch = toys.architecture()
    params, data = toys.params(arch), toys.data(arch, 4)
    frozen = frozen_paths(tuple(flatten(params)), freeze=("PaliGemma/.*",))
    settings = StepSettings(ema_decay=None, action_samples=2, accumulate=2, augment=False, frozen=frozen)
    tx = make_optimizer(OptimizerSettings(warmup_steps=1))
    state = make_state(jax.tree.map(jnp.asarray, params), tx, frozen=frozen)
    batch = {key: x for key, x in data.arrays.items() if key not in ("noise", "time", "episode_index")}
    rng = jax.random.key(5)
    _, info = jax.jit(functools.partial(train_step, arch, tx, settings))(rng, state, batch)
    noise, time = draw_noise_and_time(jax.random.fold_in(rng, 0), batch["actions"].shape, 2)
    wanted = compute_loss(
        build(arch), params, Observation.of(data.arrays), batch["actions"], noise=noise, time=time
    ).mean()
    np.testing.assert_allclose(info["loss"], wanted, rtol=1e-5)


def test_pi0_fast_draws_nothing():
    arch = toys.architecture("pi0_fast")
    params, data = toys.params(arch), toys.data(arch, 2)
    tx = make_optimizer(OptimizerSettings())
    state = make_state(params, tx)
    with pytest.raises(InputError, match="π0-FAST"):
        train_step(arch, tx, StepSettings(action_samples=2, ema_decay=None), jax.random.key(0), state, data.arrays)


def test_more_draws_cost_only_the_action_expert():
    shape = {"cameras": 3, "lengths": Lengths(50, 48)}
    one, two, eight = (forward_flops(PI0, **shape, action_samples=k) for k in (1, 2, 8))
    assert eight - one == 7 * (two - one)
    assert 1.0 < eight / one < 1.1


@pytest.mark.slow
def test_gradient_noise_falls_with_the_draws():
    """On fixed observations its variance is divided by the number of draws; 48 pairs estimate that to some 20 %."""
    arch = toys.architecture()
    data = toys.data(arch, 6)
    params = toys.params(arch)
    (one, all_one), (four, all_four) = (
        action_samples.gradient_noise(arch, params, data, k, batch_size=2, pairs=48) for k in (1, 4)
    )
    assert 2.5 < one / four < 6.0
    assert all_four < all_one
