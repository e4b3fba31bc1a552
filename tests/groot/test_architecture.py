"""The architecture of a GR00T-N1.5: from shapes, from config.json, from Eagle's; and what is refused."""

import dataclasses
import json
import shutil

import groot_recordings as golden
import pytest
from etils import epath
from groot_recordings import GOLDEN

from clp_jax.errors import InputError
from clp_jax.models import abstract_params, family_of, family_of_tree, groot
from clp_jax.models.family import Family, Lengths
from clp_jax.models.towers import Tower
from clp_jax.processing.robots import Robot


def test_the_module_is_a_family():
    assert isinstance(groot, Family)
    assert family_of(groot.GROOT_N15) is groot
    assert family_of_tree(golden.checkpoint("ckpt")) is groot
    assert family_of_tree(golden.tensors("ckpt")) is groot
    assert family_of_tree({f"_groot_model.{name}": leaf for name, leaf in golden.tensors("ckpt").items()}) is groot
    assert not groot.recognises({"PaliGemma": {"llm": {}}})
    assert not groot.recognises({"action_head": 1, "backbone": {"vision": 2}})


def test_towers():
    towers = groot.GROOT_N15.towers
    assert towers == (
        Tower("vision", 27, optional=True),
        Tower("llm", 12, incomparable=(12,)),
        Tower("vl", 4),
        Tower("dit", 16, period=2),
    )
    assert groot.GROOT_N15.groups == (("llm",), ("vl",), ("dit",), ("vision",))
    shorter = groot.GROOT_N15.with_depths({"llm": 5, "dit": 8})
    assert [tower.depth for tower in shorter.towers] == [27, 5, 4, 8]
    assert shorter.towers[1].incomparable == (5,)
    assert shorter.with_depths({"llm": 12, "dit": 16}) == groot.GROOT_N15


def test_every_size_of_the_recorded_checkpoint():
    a = golden.architecture("ckpt")
    assert dataclasses.astuple(a.vision) == (40, 3, 68, 4, 14, 16, None)
    assert dataclasses.astuple(a.llm) == (44, 12, 92, 6, 2, 16, 1e6, 1e-6, None)
    assert dataclasses.astuple(a.vl) == (44, 4, 176, 4, 0.2, True, None)
    assert dataclasses.astuple(a.dit) == (36, 16, 144, 3, 28, 256, 0.2, True, None)
    assert (a.vocab_size, a.image_token, a.action_dim, a.state_dim, a.hidden_width) == (330, 327, 7, 10, 28)
    assert (a.embodiments, a.horizon, a.max_seq_len, a.future_tokens) == (4, 5, 18, 8)
    assert golden.architecture("ckpt_pruned") == a.with_depths({"llm": 5, "vl": 3, "dit": 8})


@pytest.mark.parametrize("name", ["ckpt", "ckpt_pruned"])
def test_a_parameter_tree_says_what_its_file_says(name):
    folder = epath.Path(GOLDEN / name)
    of_tree = groot.architecture_of(golden.checkpoint(name), folder, dtype="float32")
    lerobot = {f"_groot_model.{key}": leaf for key, leaf in golden.tensors(name).items()}
    assert of_tree == golden.architecture(name) == groot.architecture_of(lerobot, folder, dtype="float32")


def test_the_released_sizes_need_no_file():
    tree = abstract_params(groot.GROOT_N15)
    assert groot.architecture_of(tree) == groot.GROOT_N15
    pruned = groot.GROOT_N15.with_depths({"llm": 5, "vl": 3, "dit": 8})
    assert groot.architecture_of(abstract_params(pruned), dtype="float32") == dataclasses.replace(
        pruned, dtype="float32"
    )


def test_full_size_has_the_tensors_of_the_release():
    recorded = json.loads((GOLDEN / "param_tree.json").read_text())
    shapes = golden.shapes_of(abstract_params(groot.GROOT_N15))
    assert shapes == {name: tuple(shape) for name, shape in recorded["tree"].items()}
    assert len(shapes) == recorded["totals"]["tensors"]


