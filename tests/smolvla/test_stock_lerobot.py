"""lerobot itself loads what is cut, strictly and without a patch (make test-lerobot)."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import real_lerobot
from safetensors_folders import GOLDEN, SMOLVLA, change_config, tensors_of
from smolvla_recordings import CAMERAS, SAMPLE_TOLERANCE

from clp_jax.checkpoint.safetensors.folder import read_folder
from clp_jax.checkpoint.safetensors.slicing import slice_folder
from clp_jax.checkpoint.safetensors.tensorfile import read_tensors
from clp_jax.cli import main

VLM = GOLDEN / "smolvla" / "vlm"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keep", [[0, 1, 4, 5, 8, 11], [2, 3, 4, 9, 10]])
def test_stock_lerobot_loads_a_cut_strictly(keep, tmp_path):
    real_lerobot.import_lerobot()
    pytest.importorskip("num2words", reason="needs lerobot's smolvla extra (num2words)")
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    slice_folder(read_folder(SMOLVLA), {"vlm": keep, "action": keep}, tmp_path / "cut")
    change_config(tmp_path / "cut", lambda config: config.update(vlm_model_name=str(VLM)))
    policy = SmolVLAPolicy.from_pretrained(str(tmp_path / "cut"), strict=True)
    inner = policy.model.vlm_with_expert
    assert inner.num_vlm_layers == inner.num_expert_layers == len(keep)
    stored, loaded = tensors_of(tmp_path / "cut"), policy.state_dict()
    assert loaded.keys() == stored.keys()
    for name, (dtype, shape, content) in stored.items():
        assert dtype == "F32"
        np.testing.assert_array_equal(loaded[name].float().numpy(), np.frombuffer(content, np.float32).reshape(shape))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export of a pruned folder with other lengths than its own, compared by the command in a process of its own."""
    real_lerobot.import_lerobot()
    pytest.importorskip("num2words", reason="needs lerobot's smolvla extra (num2words)")
    place = tmp_path_factory.mktemp("stock")
    keep = [0, 1, 4, 5, 8, 11]
    shutil.copytree(VLM, place / "vlm")
    slice_folder(read_folder(SMOLVLA), {"vlm": keep, "action": keep}, place / "cut")
    words = ["export", "--checkpoint", str(place / "cut"), "--to", "lerobot", "--out", str(place / "e")]
    assert main([*words, "--action-horizon", "6", "--prompt-length", "20"]) == 0
    return place / "e"


@pytest.mark.filterwarnings("ignore")
def test_stock_lerobot_gives_the_exports_recorded_actions(exported, tmp_path):
    check = json.loads((exported / "export.json").read_text())["check"]
    assert check["missing"] is None
    assert check["largest_difference"] < SAMPLE_TOLERANCE
    copy = shutil.copytree(exported, tmp_path / "e")
    found = importlib.util.spec_from_file_location("check_lerobot", copy / "check_lerobot.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    policy = module.load_policy(copy, device="cpu")
    assert (policy.config.chunk_size, policy.config.num_vlm_layers) == (6, 6)
    with np.load(copy / "check.npz") as archive:
        arrays = dict(archive)
    arrays["actions"] = arrays["actions"] + 1
    np.savez(copy / "check.npz", **arrays)
    assert module.main(["--json"]) == 1  # a difference of 1 is not accepted


@pytest.mark.filterwarnings("ignore")
def test_a_vision_language_model_that_cannot_be_had_is_told_and_no_failure(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "e", ignore=shutil.ignore_patterns("vlm"))
    change_config(copy, lambda config: config.update(vlm_model_name="nobody/nothing"))
    script, environment = copy / "check_lerobot.py", {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), "--json"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["largest_difference"] is None
    assert answer["missing"].startswith("needs the vision-language model's files: ")


@pytest.mark.filterwarnings("ignore")
def test_lerobots_processors_read_the_exports_statistics(exported):
    import torch
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import make_pre_post_processors

    before, after = make_pre_post_processors(
        PreTrainedConfig.from_pretrained(exported),
        pretrained_path=str(exported),
        preprocessor_overrides={"tokenizer_processor": {"tokenizer_name": str(exported / "vlm")}},
    )
    stored = read_tensors(exported / "policy_preprocessor_step_5_normalizer_processor.safetensors")
    state = torch.arange(6, dtype=torch.float32)
    images = {f"observation.images.{camera}": torch.rand(3, 96, 80) for camera in CAMERAS}
    batch = before({"observation.state": state, "task": "push", **images})
    mean, std = (torch.tensor(stored[f"observation.state.{name}"]) for name in ("mean", "std"))
    torch.testing.assert_close(batch["observation.state"][0], (state - mean) / (std + 1e-8))
    assert batch["observation.language.tokens"].shape == (1, 20)
    mean, std = (torch.tensor(stored[f"action.{name}"]) for name in ("mean", "std"))
    torch.testing.assert_close(after(torch.ones(1, 8))[0], mean + std)
