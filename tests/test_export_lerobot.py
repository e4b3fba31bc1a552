"""lerobot's folder: its files always, the real lerobot 0.6.1 where it is (make test-lerobot)."""

import importlib.util
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import real_lerobot
from test_export import STATS, eight_heads, export, save

from clp_jax.checkpoint.safetensors.tensorfile import read_tensors
from clp_jax.cli import main
from clp_jax.models import Lengths
from clp_jax.models.layers.flow import time_embedding
from clp_jax.models.pi0 import CONFIGURATIONS

ACTION_TOLERANCE = 1e-5
"""Ten steps of float32 in two frameworks, with the same times and time embedding."""

real = pytest.mark.filterwarnings("ignore")


def loader(folder):
    spec = importlib.util.spec_from_file_location("load_lerobot", folder / "load_lerobot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def step(request, tmp_path_factory):
    """A pruned checkpoint of eight heads, both language towers and the vision tower."""
    folder = tmp_path_factory.mktemp(f"lerobot_{request.param}")
    stats = {
        name: values | {"q01": [-1.0] * len(values["mean"]), "q99": [3.0] * len(values["mean"])}
        for name, values in STATS.items()
    }
    full = save(folder, eight_heads(request.param))
    (full / "assets" / "robot" / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
    plan = {"schema": 1, "kind": request.param, "coupled": [["vlm", "action"]]}
    keep = {"vision": (2, [1]), "vlm": (4, [0, 2, 3]), "action": (4, [0, 2, 3])}
    plan["towers"] = {name: {"depth": depth, "keep": kept} for name, (depth, kept) in keep.items()}
    (folder / "plan.json").write_text(json.dumps(plan))
    words = ["prune", "--checkpoint", str(full), "--plan", str(folder / "plan.json"), "--out", str(folder / "pruned")]
    assert main(words) == 0
    return folder / "pruned"


_GIVE_LIBERO = (
    "give it image as observation.images.base_0_rgb, wrist_image as observation.images.left_wrist_0_rgb, state as"
)


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("pi0", "pi0_libero", ["add it yourself to dimensions 0 1 2 3 4 5.", _GIVE_LIBERO]),
        ("pi0", "pi0_aloha_sim", ["no units of aloha"]),
        (
            "pi05",
            "pi05_libero",
            ["spell the state in the prompt, which this checkpoint was not trained with", _GIVE_LIBERO],
        ),
        (
            "pi05",
            "pi05_droid",
            ["give it joint_position, gripper_position in this order as observation.state", "exterior_image_1_left as"],
        ),
    ],
)
def test_what_the_exported_processors_do_not_do_is_said(tmp_path, capsys, kind, config, said):
    entry = CONFIGURATIONS[config].conventions
    full = save(tmp_path, eight_heads(kind))
    (full / "assets" / "robot").rename(full / "assets" / "moved")
    shutil.copytree(full / "assets" / "moved", full / "assets" / entry.asset_id)
    words = ("--to", "lerobot", "--check", "bits", "--openpi-config", config)
    assert main(["export", "--checkpoint", str(full), "--out", str(tmp_path / "e"), *words]) == 0
    out, card = capsys.readouterr().out, (tmp_path / "e" / "README.md").read_text()
    assert f"Those of openpi's configuration `{config}`: {entry}." in card
    assert out.count("warning:") == len(said)
    assert all(sentence in out and sentence in card for sentence in said)
    first = json.loads((tmp_path / "e" / "policy_preprocessor.json").read_text())["steps"][0]
    keys = {key: f"observation.images.{camera}" for camera, key in entry.robot.images.items()}
    renamed = {key: name for key, name in keys.items() if key.startswith("observation.")}
    assert first == {"registry_name": "rename_observations_processor", "config": {"rename_map": renamed}}
    assert bool(renamed) == (config == "pi0_aloha_sim")


@pytest.fixture(scope="module")
def recorded(step, tmp_path_factory):
    """Written with the recorded actions, but not run: the real lerobot has other sizes than the toys."""
    real_lerobot.import_lerobot()
    from clp_jax.checkpoint import read_spec
    from clp_jax.export import lerobot
    from clp_jax.export.result import Options, export_record, write_json
    from clp_jax.export.upstream import write_reference
    from clp_jax.export.weights import Weights
    from clp_jax.loading import read_architecture

    spec = read_spec(step)
    weights = Weights(spec, read_architecture(spec), merge=True, dtype="float32")
    options, folder = Options(Lengths(4, 5)), tmp_path_factory.mktemp("recorded")
    lerobot.write(weights, folder, options)
    write_reference(weights, folder, options)
    write_json(folder / "export.json", export_record(weights, "lerobot", options, None))
    return folder


