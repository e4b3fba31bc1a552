"""What is read from shapes, from lerobot's configuration and from the VLM's, and what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from smolvla_recordings import GOLDEN, architecture, inputs, params, tensors

from clp_jax.errors import InputError
from clp_jax.models import FAMILIES, Lengths, abstract_params, family_of, family_of_tree, smolvla
from clp_jax.models.family import Architecture as AnyArchitecture
from clp_jax.models.family import Family
from clp_jax.trees import flatten


@pytest.fixture
def policy(tmp_path):
    """A folder with the policy's configuration beside one with the VLM's; a function that changes either."""
    for name in ("ckpt/config.json", "vlm/config.json", "vlm/tokenizer.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(GOLDEN / name, tmp_path / name)

    def write(file="ckpt", **changes):
        path = tmp_path / file / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
        return epath.Path(tmp_path / "ckpt")

    return write


def read(folder, **settings):
    return smolvla.architecture_of(abstract_params(architecture()), folder, dtype="float32", **settings)


def test_family_has_every_name_of_the_seam():
    assert FAMILIES["smolvla"] is smolvla
    assert isinstance(smolvla, Family)
    assert isinstance(architecture(), AnyArchitecture)
    assert family_of_tree(params()) is family_of(architecture()) is smolvla
    assert not smolvla.recognises({"PaliGemma": {}})


def test_tree_and_file_tell_the_same():
    assert read(epath.Path(GOLDEN / "ckpt")) == architecture()
    assert hash(architecture()) == hash(read(epath.Path(GOLDEN / "ckpt")))


def test_sizes_come_from_shapes_and_files(policy):
    a = read(policy(num_steps=4, add_image_special_tokens=True, optimizer_lr=3e-4))
    assert (a.vlm.width, a.vlm.depth, a.vlm.mlp_dim) == (48, 12, 88)
    assert (a.action.width, a.action.depth, a.action.mlp_dim) == (36, 12, 256)
    assert (a.num_heads, a.num_kv_heads, a.head_dim, a.rms_eps) == (6, 2, 10, 1e-5)
    assert (a.vision.num_heads, a.vision.depth, a.vision.image_size, a.scale_factor) == (5, 3, 128, 4)
    assert (a.state_dim, a.true_state_dim, a.action_dim, a.true_action_dim) == (9, 6, 11, 8)
    assert a.image_tokens == (4, 5)
    assert (smolvla.num_steps(a), a.training.lr, a.tokens_per_image) == (4, 3e-4, 4)
    assert smolvla.lengths(a) == Lengths(7, 24)
    assert smolvla.why_no_actions(a) is None


def test_towers_alternate_and_the_last_state_of_the_vlm_says_nothing():
    towers = {tower.name: tower for tower in architecture().towers}
    assert {name: tower.period for name, tower in towers.items()} == {"vision": 1, "vlm": 2, "action": 2}
    assert towers["vlm"].incomparable == (12,)
    assert towers["vision"].optional
    assert architecture().groups == (("vlm", "action"), ("vision",))


def test_empty_cameras_are_listed_but_not_asked_for(policy):
    a = read(policy(empty_cameras=1))
    assert a.cameras[-1] == "observation.images.empty_camera_0"
    assert smolvla.camera_names(a) == architecture().cameras


REFUSED = {
    "attention_mode": ("self_attn", "only 'cross_attn' is implemented"),
    "self_attn_every_n_layers": (3, "only 2 is implemented"),
    "adapt_to_pi_aloha": (True, "only False is implemented"),
    "use_delta_joint_actions_aloha": (True, "only False is implemented"),
    "type": ("pi0", "only 'smolvla' is implemented"),
    "use_cache": (False, "only True is implemented"),
    "normalization_mapping": ({"ACTION": "MIN_MAX"}, "ACTION = 'MIN_MAX'; only MEAN_STD or IDENTITY"),
    "num_expert_layers": (6, "num_expert_layers is 6, the parameters have 12"),
    "num_vlm_layers": (16, "num_vlm_layers is 16, the parameters have 12"),
    "expert_width_multiplier": (0.5, "expert_width_multiplier is 24, the parameters have 36"),
    "max_action_dim": (32, "max_action_dim is 32, the parameters have 11"),
    "resize_imgs_with_padding": (None, r"resize_imgs_with_padding is \[\], the parameters have \[128, 128\]"),
    "mixture_of_experts": (True, "mixture_of_experts = True, which neither clp_jax nor lerobot 0.6.1 knows"),
    "output_features": ({}, "lists no feature of type ACTION"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_config_that_is_unknown_or_not_implemented_is_refused(policy, key):
    value, message = REFUSED[key]
    with pytest.raises(InputError, match=message):
        read(policy(**{key: value}))


IMPOSSIBLE = {
    "chunk_size": (None, 2.5, "7", True, 0, 10**9),
    "n_action_steps": (0, 9),
    "tokenizer_max_length": (0, None),
    "num_steps": (0, "x"),
    "empty_cameras": (-1, 10**9),
    "prefix_length": (None,),
    "min_period": (0, float("nan")),
    "train_expert_only": ("false", None, 0),
    "optimizer_lr": (-1, float("inf")),
    "optimizer_betas": ([0.9], [0.9, 1.0], None),
    "scheduler_warmup_steps": (1.5, -1),
    "scheduler_decay_steps": (0,),
    "output_features": ({"action": {"type": "ACTION", "shape": [12]}}, {"action": {"type": "ACTION", "shape": []}}),
    "input_features": (
        {"observation.state": {"type": "STATE", "shape": [10]}},
        {"observation.images.top": {"type": "VISUAL", "shape": [120, 160, 3]}},
        {"observation.images.top": {"type": "VISUAL", "shape": [3, 0, 0]}},
    ),
}


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_a_value_that_cannot_be_is_refused_where_the_file_is_read(policy, key):
    for value in IMPOSSIBLE[key]:
        with pytest.raises(InputError, match=rf"config\.json says {key}.*; (give|it executes) "):
            read(policy(**{key: value}))


def test_a_vlm_whose_heads_or_epsilon_cannot_be_is_refused(policy):
    config = json.loads((GOLDEN / "vlm" / "config.json").read_text())
    for part, key, value in (
        ("text_config", "rms_norm_eps", None),
        ("vision_config", "num_attention_heads", 0),
        ("text_config", "num_attention_heads", None),
    ):
        with pytest.raises(InputError, match=rf"vlm/config\.json says {part}\.{key} = {value}; give a "):
            read(policy("vlm", **(config | {part: config[part] | {key: value}})))


def test_gradients_are_not_clipped_where_lerobot_clips_none(policy):
    assert smolvla.training_defaults(read(policy()), 10)["clip_norm"] == 10.0
    assert smolvla.training_defaults(read(policy(optimizer_grad_clip_norm=0)), 10)["clip_norm"] == 1e30


def test_defaults_of_lerobot_stand_where_a_key_is_missing(policy):
    a = read(policy(num_steps=..., min_period=..., attention_mode=..., optimizer_betas=..., num_expert_layers=...))
    assert a == architecture()
    with pytest.raises(InputError, match="max_state_dim is 32"):
        read(policy(max_state_dim=...))


@pytest.mark.parametrize(
    ("mapping", "as_they_are"),
    [
        (..., ()),
        ({}, ("state", "actions")),
        ({"STATE": "MEAN_STD"}, ("actions",)),
        ({"ACTION": "MEAN_STD"}, ("state",)),
    ],
)
def test_a_kind_that_the_mapping_lacks_is_not_normalised_as_in_lerobot(policy, mapping, as_they_are):
    assert read(policy(normalization_mapping=mapping)).as_they_are == as_they_are


def test_processors_that_normalise_otherwise_than_the_configuration_are_refused(policy):
    folder = policy(normalization_mapping={"ACTION": "MEAN_STD"})
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        shutil.copy(GOLDEN / "ckpt" / name, folder / name)
    with pytest.raises(InputError, match=r"policy_preprocessor.json normalises STATE with MEAN_STD, .* with IDENTITY"):
        read(folder)
    with pytest.raises(InputError, match=r"policy_postprocessor.json normalises ACTION with MEAN_STD, .* IDENTITY"):
        read(policy(normalization_mapping={"STATE": "MEAN_STD"}))


def test_config_is_needed(tmp_path):
    for folder in (None, epath.Path(tmp_path)):
        with pytest.raises(InputError, match=r"needs lerobot's config.json beside its parameters"):
            read(folder)


def test_vlm_is_looked_for_in_turn(policy, tmp_path):
    folder = policy(vlm_model_name="HuggingFaceTB/elsewhere")
    with pytest.raises(InputError, match=r"HuggingFaceTB/elsewhere stand in its own config.json, which is neither"):
        read(folder)
    assert read(folder, vlm_config=str(tmp_path / "vlm")) == architecture()
    assert read(folder, vlm_config=tmp_path / "vlm" / "config.json") == architecture()
    shutil.copytree(tmp_path / "vlm", tmp_path / "ckpt" / "vlm")
    assert read(folder) == architecture()
    with pytest.raises(InputError, match=r"--vlm-config is the VLM's config.json or its folder"):
        read(folder, vlm_config=str(tmp_path / "nowhere"))


def test_vlm_of_another_size_is_refused(policy):
    text = json.loads((GOLDEN / "vlm" / "config.json").read_text())["text_config"]
    with pytest.raises(InputError, match=r"text_config.hidden_size = 960, this SmolVLA needs 48"):
        read(policy("vlm", text_config=text | {"hidden_size": 960}))
    with pytest.raises(InputError, match="num_attention_heads x head_dim is 70, the parameters have 60"):
        read(policy("vlm", text_config=text | {"num_attention_heads": 7}))
    with pytest.raises(InputError, match="scale_factor is 2, the parameters have 4"):
        read(policy("vlm", text_config=text, scale_factor=2))


def test_published_vlm_needs_no_file(policy):
    released = smolvla.SMOLVLA
    changes = {f"max_{kind}_dim": 32 for kind in ("state", "action")} | {
        "num_vlm_layers": 16,
        "resize_imgs_with_padding": [512, 512],
        "vlm_model_name": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    }
    read_back = smolvla.architecture_of(abstract_params(released), policy(**changes))
    assert read_back.num_heads == 15
    same = ("vision", "vlm", "action", "num_heads", "num_kv_heads", "head_dim", "rms_eps", "vocab_size", "scale_factor")
    assert all(getattr(read_back, name) == getattr(released, name) for name in same)


def test_tree_that_cannot_alternate_is_refused():
    tree = abstract_params(architecture())
    tree["vlm"]["odd"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct((4, *x.shape[1:]), x.dtype), tree["vlm"]["odd"])
    with pytest.raises(InputError, match="vlm has 6 even blocks and 4 odd ones, which cannot alternate"):
        smolvla.architecture_of(tree, epath.Path(GOLDEN / "ckpt"))


def test_file_with_a_gap_is_refused():
    damaged = {name: tensor for name, tensor in tensors().items() if ".text_model.layers.5." not in name}
    with pytest.raises(InputError, match="have no block 5 but later ones"):
        smolvla.architecture_of_tensors(damaged, epath.Path(GOLDEN / "ckpt"))
    with pytest.raises(InputError, match=r"not the parameters of a SmolVLA: .*q_proj.weight is missing"):
        smolvla.architecture_of_tensors({"lm_head": np.zeros(1)}, epath.Path(GOLDEN / "ckpt"))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_even_blocks_are_one_more_at_odd_depths(depth):
    sizes = architecture().with_depths({"vlm": depth, "action": depth})
    leaves = flatten(abstract_params(sizes))
    for tower in ("vlm", "action"):
        assert leaves[f"{tower}/even/q_proj"].shape[0] == (depth + 1) // 2
        assert leaves[f"{tower}/odd/q_proj"].shape[0] == depth // 2
    stack = smolvla.STACKS[2]
    assert list(stack.blocks(depth // 2)) == list(range(depth))[1::2]


def test_complete_pads_to_the_models_dimensions():
    given = inputs()
    assert (given["state"].shape, given["actions"].shape) == ((3, 9), (3, 7, 11))
    assert not given["state"][:, 6:].any()
    assert not given["actions"][..., 8:].any()
    del given["image_mask/observation.images.top"]
    assert smolvla.complete(architecture(), given)["image_mask/observation.images.top"].all()


def test_inputs_describe_what_complete_gives():
    described, given = smolvla.inputs(architecture(), Lengths(7, 24)), inputs()
    assert set(given) - set(described) == {"noise", "time", "action_is_pad"}
    for key, spec in described.items():
        assert given[key].dtype == spec.dtype, key
        if not key.startswith("image/"):
            assert given[key].shape[1:] == spec.shape, key


def test_cameras_that_nobody_has_are_dropped_but_for_one():
    given = inputs()
    masks = [f"image_mask/{camera}" for camera in architecture().cameras]
    absent = {**given, masks[1]: np.zeros(3, bool)}
    left = smolvla.without_unseen(architecture(), absent)
    assert set(absent) - set(left) == {masks[1], masks[1].replace("_mask", "")}
    nothing = smolvla.without_unseen(architecture(), given | {mask: np.zeros(3, bool) for mask in masks})
    assert [mask for mask in masks if mask in nothing] == [masks[0]]
    framed = dataclasses.replace(architecture(), image_tokens=(4, 5))
    assert set(smolvla.without_unseen(framed, absent)) == set(absent)


@pytest.mark.slow
def test_draws_follow_lerobots_distributions():
    batch = {"actions": np.zeros((4000, 1, 11), np.float32)}
    drawn, _ = smolvla.draw(architecture(), jax.random.key(0), batch)
    fixed = smolvla.fixed_draw(architecture(), batch)
    for arrays in (drawn, fixed):
        time = np.asarray(arrays["time"])
        assert time.min() > 0
        assert time.max() <= 1
        np.testing.assert_allclose(
            np.quantile(time, [0.25, 0.5, 0.75]), np.array([0.25, 0.5, 0.75]) ** (2 / 3), atol=0.02
        )
        np.testing.assert_allclose(np.std(arrays["noise"]), 1.0, atol=0.02)
    several, _ = smolvla.draw(architecture(), jax.random.key(0), batch, samples=2)
    assert (several["noise"].shape, several["time"].shape) == ((4000, 2, 1, 11), (4000, 2))
