import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_cka as reference
from jax.sharding import NamedSharding, PartitionSpec
from residual_streams import everything, rotation, some, walk

from clp_jax import cka
from clp_jax.distances import pair_statistics
from clp_jax.tiles import ROWS

SMALL_SIZE = 2e-6  # CKA: a few float32 roundings, n and d up to some hundreds
FULL_SIZE = 1e-6  # CKA at l = 18, n = 2048, d = 512: the promise; seen 3.4e-7
PROMISE = 1e-6  # CKA of difficult states, on all machines; seen 5e-7
BFLOAT16_STATES = 1e-5  # CKA from bfloat16 states whose mean is 100 times the spread: the promise; seen 3e-7


@functools.partial(jax.jit, static_argnums=2)
def matrices_of(states, valid, tile):
    """Both estimators at both scales: one program for the four."""
    sums = cka.gram_sums(states, valid, tile=tile)._asdict()
    return {
        scale: [cka.cka(cka.hsic(of_scale, debiased=debiased)) for debiased in (False, True)]
        for scale, of_scale in sums.items()
    }


def matrix_of(states, valid, debiased, tile, scale="raw"):
    return matrices_of(states, valid, tile)[scale][debiased]


def all_equal(actual, wanted, tolerance):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(wanted), rtol=0, atol=tolerance)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("tile", [8, 16, 24, 37, 256])
def test_equals_the_definition_at_any_tile(debiased, tile):
    states = walk(3, 37, 6)
    wanted = reference.cka_matrix(states, debiased=debiased)
    all_equal(matrix_of(states, everything(37), debiased, tile), wanted, SMALL_SIZE)
    wanted = reference.cka_matrix(reference.rms_normalise(states), debiased=debiased)
    all_equal(matrix_of(states, everything(37), debiased, tile, "rms"), wanted, SMALL_SIZE)


@pytest.mark.parametrize("debiased", [False, True])
def test_hsic_equals_the_definition_itself(debiased):
    states = walk(3, 30, 5)
    function = reference.hsic_debiased if debiased else reference.hsic_biased
    sums = jax.jit(functools.partial(cka.gram_sums, tile=16))(states, everything(30))
    actual = cka.hsic(sums.raw, debiased=debiased)
    np.testing.assert_allclose(actual, reference.matrix(states, function), rtol=2e-5)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("garbage", [1e9, np.nan, np.inf])
def test_rows_that_are_not_valid_do_not_count(debiased, garbage):
    states, valid = walk(3, 40, 6), some(40, 0.6, seed=1)
    dirty = jnp.where(valid[None, :, None], states, garbage)
    wanted = reference.cka_matrix(states[:, valid], debiased=debiased)
    all_equal(matrix_of(dirty, valid, debiased, 16), wanted, SMALL_SIZE)
    wanted = reference.cka_matrix(reference.rms_normalise(states[:, valid]), debiased=debiased)
    all_equal(matrix_of(dirty, valid, debiased, 16, "rms"), wanted, SMALL_SIZE)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_keeps_its_digits_when_the_mean_is_100_times_the_spread(debiased, dtype):
    states = walk(3, 200, 24, mean=100.0).astype(dtype)
    wanted = reference.cka_matrix(np.asarray(states.astype(jnp.float32)), debiased=debiased)
    all_equal(matrix_of(states, everything(200), debiased, 64), wanted, BFLOAT16_STATES)


@pytest.mark.slow
def test_keeps_its_digits_when_the_mean_is_100000_times_the_spread():
    """There the rounding of the mean itself, which a second pass takes away, is as large as the spread's digits."""
    states = walk(3, 1000, 24, mean=1e5)
    exact = np.asarray(states, np.float64)
    wanted = reference.cka_matrix(exact - exact.mean(axis=1, keepdims=True), debiased=False)
    all_equal(matrix_of(states, everything(1000), False, 64), wanted, SMALL_SIZE)
    wanted = reference.cka_matrix(reference.rms_normalise(states), debiased=True)
    all_equal(matrix_of(states, everything(1000), True, 64, "rms"), wanted, SMALL_SIZE)


