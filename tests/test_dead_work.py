"""The VLM's last block runs as far as its keys and values: nothing that is read changes, and the rest does not run."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from clp_jax.models import Gates, build
from clp_jax.models.pi0 import Observation, compute_loss, sample_actions
from clp_jax.training.adapters import with_adapters
from clp_jax.trees import flatten, unflatten

ROUNDING = 1e-5
"""Relative to the largest entry: the same float32 sums, possibly fused in another way."""

DEAD = re.compile(
    r"PaliGemma/llm/(layers/(attn/(q_einsum|attn_vec_einsum)/.*|mlp/.*|pre_ffw_norm/scale)|final_norm/scale)"
)
"""Parameters of the VLM that reach no action from the last block, those of the only final norm included."""


def fused(arch):
    """As many key heads as query heads, which share one einsum; one block."""
    heads = {name: dataclasses.replace(getattr(arch, name), depth=1, num_kv_heads=2) for name in ("vlm", "action")}
    return dataclasses.replace(arch, **heads)


CASES = {
    "pi0, gates": (toys.architecture(), "all"),
    "pi05, LoRA": (with_adapters(toys.architecture("pi05"), (2, 3)), "dots"),
    "pi0, one block": (toys.architecture().with_depths({"vlm": 1, "action": 1}), "none"),
}


@functools.cache
def computed(arch, params=None, *, sample: bool = True):
    """Losses, gradient and sampled actions; the two models of a comparison run the same lines."""
    params, model, data = toys.params(arch) if params is None else params(arch), build(arch), toys.data(arch, 2)
    rng = np.random.default_rng(1)
    drawn = rng.uniform(0.5, 1.0, (arch.vlm.depth, 2, 2)).astype(np.float32)
    gates = Gates(vlm=drawn[:, 0], action=drawn[:, 1])
    noise, time = data.arrays["noise"], data.arrays["time"]

    def loss(params):
        losses = compute_loss(
            model, params, Observation.of(data.arrays), data.arrays["actions"], noise=noise, time=time, gates=gates
        )
        return losses.mean(), losses

    def run(params):
        gradient, losses = jax.grad(loss, has_aux=True)(params)
        actions = (
            sample_actions(model, params, Observation.of(data.arrays), noise=noise, num_steps=2) if sample else None
        )
        return losses, gradient, actions

    losses, gradient, actions = jax.jit(run)(params)
    return losses, flatten(gradient), actions


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_neither_outputs_nor_gradients_change(case):
    arch, remat = CASES[case]
    on, off = (computed(dataclasses.replace(arch, remat=remat, skip_dead=skip)) for skip in (True, False))
    for ours, wanted in ((on[0], off[0]), (on[2], off[2])):
        np.testing.assert_allclose(ours, wanted, rtol=ROUNDING, atol=ROUNDING)
    assert on[1].keys() == off[1].keys()
    for path, wanted in off[1].items():
        # A bias of the keys moves no softmax: its gradient is the rounding of sums as large as those of the queries.
        scale = max(float(jnp.abs(off[1][path.replace("key/bias", "query/bias")]).max()), 1e-3)
        np.testing.assert_allclose(on[1][path], wanted, rtol=0, atol=ROUNDING * scale, err_msg=path)
    dead = [path for path in on[1] if DEAD.fullmatch(path)]
    assert len(dead) >= 6
    for path in dead:
        last = on[1][path] if "final_norm" in path else on[1][path][-1]
        assert not np.asarray(last).any(), path
    for live in ("attn/kv_einsum/w", "pre_attention_norm/scale", "attn/q_einsum_1/w", "mlp_1/linear"):
        assert np.asarray(on[1][f"PaliGemma/llm/layers/{live}"][-1]).any(), live


def poisoned(arch):
    """Parameters that are NaN where nothing should be read."""
    flat = flatten(toys.params(arch))
    for path, leaf in flat.items():
        if "final_norm" not in path and (DEAD.fullmatch(path)):
            leaf[-1] = np.nan
    return unflatten(flat)


@pytest.mark.slow
def test_what_is_dead_is_not_computed():
    """NaN in it would spoil the gradients of all below it, as it does when the whole block runs."""
    _, gradient, _ = computed(
        dataclasses.replace(toys.architecture(), remat="all", skip_dead=True), poisoned, sample=False
    )
    assert all(np.isfinite(leaf).all() for leaf in gradient.values())
    whole = dataclasses.replace(toys.architecture(), remat="all", skip_dead=False)
    _, gradient, _ = computed(whole, poisoned, sample=False)
    assert not np.isfinite(gradient["PaliGemma/img/embedding/kernel"]).all()


@pytest.mark.slow
def test_heads_that_share_one_einsum():
    arch = fused(toys.architecture())
    on, off = (
        computed(dataclasses.replace(arch, remat="none", skip_dead=skip), sample=False) for skip in (True, False)
    )
    np.testing.assert_allclose(on[0], off[0], rtol=ROUNDING, atol=ROUNDING)
    name = "PaliGemma/llm/layers/attn/qkv_einsum/w"
    np.testing.assert_allclose(on[1][name], off[1][name], rtol=0, atol=ROUNDING)
    queries, keys, values = np.asarray(on[1][name][-1])
    assert not queries.any() and keys.any() and values.any()


@pytest.mark.slow
def test_captured_states_are_those_of_the_whole_block():
    arch, data = dataclasses.replace(toys.architecture(), skip_dead=True), toys.data(toys.architecture(), 2)
    params = toys.params(arch)

    def states(arch):
        inputs = Observation.of(data.arrays), data.arrays["noise"], data.arrays["time"]
        return jax.jit(lambda p: build(arch).apply({"params": p}, *inputs, capture=True)[1]["vlm"].states)(params)

    last = states(arch)[-1]
    np.testing.assert_array_equal(last, states(dataclasses.replace(arch, skip_dead=False))[-1])
    assert np.abs(last - states(arch)[-2]).max() > 0.1