@pytest.fixture
def exported(recorded, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(recorded, tmp_path / "e")


@pytest.mark.slow
def test_the_folder_has_lerobots_files(step, tmp_path):
    assert export(step, tmp_path / "e", "lerobot", "--check", "bits") == 0
    kind = json.loads((step / "clp.json").read_text())["kind"]
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    assert config["type"] == kind
    assert config["paligemma_variant"] == "gemma_2b_depth3_vision1"
    assert next(iter(config["input_features"])) == "observation.images.base_0_rgb"
    assert config["output_features"]["action"]["shape"] == [3]
    tensors = read_tensors(tmp_path / "e" / "model.safetensors")
    assert all(name.startswith("model.") for name in tensors)
    number = {"pi0": 6, "pi05": 3}[kind]
    statistics = read_tensors(tmp_path / "e" / f"policy_preprocessor_step_{number}_normalizer_processor.safetensors")
    assert statistics["observation.state.std"].tolist() == [2.0] * 4


def test_norm_stats_are_needed_and_chosen(tmp_path, capsys):
    full = save(tmp_path, eight_heads(), assets=("arm", "lab/hand"))
    assert export(full, tmp_path / "e", "lerobot") == 2
    assert "norm stats of arm, lab/hand; choose with --asset-id" in capsys.readouterr().err
    assert export(full, tmp_path / "e", "lerobot", "--asset-id", "leg") == 2
    assert "there are no norm stats of leg" in capsys.readouterr().err
    assert export(full, tmp_path / "e", "lerobot", "--asset-id", "lab/hand", "--check", "bits") == 0
    shutil.rmtree(full / "assets")
    assert export(full, tmp_path / "f", "lerobot") == 2
    assert "copy the training run's assets there" in capsys.readouterr().err


@pytest.fixture
def small_lerobot(exported, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    real_lerobot.shrink(json.loads((exported / "export.json").read_text())["architecture"], monkeypatch)
    return exported


@real
def test_the_real_policy_gives_our_actions(small_lerobot):
    assert loader(small_lerobot).largest_difference(small_lerobot) < ACTION_TOLERANCE


@real
@pytest.mark.parametrize("width", [12, 24, 64, 1024])
def test_the_loaders_time_embedding_is_ours(exported, width):
    """lerobot's own is float64: 1e-4 away at the shortest period."""
    import torch

    times = np.array([1.0, 0.9, 0.5, 0.1], np.float32)
    theirs = loader(exported)._time_embedding(torch.from_numpy(times), width, 4e-3, 4.0)
    np.testing.assert_allclose(theirs.numpy(), jax.jit(time_embedding, static_argnums=1)(times, width), atol=1e-6)


@real
def test_lerobot_alone_refuses_the_folder(exported):
    kind = json.loads((exported / "config.json").read_text())["type"]
    policy = f"{kind.upper()}Policy"
    code = f"from lerobot.policies.{kind}.modeling_{kind} import {policy}; {policy}.from_pretrained({str(exported)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Invalid paligemma_variant: gemma_2b_depth3_vision1" in done.stderr


@real
@pytest.mark.parametrize("damage", ["depth", "weight", "missing"])
def test_a_policy_whose_weights_are_not_the_files_is_not_returned(small_lerobot, damage):
    from clp_jax.checkpoint.safetensors.tensorfile import TensorWriter

    config, file = small_lerobot / "config.json", small_lerobot / "model.safetensors"
    module = loader(small_lerobot)
    if damage == "depth":
        config.write_text(config.read_text().replace("depth3", "depth4"))
    else:
        tensors = {name: np.array(tensor) for name, tensor in read_tensors(file).items()}
        if damage == "missing":
            del tensors["model.action_out_proj.bias"]
        shapes = {name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        with TensorWriter(file, shapes, {"format": "pt"}) as writer:
            for name, tensor in tensors.items():
                writer.write(name, [tensor])
    if damage == "weight":  # what lerobot would do with a weight of its own
        import torch
        from lerobot.policies.pi0.modeling_pi0 import PI0Policy
        from lerobot.policies.pi05.modeling_pi05 import PI05Policy

        policy = module.load_policy(small_lerobot, device="cpu")
        assert isinstance(policy, PI0Policy | PI05Policy)
        with torch.no_grad():
            policy.model.action_out_proj.weight += 1
        with pytest.raises(RuntimeError, match="1 weights are not those of the file"):
            module._compare(policy, small_lerobot)
        return
    with pytest.raises(RuntimeError, match="weights are not those of the file"):
        module.load_policy(small_lerobot, device="cpu")


@real
def test_lerobots_processors_normalise_with_our_statistics(small_lerobot):
    import torch
    from lerobot.policies.factory import make_pre_post_processors

    policy = loader(small_lerobot).load_policy(small_lerobot, device="cpu")
    size = policy.config.image_resolution[0]

    class Tokenizer:
        def __call__(self, text, **_):
            shape = (len(text), 5)
            return {
                "input_ids": torch.ones(shape, dtype=torch.long),
                "attention_mask": torch.ones(shape, dtype=torch.long),
            }

    before, after = make_pre_post_processors(
        policy.config,
        pretrained_path=str(small_lerobot),
        preprocessor_overrides={"tokenizer_processor": {"tokenizer": Tokenizer(), "tokenizer_name": None}},
    )
    state = torch.tensor([1.0, 2.0, -1.0, 3.0])
    batch = before(
        {"observation.state": state, "task": "stack", "observation.images.base_0_rgb": torch.rand(3, size, size)}
    )
    quantile = policy.config.type == "pi05"
    expected = (state + 1) / 4 * 2 - 1 if quantile else (state - 0.5) / (2.0 + 1e-6)
    torch.testing.assert_close(batch["observation.state"][0], expected)
    action = policy.select_action(batch)
    undone = (action + 1) / 2 * 4 - 1 if quantile else action * 2.0 + 0.5
    torch.testing.assert_close(after(action), undone, atol=1e-4, rtol=1e-4)