def spiked(states, height, drift):
    """Two per cent of the tokens get two massive channels that drift from layer to layer."""
    rng, states = np.random.default_rng(5), np.array(states, np.float64)
    layers, n, _ = states.shape
    states[:, : n // 50, [3, 7]] += height * (1 + drift * rng.standard_normal((layers, n // 50, 2)))
    return jnp.asarray(states, jnp.float32)


def lengthened(states, deviation):
    """Tokens whose lengths spread over orders of magnitude, from layer to layer in another way."""
    rng = np.random.default_rng(6)
    return states * jnp.asarray(np.exp(deviation * rng.standard_normal((*states.shape[:2], 1))), jnp.float32)


DIFFICULT = {
    "neighbours at 0.99999": walk(3, 256, 192, step=0.003),
    "and means of 100 times the spread": walk(3, 256, 192, step=0.003, mean=100.0),
    "spikes": spiked(walk(3, 256, 192, step=0.3), 300, drift=0.05),
    "spikes of neighbours at 0.99999": spiked(walk(3, 256, 192, step=0.003, mean=10.0), 300, drift=0.003),
    "half of the tokens 10,000 times as long": walk(3, 256, 192, step=0.3).at[:, ::2].multiply(1e4),
    "half of them 1,000 times, in a common direction": (
        (walk(3, 256, 192, step=0.1) + 3 * walk(1, 1, 192, seed=3)).at[:, ::2].multiply(1e3)
    ),
    "a common direction of any length": lengthened(walk(3, 256, 192, step=0.03) + 3 * walk(1, 1, 192, seed=3), 1.5),
}


def on_bfloat16_matrix_unit(subscripts, x, y, *, precision, einsum=jnp.einsum):
    """What such a unit does: products of one or two parts of each operand, without that of the small ones."""
    product = functools.partial(einsum, subscripts, precision=jax.lax.Precision.HIGHEST)
    if precision == jax.lax.Precision.HIGHEST:
        return product(x, y)

    def parts(z):
        high = z.astype(jnp.bfloat16).astype(jnp.float32)
        return high, (z - high).astype(jnp.bfloat16).astype(jnp.float32)

    (x_high, x_low), (y_high, y_low) = parts(x), parts(y)
    passes = {
        jax.lax.DotAlgorithmPreset.BF16_BF16_F32: [],
        jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3: [(x_high, y_low), (x_low, y_high)],
    }
    return product(x_high, y_high) + sum(product(*pair) for pair in passes[precision])


MACHINES = {"CPU": jnp.einsum, "bfloat16 matrix unit": on_bfloat16_matrix_unit}


@functools.cache
def sums_by(machine):
    """`gram_sums` compiled once for all states of a machine; the first call finds its product patched in."""
    return jax.jit(lambda states, valid: cka.gram_sums(states, valid, tile=128))


def assert_within_promise(states, valid, machine, monkeypatch):
    monkeypatch.setattr(jnp, "einsum", MACHINES[machine])
    sums = sums_by(machine)(states, valid)
    raw = np.asarray(states, np.float64)[:, np.asarray(valid)]
    exact = {"raw": raw, "rms": reference.rms_normalise(raw)}
    for scale, debiased in itertools.product(exact, (False, True)):
        actual = cka.cka(cka.hsic(getattr(sums, scale), debiased=debiased))
        all_equal(actual, reference.cka_matrix(exact[scale], debiased=debiased), PROMISE)


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("states", DIFFICULT.values(), ids=DIFFICULT)
def test_is_within_its_promise_of_float64_on_difficult_states_on_any_machine(states, machine, monkeypatch):
    assert_within_promise(states, everything(256), machine, monkeypatch)


def with_massive(what, height, mean):
    """States some of whose tokens, or one channel, are ``height`` times the others, or their spread; or one, a part."""
    rng, states = np.random.default_rng(1), np.array(walk(3, 256, 192, step=0.3, mean=mean), np.float64)

    def added(tokens):
        states[:, tokens] += height * (rng.standard_normal((len(tokens), 192)) + rng.standard_normal((3, 1, 192)) / 3)

    {
        "a token of its own direction": lambda: added([3]),
        "three tokens": lambda: added([3, 100, 200]),
        "a longer token": lambda: states[:, 3].__imul__(height),
        "a shorter token": lambda: states[:, 3].__itruediv__(height),
        "another token in every layer": lambda: [states[i, 5 * i + 3].__imul__(height) for i in range(3)],
        "one observation": lambda: states[:, :64].__imul__(height),
        "one channel": lambda: states[:, :, 5].__imul__(height),
    }[what]()
    return jnp.asarray(states, jnp.float32)


@pytest.mark.parametrize("mean", [pytest.param(0.0, marks=pytest.mark.slow), 100.0])
@pytest.mark.parametrize("height", [1e4, *(pytest.param(x, marks=pytest.mark.slow) for x in (1e2, 1e3, 1e5))])
@pytest.mark.parametrize("machine", ["bfloat16 matrix unit", pytest.param("CPU", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "what",
    [
        "a token of its own direction",
        "three tokens",
        "a longer token",
        "a shorter token",
        "another token in every layer",
        "one observation",
        "one channel",
    ],
)
def test_is_within_its_promise_of_float64_with_massive_activations(what, height, mean, machine, monkeypatch):
    states = with_massive(what, height, mean)
    assert_within_promise(states, everything(256), machine, monkeypatch)
    assert_within_promise(states, some(256, 0.7, seed=1).at[3].set(True), machine, monkeypatch)


def test_keeps_its_digits_over_thousands_of_tiles():
    states = walk(3, 1024, 16)
    centred = np.asarray(states, np.float64) - np.asarray(states, np.float64).mean(axis=1, keepdims=True)
    wanted = np.array([[np.sum((x.T @ y) ** 2) for y in centred] for x in centred])
    sums = jax.jit(functools.partial(cka.gram_sums, tile=8))(states, everything(1024)).raw  # 8256 pairs of tiles
    np.testing.assert_allclose(cka.hsic(sums, debiased=False) * 1023**2, wanted, rtol=1e-6)


@pytest.mark.slow
def test_is_within_its_promise_of_float64_at_full_size():
    states = walk(18, 2048, 512, step=0.3)
    layers = [0, 1, 8, 17]
    centred = np.asarray(states, np.float64)[layers]
    centred -= centred.mean(axis=1, keepdims=True)
    hsic = np.array([[np.sum((x.T @ y) ** 2) for y in centred] for x in centred])  # features, not Grams: a second road
    wanted = hsic / np.sqrt(np.outer(np.diagonal(hsic), np.diagonal(hsic)))
    all_equal(np.asarray(matrix_of(states, everything(2048), False, ROWS))[np.ix_(layers, layers)], wanted, FULL_SIZE)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize(("layers", "d"), [(1, 3), (30, 2), (2, 130)])
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


@pytest.mark.slow
def test_debiased_groups_add_up_to_the_whole_and_biased_groups_keep_their_bias():
    # 64 groups of 16 rows; layers 0 and 1 are related, 2 is not.
    states = jnp.concatenate([walk(2, 1024, 64, step=1.0), walk(1, 1024, 64, seed=9)])
    groups = states.reshape(3, 64, 16, 64).swapaxes(0, 1)
    sums = jax.jit(jax.vmap(cka.gram_sums))(groups, jnp.ones((64, 16), bool)).raw
    whole = np.asarray(matrix_of(states, everything(1024), True, 256))
    debiased = np.asarray(cka.cka(cka.hsic(sums, debiased=True).sum(axis=0)))
    biased = np.asarray(cka.cka(cka.hsic(sums, debiased=False).sum(axis=0)))
    all_equal(debiased, whole, 0.02)
    assert biased[0, 2] > 0.7 + whole[0, 2]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5])
def test_too_few_samples_are_nan(count):
    sums = jax.jit(cka.gram_sums)(walk(2, 9, 6), jnp.arange(9) < count).raw
    assert float(sums.count) == count
    assert bool(jnp.isnan(cka.hsic(sums, debiased=True)).all()) == (count < 4)
    assert bool(jnp.isnan(cka.hsic(sums, debiased=False)).all()) == (count < 3)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, 12345.678, -3e-5, 1e12])
