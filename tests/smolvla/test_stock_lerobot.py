"""lerobot itself loads what is cut, strictly and without a patch (make test-lerobot)."""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import real_lerobot
from etils import epath
from safetensors_folders import GOLDEN, SMOLVLA, change_config, tensors_of
from smolvla_recordings import CAMERAS, SAMPLE_TOLERANCE, inputs, params, tensors, tree_of
from smolvla_steps import change_steps, copy_policy, make_step, unnamed

from clp_jax.checkpoint import read_spec
from clp_jax.checkpoint.safetensors.folder import read_folder
from clp_jax.checkpoint.safetensors.slicing import slice_folder
from clp_jax.checkpoint.safetensors.tensorfile import read_tensors
from clp_jax.cli import main
from clp_jax.loading import read_architecture
from clp_jax.models import smolvla
from clp_jax.models.family import Lengths
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.policy_files import POSTPROCESSOR, PREPROCESSOR
from clp_jax.processing.robots import Robot
from clp_jax.training import OptimizerSettings, StepSettings, make_optimizer, make_state, train_step
from clp_jax.training.freezing import frozen_paths
from clp_jax.trees import flatten

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


@pytest.mark.filterwarnings("ignore")
def test_lerobot_reads_and_answers_a_robot_as_its_run_did(tmp_path):
    """From a policy without statistics, trained on cameras and a state under other keys."""
    real_lerobot.import_lerobot()
    import torch
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import make_pre_post_processors

    folder = copy_policy(tmp_path)
    for name in (PREPROCESSOR, POSTPROCESSOR):
        change_steps(folder / name, unnamed)
    top, side, wrist = (f"observation.images.{camera}" for camera in ("top", "side", "wrist"))
    robot = Robot("toy", {top: side, side: top, wrist: "observation.hand"}, state=("observation.joints",), action_dim=8)
    stats = {name: NormStats(np.arange(n) + 1.0, np.arange(n) + 2.0) for name, n in (("state", 6), ("actions", 8))}
    step = make_step(folder, tmp_path, robot, stats)
    words = ("--checkpoint", str(step), "--to", "lerobot", "--check", "bits", "--out", str(tmp_path / "e"))
    assert main(["export", *words]) == 0
    before, after = make_pre_post_processors(
        PreTrainedConfig.from_pretrained(tmp_path / "e"),
        pretrained_path=str(tmp_path / "e"),
        preprocessor_overrides={"tokenizer_processor": {"tokenizer_name": str(tmp_path / "e" / "vlm")}},
    )
    rng = np.random.default_rng(0)
    images = {key: rng.integers(0, 256, (96, 80, 3)).astype(np.uint8) for key in robot.images.values()}
    state = np.arange(6, dtype=np.float32)
    theirs = before(
        {key: torch.tensor(image.transpose(2, 0, 1) / np.float32(255)) for key, image in images.items()}
        | {"observation.joints": torch.tensor(state), "task": "push"}
    )
    sizes = read_architecture(read_spec(str(step)), dtype="float32")
    ours = smolvla.processing(
        sizes, robot, stats, smolvla.load_tokenizer(sizes, None, epath.Path(step / "assets")), Lengths(7, 24)
    )
    read = ours.inputs(state=state, images={camera: images[key] for camera, key in robot.images.items()}, prompt="push")
    np.testing.assert_allclose(theirs["observation.state"][0], read["state"][:6], rtol=1e-6)
    np.testing.assert_array_equal(theirs["observation.language.tokens"][0], read["tokenized_prompt"])
    for camera in robot.images:
        picture = np.asarray(theirs[camera][0]).transpose(1, 2, 0)
        np.testing.assert_array_equal(picture, read[f"image/{camera}"] / np.float32(255))
    actions = rng.standard_normal((1, 8)).astype(np.float32)
    np.testing.assert_allclose(after(torch.tensor(actions))[0], ours.outputs(actions, state=state)[0], rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("freeze_vision", [True, False])
def test_three_steps_with_the_vlm_are_lerobots(tmp_path, monkeypatch, freeze_vision):
    """lerobot trains the VLM but for its head, last norm and last block where config.json says so."""
    real_lerobot.import_lerobot()
    pytest.importorskip("num2words", reason="needs lerobot's smolvla extra (num2words)")
    import torch
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    folder = shutil.copytree(SMOLVLA, tmp_path / "policy")
    settings = {"train_expert_only": False, "freeze_vision_encoder": freeze_vision, "vlm_model_name": str(VLM)}
    change_config(folder, lambda config: config.update(settings))
    policy = SmolVLAPolicy.from_pretrained(str(folder), strict=True)
    sizes = smolvla.architecture_of_tensors(tensors(), epath.Path(folder), dtype="float32", vlm_config=VLM)
    arrays, length = inputs(), 4
    defaults = smolvla.training_defaults(sizes, length)
    monkeypatch.setattr(smolvla, "draw", lambda architecture, rng, batch, samples=1: (dict(batch), rng))
    step, state, held = _our_training(sizes, defaults)

    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = policy.config.get_optimizer_preset().build(trained)
    scheduler = policy.config.get_scheduler_preset().build(optimizer, length)
    batch = {key: torch.tensor(value) for key, value in _as_lerobot_has_it(arrays).items()}
    policy.train()
    for _ in range(3):
        state, info = step(jax.random.key(0), state, arrays)
        noise, time = (torch.tensor(arrays[name]) for name in ("noise", "time"))
        loss, _ = policy.forward(dict(batch), noise=noise, time=time)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, defaults["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        np.testing.assert_allclose(float(info["loss"]), loss.item(), rtol=2e-5)
        np.testing.assert_allclose(float(info["grad_norm"]), norm.item(), rtol=2e-5)
    theirs = {name: leaf.detach().numpy() for name, leaf in policy.state_dict().items()}
    ours, expected, before = (flatten(tree) for tree in (state.params, tree_of(theirs, sizes), params()))
    for path, leaf in expected.items():
        if path.endswith("key/bias"):  # whose gradient is zero but for rounding, which AdamW makes whole steps of
            continue
        difference, moved = (np.abs(leaf - other) for other in (np.asarray(ours[path]), before[path]))
        assert difference.mean() <= 3e-5 * moved.mean(), path
        for row in held.get(path, ()):
            np.testing.assert_array_equal(leaf[row], before[path][row])
    assert (expected["vlm/even/gate_proj"] != before["vlm/even/gate_proj"]).any()


def _our_training(sizes, defaults):
    """Our step, the state at its start, and the rows that stay."""
    tx = make_optimizer(OptimizerSettings.among(defaults))
    frozen = frozen_paths(tuple(flatten(params())), default=smolvla.frozen_rules(sizes))
    rows = smolvla.frozen_rows(sizes, flatten(params()))
    settings = StepSettings(ema_decay=None, frozen=frozen, frozen_rows=tuple(sorted(rows.items())))
    step = jax.jit(functools.partial(train_step, sizes, tx, settings))
    return step, make_state(params(), tx, frozen=frozen), rows


def _as_lerobot_has_it(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch of our arrays by lerobot's keys, images as floats in [0, 1], channels first."""
    batch = {
        key.removeprefix("image/"): image.transpose(0, 3, 1, 2).astype(np.float32) / 255
        for key, image in arrays.items()
        if key.startswith("image/")
    }
    batch |= {
        f"{key.removeprefix('image_mask/')}_padding_mask": mask
        for key, mask in arrays.items()
        if key.startswith("image_mask/")
    }
    batch |= {"observation.state": arrays["state"], "action": arrays["actions"]}
    batch |= {"observation.language.tokens": arrays["tokenized_prompt"]}
    batch |= {"observation.language.attention_mask": arrays["tokenized_prompt_mask"]}
    return batch | {"action_is_pad": arrays["action_is_pad"]}
