"""Full-size parameter trees, by shapes alone, and architectures read back from them."""

import dataclasses
import json

import pytest
from recordings import GOLDEN

from clp_jax import models
from clp_jax.errors import InputError
from clp_jax.flops import parameter_count
from clp_jax.models import abstract_params
from clp_jax.models.pi0 import PI0, PI0_FAST, PI05, architecture_of
from clp_jax.trees import flatten


def with_lora(architecture):
    """openpi's gemma_2b_lora and gemma_300m_lora."""
    vlm = dataclasses.replace(architecture.vlm, attn_lora_rank=16, ffn_lora_rank=16)
    action = architecture.action and dataclasses.replace(architecture.action, attn_lora_rank=32, ffn_lora_rank=32)
    return dataclasses.replace(architecture, vlm=vlm, action=action)


FULL_SIZE = {
    "pi0": PI0,
    "pi05": PI05,
    "pi0_fast": PI0_FAST,
    "pi0_lora": with_lora(PI0),
    "pi05_lora": with_lora(PI05),
    "pi0_fast_lora": with_lora(PI0_FAST),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_tree_equals_openpi(name):
    theirs = json.loads((GOLDEN / f"param_tree_{name}.json").read_text())
    ours = flatten(abstract_params(FULL_SIZE[name]))
    assert {path: list(leaf.shape) for path, leaf in ours.items()} == {k: v["shape"] for k, v in theirs.items()}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_parameter_count_equals_openpi(name):
    assert parameter_count(FULL_SIZE[name]) == json.loads((GOLDEN / "param_counts.json").read_text())[name]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_architecture_is_read_back_from_shapes(name):
    assert architecture_of(abstract_params(FULL_SIZE[name])) == FULL_SIZE[name]


def test_a_tree_is_traced_once_and_belongs_to_its_caller(monkeypatch):
    architecture = PI0.with_depths({"vlm": 2, "action": 2})
    del abstract_params(architecture)["PaliGemma"]["llm"]
    monkeypatch.delattr(models, "init_params")
    assert architecture_of(abstract_params(architecture)) == architecture


def test_fused_qkv_is_read_back():
    vlm = dataclasses.replace(PI0_FAST.vlm, num_kv_heads=8, depth=2, width=32, mlp_dim=16, head_dim=4)
    architecture = dataclasses.replace(PI0_FAST, vlm=vlm)
    assert architecture_of(abstract_params(architecture)) == architecture


def test_foreign_tree_is_named():
    with pytest.raises(InputError, match="not a π0-family checkpoint"):
        architecture_of({"encoder": {"kernel": abstract_params(PI0)["action_in_proj"]["kernel"]}})


def test_missing_leaf_is_named():
    tree = abstract_params(PI0)
    del tree["PaliGemma"]["llm"]["layers"]["mlp_1"]
    with pytest.raises(InputError, match="mlp_1/linear is missing"):
        architecture_of(tree)
