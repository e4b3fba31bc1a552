import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_cka as reference
from jax.sharding import NamedSharding, PartitionSpec

from clp_jax import cka

SMALL_SIZE = 2e-6  # CKA: a few float32 roundings, n and d up to some hundreds
FULL_SIZE = 1e-6  # CKA at l = 18, n = 2048, d = 512: the promise; seen 3.4e-7
BFLOAT16_STATES = 1e-5  # CKA from bfloat16 states whose mean is 100 times the spread: the promise; seen 3e-7
DISTANCE = 1e-5  # relative, of distances between states of a token

matrix_of = jax.jit(
    lambda states, valid, debiased, tile: cka.cka(cka.hsic(cka.gram_sums(states, valid, tile=tile), debiased=debiased)),
    static_argnums=(2, 3),
)


def walk(layers, n, d, *, seed=0, step=0.5, mean=0.0):
    """States of a residual stream: each layer adds a little to a layer before it; float32 [l, n, d]."""
    rng = np.random.default_rng(seed)
    start, steps = rng.standard_normal((1, n, d)), step * rng.standard_normal((layers - 1, n, d))
    states = np.cumsum(np.concatenate([start, steps]), axis=0) + mean * rng.standard_normal((layers, 1, d))
    return jnp.asarray(states, jnp.float32)


def everything(n):
    return jnp.ones(n, bool)


def some(n, share, seed):
    return jnp.asarray(np.random.default_rng(seed).random(n) < share)


def rotation(d):
    return jnp.linalg.qr(jax.random.normal(jax.random.key(2), (d, d)))[0]


def all_equal(actual, wanted, tolerance):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(wanted), rtol=0, atol=tolerance)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("tile", [8, 16, 24, 37, 256])
def test_equals_the_definition_at_any_tile(debiased, tile):
    states = walk(3, 37, 6)
    wanted = reference.cka_matrix(states, debiased=debiased)
    all_equal(matrix_of(states, everything(37), debiased, tile), wanted, SMALL_SIZE)


@pytest.mark.parametrize("debiased", [False, True])
def test_hsic_equals_the_definition_itself(debiased):
    states = walk(3, 30, 5)
    function = reference.hsic_debiased if debiased else reference.hsic_biased
    actual = cka.hsic(cka.gram_sums(states, everything(30), tile=16), debiased=debiased)
    np.testing.assert_allclose(actual, reference.matrix(states, function), rtol=2e-5)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("garbage", [1e9, np.nan, np.inf])
def test_rows_that_are_not_valid_do_not_count(debiased, garbage):
    states, valid = walk(3, 40, 6), some(40, 0.6, seed=1)
    dirty = jnp.where(valid[None, :, None], states, garbage)
    wanted = reference.cka_matrix(states[:, valid], debiased=debiased)
    all_equal(matrix_of(dirty, valid, debiased, 16), wanted, SMALL_SIZE)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_keeps_its_digits_when_the_mean_is_100_times_the_spread(debiased, dtype):
    states = walk(3, 200, 24, mean=100.0).astype(dtype)
    wanted = reference.cka_matrix(np.asarray(states.astype(jnp.float32)), debiased=debiased)
    all_equal(matrix_of(states, everything(200), debiased, 64), wanted, BFLOAT16_STATES)


def test_keeps_its_digits_when_the_mean_is_100000_times_the_spread():
    """There the rounding of the mean itself, which a second pass takes away, is as large as the spread's digits."""
    states = walk(3, 1000, 24, mean=1e5)
    exact = np.asarray(states, np.float64)
    wanted = reference.cka_matrix(exact - exact.mean(axis=1, keepdims=True), debiased=False)
    all_equal(matrix_of(states, everything(1000), False, 64), wanted, SMALL_SIZE)


def test_keeps_its_digits_over_thousands_of_tiles():
    states = walk(3, 1024, 16)
    centred = np.asarray(states, np.float64) - np.asarray(states, np.float64).mean(axis=1, keepdims=True)
    wanted = np.array([[np.sum((x.T @ y) ** 2) for y in centred] for x in centred])
    sums = cka.gram_sums(states, everything(1024), tile=8)  # 8256 pairs of tiles
    np.testing.assert_allclose(sums.inner, wanted, rtol=1e-6)


def test_is_within_its_promise_of_float64_at_full_size():
    states = walk(18, 2048, 512, step=0.3)
    layers = [0, 1, 8, 17]
    centred = np.asarray(states, np.float64)[layers]
    centred -= centred.mean(axis=1, keepdims=True)
    hsic = np.array([[np.sum((x.T @ y) ** 2) for y in centred] for x in centred])  # features, not Grams: a second road
    wanted = hsic / np.sqrt(np.outer(np.diagonal(hsic), np.diagonal(hsic)))
    all_equal(
        np.asarray(matrix_of(states, everything(2048), False, cka.TILE))[np.ix_(layers, layers)], wanted, FULL_SIZE
    )


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize(("layers", "d"), [(1, 3), (30, 1), (2, 130)])
def test_is_one_on_the_diagonal_symmetric_and_in_range(debiased, layers, d):
    actual = np.asarray(matrix_of(walk(layers, 50, d), everything(50), debiased, 16))
    all_equal(np.diagonal(actual), np.ones(layers), SMALL_SIZE)
    all_equal(actual, actual.T, SMALL_SIZE)
    assert actual.max() <= 1 + SMALL_SIZE
    assert debiased or actual.min() >= 0