@pytest.mark.parametrize("debiased", [False, True])
def test_constant_features_are_nan_and_spoil_no_other_layer(constant, debiased):
    states = walk(3, 100, 8).at[1].set(constant)
    actual = np.asarray(matrix_of(states, everything(100), debiased, 32))
    assert np.isnan(actual[1]).all() and np.isnan(actual[:, 1]).all()
    all_equal(actual[0, 2], reference.cka_matrix(states[::2], debiased=debiased)[0, 1], SMALL_SIZE)
    assert np.isnan(matrix_of(states, everything(100), debiased, 32, "rms")[1]).all()


@pytest.mark.parametrize("length", [1.0, 1e-3, 12345.678])
def test_tokens_of_one_direction_and_any_length_are_constant_once_normalised(length):
    direction = jax.random.normal(jax.random.key(4), (8,))
    lengths = jnp.exp(jax.random.normal(jax.random.key(5), (100, 1)))
    states = walk(3, 100, 8).at[1].set(length * lengths * direction)
    actual = np.asarray(matrix_of(states, everything(100), True, 32, "rms"))
    assert np.isnan(actual[1]).all() and np.isnan(actual[:, 1]).all()
    assert np.isfinite(matrix_of(states, everything(100), True, 32)).all()


def test_features_whose_squared_hsic_overflows_float32_are_fine():
    states = walk(3, 64, 16)
    wanted = matrix_of(states, everything(64), True, 32)
    all_equal(matrix_of(1e7 * states, everything(64), True, 32), wanted, SMALL_SIZE)


