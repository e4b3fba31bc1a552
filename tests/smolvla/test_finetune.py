"""``clp finetune`` on a LeRobot data set from lerobot's policy folder, and what can be done with a step of the run."""

import json

import numpy as np
import pytest
from etils import epath
from smolvla_recordings import CAMERAS, GOLDEN

from clp_jax.analysis import Analysis
from clp_jax.checkpoint import read_spec
from clp_jax.cli import main
from clp_jax.commands.serve import Serve, make_policy
from clp_jax.data.lerobot_writer import Recorded, png_of, write_lerobot
from clp_jax.loading import read_architecture
from clp_jax.models import smolvla
from clp_jax.processing.policy_files import read_vectors

pytestmark = pytest.mark.slow

CKPT = GOLDEN / "ckpt"
SIZES = {"top": (60, 80), "wrist": (128, 128), "side": (96, 80)}


def episodes():
    rng = np.random.default_rng(0)
    for _ in range(4):
        vectors = {key: rng.standard_normal((8, n)).astype(np.float32) for key, n in (("state", 6), ("action", 8))}
        vectors = {"observation.state": vectors["state"], "action": vectors["action"]}
        pictures = {c: rng.integers(0, 256, (8, *SIZES[c], 3)).astype(np.uint8) for c in CAMERAS}
        images = {f"observation.images.{c}": [png_of(picture) for picture in p] for c, p in pictures.items()}
        yield Recorded("push", vectors, images)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("data")
    write_lerobot(folder, episodes(), fps=10, robot_type="toy")
    return folder


def words(data, out, *flags) -> list[str]:
    paths = ["--checkpoint", CKPT, "--data", data, "--out", out, "--batch-size", "8", "--log-every", "1"]
    return [str(word) for word in ("finetune", *paths, "--decay-steps", "4", "--warmup-steps", "0", *flags)]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(words(data, out, "--steps", "2", "--evaluate-every", "0")) == 0
    return out


def test_settings_are_lerobots_and_recorded(run):
    config = json.loads((run / "1" / "clp.json").read_text())["steps"][-1]["config"]
    assert (config["peak_lr"], config["clip_norm"], config["schedule"]) == (1e-4, 10.0, "cosine-from-start")
    assert (config["ema_decay"], config["frozen_dtype"]) == (None, "keep")
    assert config["batch_size"] == 8  # given


def test_a_step_is_resumed_analysed_pruned_and_served(run, data, tmp_path):
    assert main(words(data, run, "--steps", "3", "--evaluate-every", "0", "--resume")) == 0
    step = run / "2"
    flags = ["--data", data, "--max-observations", "8", "--group-size", "4"]
    plan = tmp_path / "analysis"
    assert main([str(w) for w in ("analyse", "--checkpoint", step, *flags, "--keep-layers", "6", "--out", plan)]) == 0
    assert Analysis.load(plan / "similarity.npz").meta["sampling"]["max_samples"] == smolvla.MAX_SAMPLES
    cut = tmp_path / "cut"
    assert main([str(w) for w in ("prune", "--checkpoint", step, "--plan", plan / "plan.json", "--out", cut)]) == 0
    config = json.loads((cut / "assets" / "policy" / "config.json").read_text())
    assert config["num_vlm_layers"] == 6
    spec = read_spec(cut)
    assert read_architecture(spec).depths["vlm"] == 6
    policy = make_policy(Serve(checkpoint=str(cut), dtype="float32", max_batch=1, num_steps=1), spec)
    assert policy.metadata["action_horizon"] == 7
    images = {f"observation/images/{c}": np.zeros((*SIZES[c], 3), np.uint8) for c in CAMERAS}
    answer = policy.infer({"observation/state": np.zeros(6), "prompt": "push", **images})
    assert answer["actions"].shape == (7, 8)


def test_statistics_of_the_checkpoint_can_be_used(data, tmp_path):
    out = tmp_path / "run"
    assert main(words(data, out, "--steps", "1", "--evaluate-every", "0", "--norm-stats", "None")) == 0
    name = "policy_preprocessor_step_5_normalizer_processor.safetensors"
    ours, theirs = (read_vectors(epath.Path(p / name)) for p in (out / "0" / "assets" / "policy", CKPT))
    assert np.array_equal(ours["action.mean"], theirs["action.mean"])