@pytest.mark.parametrize("debiased", [False, True])
def test_does_not_see_rotation_scale_and_shift(debiased):
    first, second = walk(2, 60, 7)
    states = jnp.stack([first, second, 3 * second @ rotation(7) + 5])
    actual = np.asarray(matrix_of(states, everything(60), debiased, 32))
    all_equal(actual[1, 2], 1, SMALL_SIZE)
    all_equal(actual[0, 1], actual[0, 2], SMALL_SIZE)


def test_debiased_cka_of_unrelated_features_is_near_zero_and_biased_is_not():
    states = jax.random.normal(jax.random.key(3), (4, 128, 512))
    off_diagonal = ~np.eye(4, dtype=bool)
    debiased = np.asarray(matrix_of(states, everything(128), True, 128))[off_diagonal]
    biased = np.asarray(matrix_of(states, everything(128), False, 128))[off_diagonal]
    assert np.abs(debiased).max() < 0.05
    assert biased.min() > 0.75


def test_debiased_groups_add_up_to_the_whole_and_biased_groups_keep_their_bias():
    # 64 groups of 16 rows; layers 0 and 1 are related, 2 is not.
    states = jnp.concatenate([walk(2, 1024, 64, step=1.0), walk(1, 1024, 64, seed=9)])
    groups = states.reshape(3, 64, 16, 64).swapaxes(0, 1)
    sums = jax.jit(jax.vmap(cka.gram_sums))(groups, jnp.ones((64, 16), bool))
    whole = np.asarray(matrix_of(states, everything(1024), True, 256))
    debiased = np.asarray(cka.cka(cka.hsic(sums, debiased=True).sum(axis=0)))
    biased = np.asarray(cka.cka(cka.hsic(sums, debiased=False).sum(axis=0)))
    all_equal(debiased, whole, 0.02)
    assert biased[0, 2] > 0.7 + whole[0, 2]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5])
def test_too_few_samples_are_nan(count):
    sums = cka.gram_sums(walk(2, 9, 6), jnp.arange(9) < count)
    assert float(sums.count) == count
    assert bool(jnp.isnan(cka.hsic(sums, debiased=True)).all()) == (count < 4)
    assert bool(jnp.isnan(cka.hsic(sums, debiased=False)).all()) == (count < 2)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, 12345.678, -3e-5, 1e12])
@pytest.mark.parametrize("debiased", [False, True])
def test_constant_features_are_nan_and_spoil_no_other_layer(constant, debiased):
    states = walk(3, 100, 8).at[1].set(constant)
    actual = np.asarray(matrix_of(states, everything(100), debiased, 32))
    assert np.isnan(actual[1]).all() and np.isnan(actual[:, 1]).all()
    all_equal(actual[0, 2], reference.cka_matrix(states[::2], debiased=debiased)[0, 1], SMALL_SIZE)


def test_features_whose_squared_hsic_overflows_float32_are_fine():
    states = walk(3, 64, 16)
    wanted = matrix_of(states, everything(64), True, 32)
    all_equal(matrix_of(1e7 * states, everything(64), True, 32), wanted, SMALL_SIZE)


def test_vmap_equals_one_group_after_the_other():
    states, valid = walk(2, 4 * 40, 6).reshape(2, 4, 40, 6), some((4, 40), 0.7, seed=4)
    together = jax.vmap(lambda s, v: cka.gram_sums(s, v, tile=16), in_axes=(1, 0))(states, valid)
    for g in range(4):
        alone = cka.gram_sums(states[:, g], valid[g], tile=16)
        jax.tree.map(lambda x, y, g=g: np.testing.assert_allclose(x[g], y, rtol=1e-5), together, alone)


def test_second_call_does_not_recompile():
    traced = []

    def function(states, valid):
        traced.append(states.shape)
        sums = cka.gram_sums(states, valid, tile=16)
        return (
            cka.cka(cka.hsic(sums, debiased=True)),
            cka.pair_statistics(states, valid),
            cka.channel_share(states, valid),
        )

    jitted = jax.jit(function)
    for seed, valid in ((0, everything(40)), (1, jnp.arange(40) < 7)):
        jax.block_until_ready(jitted(walk(2, 40, 6, seed=seed), valid))
    assert traced == [(2, 40, 6)]


def test_never_holds_a_gram_matrix():
    layers, n, d = 4, 4096, 8
    shapes = jax.ShapeDtypeStruct((layers, n, d), jnp.bfloat16), jax.ShapeDtypeStruct((n,), jnp.bool_)
    temporary = jax.jit(cka.gram_sums).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    one_gram = 4 * n * n
    assert temporary < one_gram / 4


