"""Files and trees of GR00T-N1.5 become each other bit for bit, and a cut is the cut that upstream loads."""

import json

import groot_recordings as golden
import numpy as np
import pytest
from groot_recordings import GOLDEN, KEPT

from clp_jax.errors import InputError
from clp_jax.models import abstract_params, groot
from clp_jax.trees import difference, flatten


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and np.array_equal(ours[name], tensor), name


@pytest.mark.parametrize("name", ["ckpt", "ckpt_pruned"])
def test_a_checkpoint_goes_through_the_tree_bit_for_bit(name):
    assert_same(golden.named(golden.checkpoint(name)), golden.tensors(name))


def test_rows_of_the_kept_blocks_are_the_pruned_checkpoint():
    ours, theirs = golden.sliced(golden.checkpoint("ckpt"), KEPT), golden.checkpoint("ckpt_pruned")
    assert not difference(theirs, ours, dtypes=True)
    theirs = flatten(theirs)
    for path, leaf in flatten(ours).items():
        assert np.array_equal(leaf, theirs[path]), path


def test_stacked_leaves_are_as_long_as_their_tower():
    architecture = groot.GROOT_N15.with_depths({"dit": 5})
    rows = {}
    for path, leaf in flatten(abstract_params(architecture)).items():
        stack = golden.stack_of(groot.STACKS, path)
        if stack is not None:
            rows.setdefault(stack.tower, set()).update(stack.blocks(leaf.shape[0]))
    assert {tower: len(blocks) for tower, blocks in rows.items()} == architecture.depths
    assert all(blocks == set(range(len(blocks))) for blocks in rows.values())


def test_names_of_lerobot_have_its_prefix():
    leaves = flatten(abstract_params(golden.architecture("ckpt")))
    tensors = {groot.LEROBOT_PREFIX + name: tensor for name, tensor in golden.tensors("ckpt").items()}
    prefix = groot.prefix_of(tensors)
    names = {name.format(i=0) for rule in groot.layout(leaves, prefix).values() for name in rule.names}
    assert all(name.startswith("_groot_model.") for name in names)
    tree = golden.tree_of(tensors, golden.architecture("ckpt"), prefix=prefix)
    assert_same(flatten(tree), flatten(golden.checkpoint("ckpt")))
    assert groot.prefix_of(golden.tensors("ckpt")) == ""


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_head_may_have_either_name(kept):
    both = ("lm_head.weight", "model.embed_tokens.weight")
    tensors = {
        name: tensor
        for name, tensor in golden.tensors("ckpt").items()
        if not name.endswith(both) or name.endswith(f"language_model.{kept}")
    }
    architecture = groot.architecture_of(tensors, golden.architecture_folder("ckpt"), dtype="float32")
    assert not architecture.lm_head
    tree = golden.tree_of(tensors, architecture, embedding=groot.embedding_name(tensors))
    llm = tree["backbone"]["llm"]
    assert "lm_head" not in llm
    assert np.array_equal(llm["embed_tokens"], golden.checkpoint("ckpt")["backbone"]["llm"]["embed_tokens"])
    # What the tree is written as has the name that upstream loads.
    assert "backbone.eagle_model.language_model.model.embed_tokens.weight" in golden.shapes_of(tree)


def test_of_two_different_heads_the_embedding_is_read_and_both_are_kept():
    tensors = dict(golden.tensors("ckpt"))
    head = "backbone.eagle_model.language_model.lm_head.weight"
    tensors[head] = tensors[head] + 1
    tree = golden.tree_of(tensors, golden.architecture("ckpt"))
    embedding = tensors["backbone.eagle_model.language_model.model.embed_tokens.weight"]
    assert np.array_equal(tree["backbone"]["llm"]["embed_tokens"], embedding)
    assert_same(golden.named(tree), tensors)


def test_a_checkpoint_without_the_unused_pooling_head():
    tensors = {name: x for name, x in golden.tensors("ckpt").items() if ".vision_model.head." not in name}
    architecture = groot.architecture_of(tensors, golden.architecture_folder("ckpt"), dtype="float32")
    assert not architecture.pooling_head
    assert_same(golden.named(golden.tree_of(tensors, architecture)), tensors)


def test_a_leaf_without_a_rule_is_an_error():
    with pytest.raises(InputError, match="no rule matches 'backbone/llm/extra'"):
        groot.layout({"backbone/llm/embed_tokens": None, "backbone/llm/extra": None})


def test_config_json_says_the_new_depths():
    whole = json.loads((GOLDEN / "ckpt" / "config.json").read_text())
    cut = groot.config_with_depths(whole, {name: len(blocks) for name, blocks in KEPT.items()})
    assert cut == json.loads((GOLDEN / "ckpt_pruned" / "config.json").read_text())
    assert whole == json.loads((GOLDEN / "ckpt" / "config.json").read_text())
    with pytest.raises(InputError, match="no field for the depth of vision"):
        groot.config_with_depths(whole, {"vision": 20})
    with pytest.raises(InputError, match=r"backbone_cfg\.select_layer"):
        groot.config_with_depths({"type": "groot"}, {"llm": 5})


def test_initial_parameters_have_the_shapes_of_a_checkpoint():
    for name in ("ckpt", "ckpt_pruned"):
        assert not difference(golden.checkpoint(name), abstract_params(golden.architecture(name)), dtypes=True)
