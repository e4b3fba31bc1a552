"""Merging LoRA adapters: the merged model answers as the model with adapters does."""

import dataclasses

import jax
import numpy as np
import pytest
import recordings
import toys

from clp_jax.checkpoint import read_spec, write_params
from clp_jax.errors import InputError
from clp_jax.loading import read_architecture
from clp_jax.models import abstract_params, build
from clp_jax.models.layers.lora import is_adapter
from clp_jax.models.pi0 import Observation, architecture_of
from clp_jax.models.pi0.lora import Einsum, adapter_equations, merge_lora, merge_weight, with_adapters
from clp_jax.plan import PrunePlan
from clp_jax.provenance import training_record
from clp_jax.trees import check_same_structure, flatten

EQUATIONS = {
    "attn/q_einsum/w": ("BTD,NDH->BTNH", (3, 5, 4), (2, 6, 5)),
    "attn/kv_einsum/w": ("BSD,2KDH->2BSKH", (2, 3, 5, 4), (2, 6, 5)),
    "attn/attn_vec_einsum/w": ("BTNH,NHD->BTD", (3, 4, 5), (2, 6, 3, 4)),
    "attn/attn_vec_einsum_1/w": ("BTNH,NHD->BTD", (3, 4, 5), (2, 6, 3, 4)),
}


@pytest.mark.parametrize("path", EQUATIONS)
def test_a_merged_einsum_is_the_einsum_with_its_adapter(path):
    equation, shape, x_shape = EQUATIONS[path]
    rng = np.random.default_rng(0)
    module = Einsum(shape, jax.nn.initializers.normal(1.0), lora_rank=2, lora_scale=0.75)
    x = jax.numpy.asarray(rng.standard_normal(x_shape), np.float32)
    shapes = jax.eval_shape(lambda key: module.init(key, equation, x), jax.random.key(0))["params"]
    params = {name: rng.standard_normal(leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    merged = merge_weight(path, params["w"], params["lora_a"], params["lora_b"], lora_scale=0.75)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(
            jax.numpy.einsum(equation, x, merged), module.apply({"params": params}, equation, x), atol=1e-4
        )
    assert adapter_equations(equation)  # heads are summed in both factors: a product per head would be wrong
    if "vec" in path:
        wrong = params["w"] + 0.75 * params["lora_a"] @ params["lora_b"]
        assert np.abs(wrong - merged).max() > 0.1


def test_the_recorded_lora_checkpoint_becomes_a_model_without_adapters():
    tree = recordings.checkpoint("pi0_lora_trained/1")
    merged = merge_lora(tree, lora_scale=2.0)
    assert not any(map(is_adapter, flatten(merged)))
    architecture = architecture_of(merged)
    assert (architecture.vlm.attn_lora_rank, architecture.action.ffn_lora_rank) == (0, 0)
    check_same_structure(abstract_params(architecture), merged)


@pytest.mark.slow
def test_every_adapter_of_a_model_is_merged():
    arch = toys.architecture("pi05")
    adapted = {"vlm": dataclasses.replace(arch.vlm, attn_lora_rank=2, ffn_lora_rank=3, lora_scale=0.5)}
    adapted["action"] = dataclasses.replace(arch.action, attn_lora_rank=1, ffn_lora_rank=2, lora_scale=0.5)
    arch = dataclasses.replace(arch, **adapted)
    params = toys.params(arch)
    merged = merge_lora(params, lora_scale=0.5)
    plain = architecture_of(merged, dtype="float32")
    data = toys.data(arch, 2)
    inputs = (Observation.of(data.arrays), data.arrays["noise"], np.ones(2, np.float32))
    adapted, without = (
        jax.jit(build(a).apply)({"params": p}, *inputs)[0] for a, p in ((arch, params), (plain, merged))
    )
    assert np.abs(np.asarray(adapted) - np.asarray(without)).max() < 1e-4


def test_the_scale_is_that_of_the_run_that_trained_the_adapters(tmp_path):
    base = toys.architecture()
    adapted = with_adapters(architecture_of(toys.params(base), lora_scale=2.0), 2, 3)
    assert (adapted.vlm.lora_scale, adapted.action.lora_scale) == (2.0, 2.0)
    plan = PrunePlan.of(base.kind, base.depths, coupled=base.coupled)
    step = {"source": "base", "config": {"lora_scale": 2.0, "data": ["set"], "steps": 1, "batch_size": 1}}
    record = training_record(None, plan, step, {}).to_json()
    write_params(tmp_path / "step", toys.params(adapted), record=record)
    spec = read_spec(tmp_path / "step")
    for given in ({}, {"lora_scale": 2.0}):
        assert read_architecture(spec, **given).vlm.lora_scale == 2.0
    with pytest.raises(InputError, match="--lora-scale 1: its adapters were trained with 2"):
        read_architecture(spec, lora_scale=1.0)
    write_params(tmp_path / "plain", toys.params(base), record=record)
    plain = read_spec(tmp_path / "plain")
    assert read_architecture(plain).vlm.lora_scale == 1.0
    with pytest.raises(InputError, match="it has no LoRA adapters, for which --lora-scale would be"):
        read_architecture(plain, lora_scale=2.0)
    assert read_architecture(plain, lora_scale=2.0, may_lack_adapters=True).vlm.lora_scale == 2.0


def test_a_tree_without_adapters_comes_back_as_it_is():
    tree = toys.params(toys.architecture())
    merged = merge_lora(tree)
    assert all(a is b for a, b in zip(flatten(tree).values(), flatten(merged).values(), strict=True))


def test_a_lonely_factor_is_an_error():
    with pytest.raises(InputError, match="mlp/linear_lora_a"):
        merge_lora({"mlp": {"linear": np.zeros((2, 2)), "linear_lora_a": np.zeros((2, 1))}})
