"""Gates: what the loss says about a block, against finite differences and against really pruned models."""

import jax
import numpy as np
import pytest
import toys

from clp_jax.data import arrange
from clp_jax.models import Gates, build
from clp_jax.models.pi0 import Observation, compute_loss
from clp_jax.plan import PrunePlan
from clp_jax.prune import apply_plan
from clp_jax.selection import Evidence, select
from clp_jax.sensitivity import _loss_step, group_gates, make_group_loss, make_loss, measure_gates, plan_gates
from clp_jax.sharding import make_mesh
from clp_jax.similarity import batches

GROUP = ("vlm", "action")


@pytest.fixture(scope="module")
def case():
    arch = toys.architecture()
    params, data = toys.params(arch), toys.data(arch, 6)
    fixed = list(batches(data, arrange(data.episodes, 1), 8, make_mesh()))
    return arch, params, data, fixed, make_loss(arch, params, fixed)


def plan(arch, keep):
    return PrunePlan.of(arch.kind, arch.depths, {"vlm": keep, "action": keep}, coupled=arch.coupled)


@pytest.mark.slow
def test_loss_is_that_of_the_model(case):
    arch, params, data, _, loss = case
    a = data.arrays
    wanted = compute_loss(
        build(arch), params, Observation.from_dict(nested(a)), a["actions"], noise=a["noise"], time=a["time"]
    )
    np.testing.assert_allclose(loss(Gates()), wanted.mean(), rtol=1e-5)


def nested(arrays):
    keys = ("image", "image_mask")
    found = {k: v for k, v in arrays.items() if "/" not in k}
    return found | {p: {k.split("/")[1]: v for k, v in arrays.items() if k.startswith(f"{p}/")} for p in keys}


@pytest.mark.slow
def test_loss_with_gates_closed_is_the_loss_of_the_pruned_model(case):
    arch, params, _, fixed, loss = case
    chosen = plan(arch, [0, 3])
    small = make_loss(arch.with_depths({"vlm": 2, "action": 2}), apply_plan(params, chosen), fixed)
    np.testing.assert_allclose(loss(plan_gates(arch, chosen)), small(Gates()), rtol=1e-5)


@pytest.mark.slow
def test_gradient_equals_finite_differences(case):
    arch, params, _, fixed, loss = case
    found = measure_gates(arch, params, fixed, GROUP)
    step, group_loss = 1e-2, make_group_loss(GROUP, loss)
    for block in range(toys.DEPTH):
        up, down = np.ones(toys.DEPTH), np.ones(toys.DEPTH)
        up[block], down[block] = 1 + step, 1 - step
        slope = (group_loss(up) - group_loss(down)) / (2 * step)
        np.testing.assert_allclose(found.gradient[block], slope, rtol=2e-2, atol=1e-3)
    assert (found.sensitivity >= np.abs(found.gradient) - 1e-6).all()


@pytest.mark.slow
def test_gauss_newton_equals_the_jacobian_product(case):
    arch, params, data, fixed, _ = case
    found = measure_gates(arch, params, fixed, GROUP).gauss_newton
    model, a = build(arch), data.arrays
    t = a["time"][:, None, None]
    x_t = t * a["noise"] + (1 - t) * a["actions"]

    def velocity(alpha):
        gates = group_gates(GROUP, alpha[:, None])
        return model.apply({"params": params}, Observation.of(data.arrays), x_t, a["time"], gates=gates)[0]

    # Reverse mode, one output at a time: independent of the forward mode under test. (jit(jacrev) of this function,
    # which batches the pullback, gives wrong numbers with JAX 0.10.2 on CPU; 0.5.3 and this loop agree with finite
    # differences.)
    pull = jax.jit(lambda cotangent: jax.vjp(velocity, np.ones(toys.DEPTH, np.float32))[1](cotangent)[0])
    outputs = np.eye(x_t.size, dtype=np.float32).reshape(-1, *x_t.shape)
    flat = np.stack([np.asarray(pull(one), np.float64) for one in outputs])
    np.testing.assert_allclose(found, 2 * flat.T @ flat / len(flat), rtol=1e-3)


def test_greedy_finds_the_best_single_block_without_compiling_again(case):
    arch, _, _, fixed, loss = case
    rows = fixed[0].present.sharding
    group_loss = make_group_loss(GROUP, loss)
    singles = [group_loss(np.where(np.arange(toys.DEPTH) == block, 0.0, 1.0)) for block in range(toys.DEPTH)]
    compiled = _loss_step(arch, rows)._cache_size()
    evidence = Evidence.unmeasured(toys.DEPTH)
    evidence = Evidence(toys.DEPTH, evidence.similarity, evidence.damage, loss=group_loss)
    assert select("greedy", evidence, remove=1).removed == (int(np.argmin(singles)),)
    assert _loss_step(arch, rows)._cache_size() == compiled > 0


@pytest.mark.slow
def test_vision_gates_remove_vision_blocks(case):
    arch, params, _, fixed, loss = case
    chosen = PrunePlan.of(arch.kind, arch.depths, {"vision": [1]})
    small = make_loss(arch.with_depths({"vision": 1}), apply_plan(params, chosen), fixed)
    np.testing.assert_allclose(loss(plan_gates(arch, chosen)), small(Gates()), rtol=1e-5)
    found = measure_gates(arch, params, fixed, ("vision",), gauss_newton=False)
    assert found.sensitivity.shape == (2,)
    assert found.gauss_newton is None


def test_fast_has_no_gauss_newton():
    arch = toys.architecture("pi0_fast")
    data = toys.data(arch, 4)
    fixed = list(batches(data, arrange(data.episodes, 1), 8, make_mesh()))
    found = measure_gates(arch, toys.params(arch), fixed, ("vlm",))
    assert found.gauss_newton is None
    assert np.isfinite(found.gradient).all()
