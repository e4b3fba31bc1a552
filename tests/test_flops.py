"""Operation counts against the compiler's own, and the cost of an analysis at full size."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import toys

from clp_jax.benchmarks import analysis_overhead
from clp_jax.flops import forward_flops, parameter_count, sample_flops
from clp_jax.models import RELEASED, Gates, Lengths, abstract_params, build, family_of
from clp_jax.models.pi0 import PI0, PI0_FAST


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_forward_flops_agree_with_the_compiler(kind):
    """One block per tower: the compiler counts the body of a scan once."""
    toy = toys.architecture(kind)
    arch = dataclasses.replace(
        toy,
        vision=dataclasses.replace(toy.vision, depth=1, width=64, mlp_dim=128),
        vlm=dataclasses.replace(toy.vlm, depth=1, width=128, mlp_dim=512),
        action=dataclasses.replace(toy.action, depth=1, width=64, mlp_dim=256),
        skip_dead=False,
    )
    family, model = family_of(arch), build(arch)
    described = family.inputs(arch, Lengths(10, 16))
    batch = {key: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype) for key, leaf in described.items()}
    batch |= {"noise": batch["actions"], "time": jax.ShapeDtypeStruct((1,), jnp.float32)}
    lowered = jax.jit(lambda p, b: family.forward(model, p, b, gates=Gates())[0]).lower(abstract_params(arch), batch)
    counted = lowered.cost_analysis()["flops"]
    ours = forward_flops(arch, Lengths(10, 16), cameras=3)
    # Ours leaves out norms, activations and softmax; at these widths they are some per cent.
    assert 0.85 < ours / counted < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_similarity_statistics_are_nearly_free_on_an_accelerator_at_full_size(name):
    overhead = analysis_overhead.cost(RELEASED[name]).overhead()
    assert 0.002 < overhead["operations"] < overhead["TPU"] < 0.05
    assert overhead["TPU"] < overhead["H100"] < 0.08


@pytest.mark.slow
def test_nine_of_eighteen_blocks_halve_the_language_stack():
    shape = {"cameras": 3, "lengths": Lengths(50, 48)}
    half = PI0.with_depths({"vlm": 9, "action": 9})
    vision_only = PI0.with_depths({"vlm": 0, "action": 0})
    fixed = forward_flops(vision_only, **shape)
    whole = (dataclasses.replace(a, skip_dead=False) for a in (PI0, half))
    full, pruned = (forward_flops(a, **shape) - fixed for a in whole)
    assert pruned * 2 == full
    assert sample_flops(half, **shape) < sample_flops(PI0, **shape)
    assert parameter_count(PI0) - parameter_count(half) == 9 * 127_408_128


@pytest.mark.slow
def test_dead_work_is_not_counted():
    """All of the VLM's last block but its keys and values."""
    shape = {"cameras": 3, "lengths": Lengths(50, 48)}
    whole, ended = (dataclasses.replace(PI0, skip_dead=skip) for skip in (False, True))
    saved = forward_flops(whole, **shape) - forward_flops(ended, **shape)
    tokens, width, heads, mlp = 3 * 256 + 48, 2048, 8 * 256, 16_384
    assert saved == 2 * tokens * (2 * width * heads + 2 * tokens * heads + 3 * width * mlp)
    assert sample_flops(whole, **shape) - sample_flops(ended, **shape) == saved
    fast = (forward_flops(dataclasses.replace(PI0_FAST, skip_dead=skip), **shape) for skip in (True, False))
    assert len(set(fast)) == 1
