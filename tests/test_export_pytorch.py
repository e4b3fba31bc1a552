"""openpi's PyTorch export: the files always, the real PI0Pytorch where openpi and its transformers are."""

import importlib.util
import json

import pytest
import real_openpi
import recordings
from test_export import export
from test_openpi_patches import pruned

import openpi_patches
from clp_jax.checkpoint import read_spec
from clp_jax.export import pytorch, upstream
from clp_jax.export.result import EXPORT_FILE, Options, export_record, write_json
from clp_jax.export.weights import Weights
from clp_jax.models import Lengths
from clp_jax.models.pi0 import architecture_of

ACTION_TOLERANCE = 1e-4
"""PyTorch computes the time embedding in float64: up to 7e-5 in the recorded π0.5, whose weights are large."""


def loader(folder):
    spec = importlib.util.spec_from_file_location("check_openpi", folder / "check_openpi.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_folder_is_what_create_trained_policy_reads(tmp_path):
    step = pruned("pi05", tmp_path / "step", llm=[0, 5, 9], vision=[1])
    assert export(step, tmp_path / "e", "openpi-pytorch", "--check", "bits") == 0
    assert openpi_patches.depths_of_checkpoint(tmp_path / "e") == openpi_patches.Depths(llm=3, vision=1)
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    assert config["pi05"] is True and config["depths"] == {"vision": 1, "vlm": 3, "action": 3}
    stats = tmp_path / "e" / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"
    assert stats.read_bytes() == (step / "assets" / "physical-intelligence" / "libero" / "norm_stats.json").read_bytes()
    assert json.loads((tmp_path / "e" / EXPORT_FILE).read_text())["check"]["weights_equal"] == 51


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["pi0", "pi05", "vision", "lora"])
def test_openpis_model_gives_our_actions(tmp_path, monkeypatch, name):
    real_openpi.import_openpi()
    if name == "lora":
        spec = read_spec(recordings.GOLDEN / "ckpt" / "pi0_lora_trained" / "1")
    else:
        keep = {"llm": [0, 3, 5, 11]} | ({"vision": [0, 2]} if name == "vision" else {})
        spec = read_spec(pruned("pi05" if name == "pi05" else "pi0", tmp_path / "step", **keep))
    architecture = architecture_of(spec.tree, lora_scale=2.0)
    real_openpi.shrink(architecture, monkeypatch)
    real_openpi.shrink_torch(architecture, monkeypatch)
    weights, options = Weights(spec, architecture, merge=True, dtype="float32"), Options(Lengths(10, 16))
    folder = tmp_path / "e"
    folder.mkdir()
    pytorch.write(weights, folder, options)
    upstream.write_reference(weights, folder, options)
    write_json(folder / EXPORT_FILE, export_record(weights, "openpi-pytorch", options, None))
    try:
        assert loader(folder).largest_difference(folder) < ACTION_TOLERANCE
    finally:
        openpi_patches.uninstall()
