import jax.numpy as jnp
import numpy as np
import pytest
import reference_cka as reference
from residual_streams import everything, rotation, some, walk

from clp_jax import cka
from clp_jax.distances import pair_statistics

DISTANCE = 1e-5  # relative, of distances between states of a token


def pair_means(states, valid, tile=16):
    sums = pair_statistics(states, valid, tile=tile)
    return {name: np.asarray(value / sums.count) for name, value in sums._asdict().items() if name != "count"}


@pytest.mark.parametrize(("layers", "step"), [(1, 1.0), (2, 1.0), (7, 0.7), (7, 1e-3)])
def test_pair_statistics_equal_float64(layers, step):
    states, valid = walk(layers, 40, 24, step=step), some(40, 0.7, seed=7)
    wanted = reference.pair_means(states[:, valid])
    dirty = jnp.where(valid[None, :, None], states, jnp.nan)
    actual = pair_means(dirty, valid)
    for name in wanted:
        np.testing.assert_allclose(actual[name], wanted[name], rtol=DISTANCE, atol=3e-7, err_msg=name)


def test_pair_statistics_keep_the_digits_of_small_steps_between_long_vectors():
    # Near twins far from the mean of all layers: where |h_i|^2 + |h_j|^2 - 2 h_i . h_j has no digit left.
    states = walk(6, 30, 64, step=1e-4)
    states = states.at[3:].add(10 * walk(1, 30, 64, seed=8))
    wanted, actual = reference.pair_means(states), pair_means(states, everything(30))
    for name in ("residual", "squared"):
        np.testing.assert_allclose(actual[name], wanted[name], rtol=DISTANCE, err_msg=name)
    # The unit vectors carry float32 rounding, so angles are right to some 1e-7 of a half turn, not of themselves.
    np.testing.assert_allclose(actual["angle"], wanted["angle"], rtol=0, atol=1e-7)


def test_pair_statistics_of_a_valid_token_without_direction_is_nan():
    states = walk(2, 5, 4).at[1, 2].set(0)
    assert np.isnan(pair_means(states, everything(5))["cosine"][0, 1])
    assert np.isfinite(pair_means(states, jnp.arange(5) != 2)["cosine"]).all()


@pytest.mark.slow
def test_rotation_that_cka_does_not_see_is_seen_by_the_pairs():
    (first,) = walk(1, 500, 32)
    states = jnp.stack([first, 3 * first @ rotation(32)])
    assert cka.cka(cka.hsic(cka.gram_sums(states, everything(500)).raw, debiased=True))[0, 1] > 0.9999
    means = pair_means(states, everything(500))
    assert means["cosine"][0, 1] < 0.5
    assert means["residual"][0, 1] > 1
