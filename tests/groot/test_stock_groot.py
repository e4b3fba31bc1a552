"""Stock code of GR00T-N1.5 loads what is cut and what is exported, and computes what we do (make test-groot)."""

import dataclasses
import json
import shutil

import groot_recordings as golden
import jax
import numpy as np
import pytest
import real_groot
from groot_recordings import OUTPUT_TOLERANCE
from safetensors_folders import GROOT, sharded, tensors_of

from clp_jax.checkpoint import read_spec
from clp_jax.checkpoint.safetensors.folder import read_folder
from clp_jax.checkpoint.safetensors.slicing import slice_folder
from clp_jax.cli import main
from clp_jax.loading import load_model, read_architecture
from clp_jax.models import abstract_params, groot
from clp_jax.models.layers.lora import is_adapter
from clp_jax.training.adapters import with_adapters
from clp_jax.training.freezing import frozen_paths
from clp_jax.trees import flatten, unflatten

pytestmark = pytest.mark.filterwarnings("ignore")

KEEPS = {
    "one file": {"llm": [0, 3, 4, 8, 9, 10, 11], "vl": [1, 3], "dit": [2, 5, 6, 9, 12, 15]},
    "shards": {"llm": [1, 2, 11], "vl": [0, 1, 2], "dit": [0, 1, 4, 7, 10]},
}
EAGLE = GROOT.parent / "eagle"


def assert_stock_is_ours(folder):
    """Stock code loads every tensor of the folder as it is, and has our loss and actions."""
    program = real_groot.import_groot()
    stock = program.load_model(folder)
    loaded = stock.state_dict()
    for name, (dtype, shape, content) in tensors_of(folder).items():
        assert dtype == "F32"
        np.testing.assert_array_equal(loaded[name].numpy(), np.frombuffer(content, np.float32).reshape(shape))
    ours, arrays = load_model(folder, dtype="float32"), golden.inputs()
    out = golden.runner(ours.architecture)(jax.device_get(ours.params), arrays)
    assert abs(real_groot.loss_of(program, stock, arrays) - out["loss"]) < OUTPUT_TOLERANCE
    actions = real_groot.actions_of(program, stock, arrays, arrays["sample_noise"])
    assert golden.largest_difference(out["actions"], actions) < OUTPUT_TOLERANCE
    return stock


