"""Fits from sums against fits from the data themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax import least_squares
from clp_jax.least_squares import fit, solve, sums_of

ROWS, FEATURES, CHANNELS = 200, 7, 3


def case(seed=0, gated=False, noise=0.1):
    """Tokens of which one in five is invalid and infinite, and an error that is nearly linear in them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, ROWS // 4, FEATURES)).astype(np.float32) * np.float32([1, 1, 1, 1, 1, 30, 0])
    change = np.random.default_rng(9).standard_normal((FEATURES, CHANNELS)).astype(np.float32)
    gate = 1 + 0.3 * rng.random((4, 1, CHANNELS), np.float32) if gated else None
    error = x @ change * (1 if gate is None else gate) + noise * rng.standard_normal((4, ROWS // 4, CHANNELS))
    valid = rng.random((4, ROWS // 4)) < 0.8
    x[~valid] = np.inf
    return x, error.astype(np.float32), valid, gate


def sums(x, error, valid, gate):
    x, error, valid = (jnp.asarray(array) for array in (x, error, valid))
    return sums_of(x, error, 2 * error, valid, None if gate is None else jnp.asarray(gate))


def test_without_regularisation_it_is_least_squares():
    x, error, valid, gate = case()
    ridge, change, before, after = fit(sums(x, error, valid, gate), sums(*case(1)), [1e-6])
    wanted = np.linalg.lstsq(x[valid].astype(np.float64), error[valid].astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(change, wanted, atol=1e-4)
    assert ridge == 1e-6 and before == pytest.approx(0.5)
    x, error, valid, _ = case(1)
    left = np.linalg.norm(error[valid] - x[valid] @ np.asarray(change)) / np.linalg.norm(2 * error[valid])
    assert after == pytest.approx(left, rel=0.02)  # of two squares that nearly cancel in float32


def test_a_channel_that_is_never_active_is_not_changed():
    _, change, _, _ = fit(sums(*case()), sums(*case(1)), [0.01])
    assert not np.asarray(change)[6].any() and np.isfinite(change).all()


def test_regularisation_goes_by_each_channels_own_size():
    x, error, valid, gate = case()
    larger = x * np.float32([1, 1, 1, 1, 1000, 1, 1])
    _, small, _, _ = fit(sums(x, error, valid, gate), sums(*case(1)), [0.3])
    held = case(1)
    _, large, _, _ = fit(
        sums(larger, error, valid, gate), sums(held[0] * np.float32([1, 1, 1, 1, 1000, 1, 1]), *held[1:]), [0.3]
    )
    np.testing.assert_allclose(np.asarray(large)[4] * 1000, np.asarray(small)[4], rtol=1e-4)


def test_held_out_data_choose_the_strength_and_refuse_what_does_harm():
    few = [array[:1, :9] if array is not None else None for array in case(0, noise=10.0)]
    strengths = [1e-6, 1e-2, 1.0]
    ridge, change, before, after = fit(sums(*few), sums(*case(1, noise=10.0)), strengths)
    assert ridge in strengths[1:] and after < before
    contrary = sums(few[0], -few[1], few[2], few[3])
    ridge, change, before, after = fit(sums(*case(0)), contrary, strengths)
    assert ridge is None and not np.asarray(change).any() and after == before


def test_gated_channels_are_reached_in_a_few_steps():
    x, error, valid, gate = case(gated=True, noise=0.0)
    total = np.zeros((FEATURES, CHANNELS), np.float32)
    for _ in range(4):
        left = np.where(valid[..., None], error - gate * (np.where(valid[..., None], x, 0) @ total), 0)
        found = sums(x, left, valid, gate)
        assert found.gated
        total += np.asarray(fit(found, found, [1e-6])[1])
    wanted = np.random.default_rng(9).standard_normal((FEATURES, CHANNELS))
    np.testing.assert_allclose(total[:6], wanted[:6], atol=2e-3)


def test_sums_of_two_batches_are_those_of_both():
    x, error, valid, gate = case(gated=True)
    whole = sums(x, error, valid, gate)
    parts = [sums(x[i], error[i], valid[i], gate[i]) for i in (slice(0, 1), slice(1, 4))]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-4), *parts, whole)


def test_sums_of_a_tpu_are_solved_on_its_host(monkeypatch):
    here = fit(sums(*case()), sums(*case(1)), [0.01, 0.1])
    assert least_squares.solved_on_host("tpu") and not least_squares.solved_on_host("gpu")
    monkeypatch.setattr(least_squares, "solved_on_host", lambda platform: True)
    mesh = jax.sharding.Mesh(jax.devices(), ("x",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spread = [jax.device_put(sums(*one), everywhere) for one in (case(), case(1))]
    solved = []
    monkeypatch.setattr(least_squares, "solve", lambda *a: solved.append(a[0].gram.devices()) or solve(*a))
    there = fit(*spread, [0.01, 0.1])
    assert solved == [{jax.local_devices(backend="cpu")[0]}] * 2
    for one, other in zip(here, there, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-6)