def test_vmap_equals_one_group_after_the_other():
    states, valid = walk(2, 4 * 40, 6).reshape(2, 4, 40, 6), some((4, 40), 0.7, seed=4)
    sums = functools.partial(cka.gram_sums, tile=16)
    together = jax.jit(jax.vmap(sums, in_axes=(1, 0)))(states, valid)
    for g in range(4):
        alone = jax.jit(sums)(states[:, g], valid[g])
        jax.tree.map(lambda x, y, g=g: np.testing.assert_allclose(x[g], y, rtol=1e-5), together, alone)


def test_second_call_does_not_recompile():
    traced = []

    def function(states, valid):
        traced.append(states.shape)
        sums = cka.gram_sums(states, valid, tile=16)
        return (
            cka.cka(cka.hsic(sums.raw, debiased=True)),
            cka.cka(cka.hsic(sums.rms, debiased=True)),
            pair_statistics(states, valid),
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
    both = [cka.hsic(scale, debiased=True) for scale in sums]
    return both, pair_statistics(states, valid, tile=16), cka.channel_share(states, valid)


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


@pytest.mark.slow
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
    assert set(shapes) <= {"2,3,3", "3,3", "3", ""}

    one_device = jax.tree.map(
        lambda x: np.asarray(x).sum(axis=0), per_group(*jax.device_put(arguments, jax.devices()[0]))
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), compiled(*arguments), one_device)


def test_rms_normalise_gives_float32_tokens_of_unit_mean_square_and_keeps_zeros():
    states = walk(2, 5, 8).astype(jnp.bfloat16).at[0, 3].set(0)
    actual = cka.rms_normalise(states)
    assert actual.dtype == jnp.float32
    wanted = np.ones((2, 5))
    wanted[0, 3] = 0
    all_equal(jnp.mean(actual**2, axis=-1), wanted, 1e-6)


@pytest.mark.slow
def test_massive_channel_hides_change_from_raw_cka_but_not_from_rms_normalised():
    states = jax.random.normal(jax.random.key(6), (2, 200, 32))  # unrelated layers
    states = states.at[:, :4, 5].set(3000)
    valid = everything(200)
    assert np.asarray(cka.channel_share(states, valid)).min() > 0.99
    assert matrix_of(states, valid, True, 64)[0, 1] > 0.99
    assert matrix_of(states, valid, True, 64, "rms")[0, 1] < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("mean", [100.0, 1e6])  # the rounding of a mean is 0.03 in the second
def test_channel_share_is_the_largest_share_of_the_centred_variance_of_valid_rows(mean):
    states, valid = walk(3, 50, 4, mean=mean).at[2].set(7.0), jnp.arange(50) % 3 > 0
    states = jnp.where(valid[None, :, None], states, jnp.nan)
    variance = np.asarray(states[:, valid], np.float64).var(axis=1)
    wanted = variance[:2].max(axis=1) / variance[:2].sum(axis=1)
    actual = np.asarray(cka.channel_share(states, valid))
    all_equal(actual[:2], wanted, 1e-5)
    assert np.isnan(actual[2])