def test_given_settings_are_kept():
    a = golden.architecture("ckpt", padding="eager", cameras=("wrist", "ego"), dtype="bfloat16")
    assert (a.padding, a.cameras, a.dtype) == ("eager", ("ego", "wrist"), "bfloat16")
    assert {"image/ego", "image/wrist"} <= groot.inputs(a, groot.lengths(a)).keys()
    assert groot.lengths(a).horizon == 5 and groot.lengths(a).prompt >= 2 * 16


@pytest.fixture
def folder(tmp_path):
    """A copy of the recorded checkpoint's folder without its weights, and Eagle's folder in it."""
    target = tmp_path / "ckpt"
    target.mkdir()
    shutil.copyfile(GOLDEN / "ckpt" / "config.json", target / "config.json")
    shutil.copytree(GOLDEN / "eagle", target / "eagle")
    return epath.Path(target)


def read(folder, **settings):
    return groot.architecture_of(golden.tensors("ckpt"), folder, dtype="float32", **settings)


def edit(file, path, value):
    config = json.loads(file.read_text())
    *parents, last = path.split(".")
    node = config
    for key in parents:
        node = node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    file.write_text(json.dumps(config))


def test_a_chunk_longer_than_the_positions_of_actions_is_refused():
    pytest.importorskip("tokenizers")
    a = golden.architecture("ckpt")
    tokenizer = groot.load_tokenizer(a, str(GOLDEN / "eagle"), None)
    groot.inputs(a, Lengths(a.max_seq_len, 80))
    for read_by in (
        lambda lengths: groot.inputs(a, lengths),
        lambda lengths: groot.processing(a, Robot("toy", {}), {}, tokenizer, lengths),
    ):
        with pytest.raises(
            InputError, match=rf"chunks of {a.max_seq_len} actions, not of .*; give a smaller --action-horizon"
        ):
            read_by(Lengths(a.max_seq_len + 1, 80))


def test_eagle_is_found_in_the_folder_beside_it_or_where_one_says(folder, tmp_path):
    expected = golden.architecture("ckpt")
    assert read(folder) == expected
    (folder / "eagle").rename(folder.parent / "eagle")
    assert read(folder) == expected
    (folder.parent / "eagle").rename(folder.parent / "elsewhere")
    with pytest.raises(InputError, match="--vlm-config"):
        read(folder)
    assert read(folder, vlm_config=tmp_path / "elsewhere") == expected
    assert read(folder, vlm_config=str(tmp_path / "elsewhere" / "config.json")) == expected
    with pytest.raises(InputError, match="there is no file"):
        read(folder, vlm_config=tmp_path / "nowhere")


def test_what_config_json_says_is_taken(folder):
    edit(folder / "config.json", "action_head_cfg.num_inference_timesteps", 8)
    edit(folder / "config.json", "action_head_cfg.noise_s", 0.99)
    edit(folder / "config.json", "action_head_cfg.max_num_embodiments", None)
    edit(folder / "eagle" / "config.json", "text_config.rope_theta", 5000)
    a = read(folder)
    assert (groot.num_steps(a), a.noise_s, a.llm.rope_theta, a.embodiments) == (8, 0.99, 5000.0, 4)