@pytest.mark.parametrize("form", KEEPS)
def test_stock_code_loads_a_cut(form, tmp_path):
    real_groot.import_groot()
    source = GROOT if form == "one file" else sharded(GROOT, tmp_path / "whole", 3, spread=True)
    slice_folder(read_folder(source), KEEPS[form], tmp_path / "cut")
    shutil.copytree(EAGLE, tmp_path / "cut" / "eagle")
    stock = assert_stock_is_ours(tmp_path / "cut")
    assert len(stock.backbone.eagle_model.language_model.model.layers) == len(KEEPS[form]["llm"])
    assert len(stock.action_head.model.transformer_blocks) == len(KEEPS[form]["dit"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps from a cut."""
    real_groot.import_groot()
    place = tmp_path_factory.mktemp("stock")
    slice_folder(read_folder(GROOT), KEEPS["one file"], place / "cut")
    shutil.copytree(EAGLE, place / "eagle")
    arrays = {key: np.concatenate([array] * 4) for key, array in golden.inputs().items() if key != "sample_noise"}
    np.savez(place / "data.npz", **arrays)
    words = ["--checkpoint", place / "cut", "--data", place / "data.npz", "--out", place / "run", "--steps", "2"]
    flags = ["--batch-size", "8", "--warmup-steps", "0", "--evaluate-every", "0"]
    assert main([str(word) for word in ("finetune", *words, *flags)]) == 0
    return place / "run" / "1"


def test_stock_code_loads_a_fine_tuned_export(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(real_groot.AT_START))
    assert main(["export", "--checkpoint", str(run), "--to", "groot", "--out", str(tmp_path / "e")]) == 0
    check = json.loads((tmp_path / "e" / "export.json").read_text())["check"]
    assert check["missing"] is None
    assert check["largest_difference"] < OUTPUT_TOLERANCE
    assert_stock_is_ours(tmp_path / "e")


UNREAD = ("language_model.lm_head", "vision_model.vision_model.head.")
"""No gradient reaches these, whatever is trained."""


def test_what_is_trained_by_upstreams_flags_is_trained_by_ours(tmp_path):
    program = real_groot.import_groot()
    slice_folder(read_folder(GROOT), KEEPS["shards"], tmp_path / "cut")
    shutil.copytree(EAGLE, tmp_path / "cut" / "eagle")
    stock, architecture = program.load_model(tmp_path / "cut"), read_architecture(read_spec(tmp_path / "cut"))
    leaves = flatten(abstract_params(architecture))
    layout = groot.layout(leaves)
    told = {
        "": {},
        "tune_llm": {"train": ["backbone/llm/.*"]},
        "tune_visual": {"train": ["backbone/(vision|mlp1)/.*"]},
        "tune_projector": {"freeze": ["action_head/(state|action)_.*|action_head/position_embedding"]},
        "tune_diffusion_model": {"freeze": ["action_head/dit/.*"]},
    }
    for flag, rules in told.items():
        backbone = {name: flag == name for name in ("tune_llm", "tune_visual")}
        head = {name: flag != name for name in ("tune_projector", "tune_diffusion_model")}
        stock.backbone.set_trainable_parameters(**backbone)
        stock.action_head.set_trainable_parameters(**head)
        theirs = {name for name, tensor in stock.named_parameters() if tensor.requires_grad}
        frozen = frozen_paths(tuple(leaves), default=groot.frozen_rules(architecture), **rules)
        ours = {
            name.format(i=block)
            for path, leaf in leaves.items()
            if path not in frozen
            for block in golden.blocks(path, leaf.shape[0]) or [0]
            for name in layout[path].names
        }
        read = [{name for name in names if not any(part in name for part in UNREAD)} for names in (ours, theirs)]
        assert read[0] == read[1], flag


def test_pefts_adapters_of_the_whole_model_are_ours(tmp_path):
    program = real_groot.import_groot()
    import torch

    slice_folder(read_folder(GROOT), KEEPS["shards"], tmp_path / "cut")
    shutil.copytree(EAGLE, tmp_path / "cut" / "eagle")
    stock, ours, arrays = program.load_model(tmp_path / "cut"), load_model(tmp_path / "cut"), golden.inputs()
    architecture = dataclasses.replace(with_adapters(ours.architecture, (3, 3, 3)), dtype="float32")
    theirs, rng = real_groot.add_adapters(stock, 3), np.random.default_rng(0)
    leaves = flatten(abstract_params(architecture))
    tree = flatten(jax.device_get(ours.params)) | {
        path: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32)
        for path, leaf in leaves.items()
        if is_adapter(path)
    }
    given = set()
    for path in filter(is_adapter, leaves):
        stem, factor = path.rsplit("/lora_", 1)
        (weight,) = groot.layout({f"{stem}/kernel": None})[f"{stem}/kernel"].names
        for block, rows in zip(golden.blocks(path, len(tree[path])), tree[path], strict=True):
            name = weight.format(i=block).removesuffix("weight") + f"lora_{factor.upper()}.default.weight"
            theirs[name].copy_(torch.from_numpy(rows.T.copy()))
            given.add(name)
    assert given == theirs.keys()
    loss = golden.runner(architecture)(unflatten(tree), arrays)["loss"]
    assert abs(real_groot.loss_of(program, stock.eval(), arrays) - loss) < OUTPUT_TOLERANCE
    assert abs(golden.runner(ours.architecture)(jax.device_get(ours.params), arrays)["loss"] - loss) > 0.01
    # What NVIDIA's script leaves frozen runs as in inference: no inputs are left out of adapters there.
    stock.backbone.set_trainable_parameters(tune_llm=False, tune_visual=False)
    real_groot.loss_of(program, stock.train(), arrays)
    left_out = [
        name for name, module in stock.named_modules() if name.endswith("lora_dropout.default") and module.training
    ]
    assert left_out
    assert all(name.startswith("action_head.") for name in left_out)


def test_a_weight_that_stock_code_would_draw_at_random_is_found(tmp_path):
    program = real_groot.import_groot()
    slice_folder(read_folder(GROOT), KEEPS["shards"], tmp_path / "cut")
    shutil.copytree(EAGLE, tmp_path / "cut" / "eagle")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    config["action_head_cfg"]["diffusion_model_cfg"]["num_layers"] = 16
    (tmp_path / "cut" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weights of the model are not those of the files"):
        program.load_model(tmp_path / "cut")
