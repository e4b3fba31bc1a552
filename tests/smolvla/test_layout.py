"""SmolVLA's tree and lerobot's tensors become each other; what a cut writes into the configuration."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from smolvla_recordings import GOLDEN, KEEPS, architecture, blocks, cut, grad_norms, params, parts, tensors, tree_of

from clp_jax.errors import InputError
from clp_jax.models import abstract_params, smolvla
from clp_jax.models.layers.torch_rules import tensors_of, to_tensors
from clp_jax.trees import flatten


def names_of(path, leaf):
    """The tensors of one leaf."""
    return set(tensors_of({path: leaf}, smolvla.layout(flatten(abstract_params(architecture()))), blocks))


def test_full_size_tree_is_lerobots():
    theirs = json.loads((GOLDEN / "param_tree_smolvla.json").read_text())
    leaves = flatten(abstract_params(smolvla.SMOLVLA))
    ours = tensors_of(leaves, smolvla.layout(leaves), blocks)
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == theirs["shapes"]
    assert sum(leaf.size for leaf in leaves.values()) == theirs["total"] == 450_046_176
    frozen = smolvla.trainable(smolvla.SMOLVLA, leaves)
    trained = sum(leaf.size for path, leaf in leaves.items() if path not in frozen)
    assert trained == theirs["trainable_by_default"] == 99_880_992


def test_tensors_survive_the_way_to_a_tree_and_back_bit_for_bit():
    leaves = flatten(params())
    shapes = flatten(abstract_params(architecture()))
    back = dict(to_tensors(shapes, smolvla.layout(shapes), blocks, lambda path: parts(path, leaves)))
    assert back.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert back[name].dtype == tensor.dtype
        assert back[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("keep", [*KEEPS.values(), (4,)])
def test_cut_tree_is_the_tree_of_the_cut_file(keep):
    """Rows of even and odd leaves end up in the blocks that lerobot's renumbered file holds; one block alone too."""
    renumbered = {}
    for name, tensor in tensors().items():
        for prefix in ("model.vlm_with_expert.vlm.model.text_model.layers.", "model.vlm_with_expert.lm_expert.layers."):
            if name.startswith(prefix):
                block, rest = name.removeprefix(prefix).split(".", 1)
                name = f"{prefix}{keep.index(int(block))}.{rest}" if int(block) in keep else None  # noqa: PLW2901
                break
        if name:
            renumbered[name] = tensor
    sizes = architecture().with_depths({"vlm": len(keep), "action": len(keep)})
    ours = flatten(cut(params(), keep))
    expected = flatten(tree_of(renumbered, sizes)) if len(keep) > 1 else flatten(abstract_params(sizes))
    assert ours.keys() == expected.keys()
    for path, leaf in ours.items():
        assert leaf.shape == expected[path].shape, path
        if not isinstance(expected[path], jax.ShapeDtypeStruct):
            np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_config_says_the_new_depth_and_nothing_else_changes():
    config = json.loads((GOLDEN / "ckpt" / "config.json").read_text())
    written = smolvla.config_with_depths(config, {"vlm": 6, "action": 6, "vision": 3})
    assert written == {**config, "num_vlm_layers": 6}
    assert config["num_vlm_layers"] == 12
    with pytest.raises(InputError, match="6 blocks of the VLM and 5 of the expert does not run in lerobot"):
        smolvla.config_with_depths(config, {"vlm": 6, "action": 5})


def test_what_is_trained_is_lerobots():
    lists = {key.split(" ")[0]: set(names) for key, names in grad_norms().items() if isinstance(names, list)}
    leaves = flatten(abstract_params(architecture()))
    frozen = smolvla.trainable(architecture(), leaves)
    trained = set().union(*(names_of(path, leaf) for path, leaf in leaves.items() if path not in frozen))
    assert trained == lists["trainable_by_default"]
    assert smolvla.frozen_rows(architecture(), leaves) == {}


def test_what_is_trained_with_the_vlm_is_lerobots(tmp_path):
    """The image encoder apart, lerobot then freezes the unused head, the last norm and the last block."""
    config = json.loads((GOLDEN / "ckpt" / "config.json").read_text())
    config |= {"train_expert_only": False, "train_state_proj": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = smolvla.architecture_of(abstract_params(architecture()), epath.Path(tmp_path), vlm_config=GOLDEN / "vlm")
    leaves = flatten(abstract_params(sizes))
    frozen, rows = smolvla.trainable(sizes, leaves), smolvla.frozen_rows(sizes, leaves)
    assert {path for path in frozen if not path.startswith("vision/")} == {
        "lm_head",
        "vlm/norm",
        "state_proj/kernel",
        "state_proj/bias",
    }
    assert {path for path in leaves if path.startswith("vision/")} < frozen
    assert set(rows) == {path for path in leaves if path.startswith("vlm/odd/")}
    last = {name for path in rows for name in names_of(path, leaves[path]) if ".11." in name}
    assert set(rows.values()) == {(5,)}
    theirs = grad_norms()["frozen_with_train_expert_only_false_freeze_vision_encoder_false"]
    ours = last | names_of("lm_head", leaves["lm_head"]) | names_of("vlm/norm", leaves["vlm/norm"])
    assert ours == set(theirs)


def test_learning_rates_are_lerobots():
    recorded = json.loads((GOLDEN / "train_steps.json").read_text())
    assert len(recorded["lr_by_num_training_steps"]) > 1
    for steps, rates in recorded["lr_by_num_training_steps"].items():
        defaults = smolvla.training_defaults(architecture(), int(steps))
        for step, rate in rates.items():
            np.testing.assert_allclose(smolvla.learning_rate(defaults, int(step)), rate, rtol=1e-9)
    optimiser = recorded["optimizer"]
    assert (defaults["b1"], defaults["b2"]) == tuple(optimiser["betas"])
    for ours, theirs in {
        "peak_lr": "lr",
        "eps": "eps",
        "weight_decay": "weight_decay",
        "clip_norm": "grad_clip_norm",
    }.items():
        assert defaults[ours] == optimiser[theirs]