@pytest.mark.parametrize(
    ("file", "path", "value", "message"),
    [
        ("config.json", "backbone_cfg.select_layer", 11, "select_layer = 11, but the weights have 12"),
        ("config.json", "action_head_cfg.diffusion_model_cfg.num_layers", 8, "num_layers = 8, but the weights have 16"),
        (
            "config.json",
            "action_head_cfg.vl_self_attention_cfg.num_layers",
            3,
            "num_layers = 3, but the weights have 4",
        ),
        ("config.json", "backbone_cfg.select_layer", None, "has no select_layer"),
        ("config.json", "action_head_cfg.diffusion_model_cfg.num_layers", None, "has no num_layers"),
        (
            "config.json",
            "action_head_cfg.diffusion_model_cfg.num_attention_heads",
            4,
            "4 heads of 12, but the width is 36",
        ),
        ("config.json", "action_head_cfg.max_state_dim", 64, "max_state_dim = 64, but the weights have 10"),
        ("config.json", "action_head_cfg.add_pos_embed", False, "add_pos_embed = False; clp_jax has only True"),
        ("config.json", "action_head_cfg.diffusion_model_cfg.positional_embeddings", None, "positional_embeddings"),
        ("config.json", "action_head_cfg.diffusion_model_cfg.norm_type", "layer_norm", "norm_type = 'layer_norm'"),
        ("config.json", "action_head_cfg.window", 3, "does not know and that may change the model: window"),
        ("config.json", "backbone_cfg.project_to_dim", 1536, "project_to_dim = 1536; clp_jax has only None"),
        ("config.json", "model_type", "gr00t_n2", "model_type = 'gr00t_n2'"),
        ("eagle/config.json", "use_pixel_shuffle", True, "use_pixel_shuffle = True"),
        ("eagle/config.json", "text_config.num_attention_heads", 3, "num_attention_heads = 3, but the weights have 6"),
        ("eagle/config.json", "text_config.rope_scaling", {"factor": 2}, "rope_scaling"),
        ("eagle/config.json", "text_config.qk_clip", 1, "qk_clip"),
        ("eagle/config.json", "vision_config.layer_norm_eps", 1e-5, "layer_norm_eps = 1e-05"),
        ("eagle/config.json", "image_token_index", None, "has no image_token_index"),
        ("config.json", "action_head_cfg.num_inference_timesteps", 0, "timesteps = 0; give a whole number of at least"),
        ("config.json", "action_head_cfg.num_timestep_buckets", 1.5, "buckets = 1.5; give a whole number"),
        ("config.json", "action_head_cfg.noise_s", "x", "noise_s = 'x'; give a number above 0"),
        ("config.json", "action_head_cfg.noise_beta_alpha", [1], r"alpha = \[1\]; give a number above 0"),
        (
            "config.json",
            "action_head_cfg.diffusion_model_cfg.dropout",
            1.0,
            "dropout = 1.0; give at least 0 and below 1",
        ),
        ("config.json", "action_head_cfg.vl_self_attention_cfg.final_dropout", "no", "'no'; give true or false"),
        ("eagle/config.json", "vision_config.num_attention_heads", 0, "heads = 0; give a whole number"),
        ("eagle/config.json", "text_config.rms_norm_eps", -1, "rms_norm_eps = -1; give a number above 0"),
        ("eagle/config.json", "image_token_index", "x", "image_token_index = 'x'; give a whole number"),
    ],
)
def test_a_config_that_does_not_fit_or_is_not_known_is_refused(folder, file, path, value, message):
    edit(folder / file, path, value)
    with pytest.raises(InputError, match=message):
        read(folder)


def test_a_folder_without_config_json_needs_the_released_sizes(folder):
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json"):
        read(folder)


def test_a_policy_of_lerobot_is_described_by_the_folder_that_it_was_made_from(folder, tmp_path):
    policy = epath.Path(tmp_path / "policy")
    policy.mkdir()
    (policy / "config.json").write_text(json.dumps({"type": "groot", "base_model_path": str(folder)}))
    (folder / "eagle").rename(tmp_path / "eagle")
    assert read(policy) == golden.architecture("ckpt")


def test_tensors_that_are_missing_are_named():
    tensors = golden.tensors("ckpt")
    gap = {name: leaf for name, leaf in tensors.items() if ".language_model.model.layers.3." not in name}
    folder = epath.Path(GOLDEN / "ckpt")
    with pytest.raises(InputError, match=r"language_model\.model\.layers are numbered"):
        groot.architecture_of(gap, folder)
    del (short := dict(tensors))["action_head.future_tokens.weight"]
    with pytest.raises(InputError, match=r"action_head\.future_tokens\.weight is missing"):
        groot.architecture_of(short, folder)