COLLECTIVES = r"= (.+?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def group_statistics(states, valid):
    """What an analysis step reduces a group [l, n, d] to."""
    sums = cka.gram_sums(states, valid, tile=16)
    return cka.hsic(sums, debiased=True), cka.pair_statistics(states, valid, tile=16), cka.channel_share(states, valid)


@pytest.fixture
def uncached():
    """Programs of a test are not saved: jax 0.5.3 hangs in the collectives of a program that comes from its cache."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, before)


def sharded(mesh):
    states, valid = walk(3, 16 * 48, 6).reshape(3, 16, 48, 6), some((16, 48), 0.8, seed=5)
    return (
        jax.device_put(states, NamedSharding(mesh, PartitionSpec(None, "batch"))),
        jax.device_put(valid, NamedSharding(mesh, PartitionSpec("batch"))),
    )


@pytest.mark.usefixtures("uncached")
def test_groups_stay_on_their_devices_and_only_layer_by_layer_sums_travel():
    mesh = jax.sharding.Mesh(jax.devices(), ("batch",))
    assert mesh.size == 8
    arguments = sharded(mesh)
    per_group = jax.jit(jax.vmap(group_statistics, in_axes=(1, 0)))
    assert re.findall(COLLECTIVES, per_group.lower(*arguments).compile().as_text()) == []

    def total(states, valid):
        return jax.tree.map(lambda x: x.sum(axis=0), jax.vmap(group_statistics, in_axes=(1, 0))(states, valid))

    replicated = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(total, out_shardings=replicated).lower(*arguments).compile()
    collectives = re.findall(COLLECTIVES, compiled.as_text())
    assert collectives, "the sum over groups must cross devices"
    assert {name for _, name in collectives} == {"all-reduce"}
    shapes = [shape for result, _ in collectives for shape in re.findall(r"\w+\[([\d,]*)\]", result)]
    assert set(shapes) <= {"3,3", "3", ""}

    one_device = jax.tree.map(
        lambda x: np.asarray(x).sum(axis=0), per_group(*jax.device_put(arguments, jax.devices()[0]))
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), compiled(*arguments), one_device)


def test_gram_flops_is_what_xla_counts_for_one_tile():
    layers, n, d = 5, 96, 32
    shapes = jax.ShapeDtypeStruct((layers, n, d), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.bool_)
    counted = jax.jit(cka.gram_sums).lower(*shapes).compile().cost_analysis()["flops"]
    assert cka.gram_flops(layers, n, d) == pytest.approx(counted, rel=0.1)


def test_gram_flops_of_many_tiles_tends_to_half_of_the_full_product():
    layers, n, d = 18, 256 * 64, 512
    assert cka.gram_flops(layers, n, d) == pytest.approx(layers * n * n * (d + layers), rel=0.03)


def test_rms_normalise_gives_float32_tokens_of_unit_mean_square_and_keeps_zeros():
    states = walk(2, 5, 8).astype(jnp.bfloat16).at[0, 3].set(0)
    actual = cka.rms_normalise(states)
    assert actual.dtype == jnp.float32
    wanted = np.ones((2, 5))
    wanted[0, 3] = 0
    all_equal(jnp.mean(actual**2, axis=-1), wanted, 1e-6)


def test_massive_channel_hides_change_from_raw_cka_but_not_from_rms_normalised():
    states = jax.random.normal(jax.random.key(6), (2, 200, 32))  # unrelated layers
    states = states.at[:, :4, 5].set(3000)
    valid = everything(200)
    assert np.asarray(cka.channel_share(states, valid)).min() > 0.99
    assert matrix_of(states, valid, True, 64)[0, 1] > 0.99
    assert matrix_of(cka.rms_normalise(states), valid, True, 64)[0, 1] < 0.6


def test_channel_share_is_the_largest_share_of_the_centred_variance_of_valid_rows():
    states, valid = walk(3, 50, 4, mean=100.0).at[2].set(7.0), jnp.arange(50) % 3 > 0
    states = jnp.where(valid[None, :, None], states, jnp.nan)
    variance = np.asarray(states[:, valid], np.float64).var(axis=1)
    wanted = variance[:2].max(axis=1) / variance[:2].sum(axis=1)
    actual = np.asarray(cka.channel_share(states, valid))
    all_equal(actual[:2], wanted, 1e-5)
    assert np.isnan(actual[2])


def pair_means(states, valid, tile=16):
    sums = cka.pair_statistics(states, valid, tile=tile)
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
    all_equal(actual["angle"], wanted["angle"], 1e-7)


def test_pair_statistics_of_a_valid_token_without_direction_is_nan():
    states = walk(2, 5, 4).at[1, 2].set(0)
    assert np.isnan(pair_means(states, everything(5))["cosine"][0, 1])
    assert np.isfinite(pair_means(states, jnp.arange(5) != 2)["cosine"]).all()


def test_rotation_that_cka_does_not_see_is_seen_by_the_pairs():
    (first,) = walk(1, 500, 32)
    states = jnp.stack([first, 3 * first @ rotation(32)])
    assert matrix_of(states, everything(500), True, 256)[0, 1] > 0.9999
    means = pair_means(states, everything(500))
    assert means["cosine"][0, 1] < 0.5
    assert means["residual"][0, 1] > 1
