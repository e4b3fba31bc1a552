"""``clp finetune`` of a GR00T from a .npz, and what can be done with a step of the run."""

import json
import shutil

import groot_recordings as golden
import numpy as np
import pytest
from checkpoints import assert_bit_equal
from groot_recordings import GOLDEN

from clp_jax.checkpoint import read_params, read_spec
from clp_jax.cli import main
from clp_jax.loading import load_model, read_architecture
from clp_jax.training.logs import read_log
from clp_jax.trees import flatten

pytestmark = pytest.mark.slow

METADATA = {"new_embodiment": {"statistics": {}}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The pruned recording with statistics in it and Eagle's configuration beside it."""
    place = tmp_path_factory.mktemp("groot")
    shutil.copytree(GOLDEN / "eagle", place / "eagle")
    return with_statistics(place / "ckpt")


def with_statistics(place):
    shutil.copytree(GOLDEN / "ckpt_pruned", place)
    (place / "experiment_cfg").mkdir()
    (place / "experiment_cfg" / "metadata.json").write_text(json.dumps(METADATA))
    return place


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = golden.inputs()
    arrays = {key: np.concatenate([rows[key]] * 4) for key in rows if key not in ("noise", "time", "sample_noise")}
    arrays["actions"] = rng.standard_normal(arrays["actions"].shape).astype(np.float32)
    file = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(file, **arrays)
    return file


def words(checkpoint, data, out, *flags) -> list[str]:
    paths = ["--checkpoint", checkpoint, "--data", data, "--out", out, "--batch-size", "8", "--log-every", "1"]
    return [str(word) for word in ("finetune", *paths, "--evaluate-every", "0", *flags)]


LENGTH = ("--warmup-steps", "1", "--decay-steps", "3")
"""Of the schedule, whatever the number of steps."""


@pytest.fixture(scope="module")
def run(checkpoint, data, tmp_path_factory):
    """Three steps in one piece."""
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(words(checkpoint, data, out, *LENGTH, "--steps", "3")) == 0
    return out


def test_settings_are_nvidias_and_the_backbone_is_frozen(run, checkpoint):
    config = json.loads((run / "2" / "clp.json").read_text())["steps"][-1]["config"]
    assert (config["peak_lr"], config["b1"], config["b2"], config["clip_norm"]) == (1e-4, 0.95, 0.999, 1.0)
    assert (config["schedule"], config["weight_decay"], config["ema_decay"]) == ("zero-warmup-cosine", 1e-5, None)
    assert config["dropout"]
    assert read_log(run)["learning_rate"].values == pytest.approx([0.0, 1e-4, 5e-5])
    before, after = flatten(load_model(checkpoint, dtype="float32").params), flatten(read_params(read_spec(run / "2")))
    moved = {path for path, leaf in after.items() if not np.array_equal(leaf, before[path])}
    assert {path.split("/")[0] for path in moved} == {"action_head"}
    assert {path.split("/")[1] for path in moved} == {path.split("/")[1] for path in after if "action_head/" in path}


def test_a_resumed_run_is_the_uninterrupted_one(run, checkpoint, data, tmp_path):
    out = tmp_path / "run"
    assert main(words(checkpoint, data, out, *LENGTH, "--steps", "2")) == 0
    assert main(words(checkpoint, data, out, *LENGTH, "--steps", "3", "--resume")) == 0
    assert_bit_equal(read_params(read_spec(run / "2")), read_params(read_spec(out / "2")))


def test_a_step_is_loaded_and_cut_without_its_source(run, tmp_path):
    policy = run / "2" / "assets" / "policy"
    assert json.loads((policy / "experiment_cfg" / "metadata.json").read_text()) == METADATA
    assert (policy / "eagle" / "config.json").exists()
    step = shutil.copytree(run / "2", tmp_path / "moved" / "2")
    assert read_architecture(read_spec(step)).llm.num_heads == 6
    flags = ["--keep", "llm=0,2,4", "dit=0,1,2,5"]
    assert main([str(w) for w in ("prune", "--checkpoint", step, *flags, "--out", tmp_path / "cut")]) == 0
    config = json.loads((tmp_path / "cut" / "assets" / "policy" / "config.json").read_text())
    assert config["backbone_cfg"]["select_layer"] == 3
    assert config["action_head_cfg"]["diffusion_model_cfg"]["num_layers"] == 4
    assert read_architecture(read_spec(tmp_path / "cut")).depths == {"vision": 3, "llm": 3, "vl": 3, "dit": 4}


def test_vlm_config_of_the_command_goes_into_the_steps(data, tmp_path):
    alone = with_statistics(tmp_path / "alone" / "ckpt")
    flags = (*LENGTH, "--steps", "1", "--vlm-config", GOLDEN / "eagle")
    assert main(words(alone, data, tmp_path / "run", *flags)) == 0
    assert (tmp_path / "run" / "0" / "assets" / "policy" / "eagle" / "config.json").exists()


def test_dropout_cannot_be_left_out_where_there_is_none(data, tmp_path, capsys):
    assert main(words(GOLDEN.parent / "smolvla" / "ckpt", data, tmp_path / "run", "--steps", "1", "--no-dropout")) == 2
    assert "a smolvla has no dropout; leave out --no-dropout" in capsys.readouterr().err


def test_a_pattern_that_matches_nothing_is_refused(checkpoint, data, tmp_path, capsys):
    assert main(words(checkpoint, data, tmp_path / "run", "--steps", "1", "--not-decayed", "norm")) == 2
    assert "--not-decayed 'norm' matches the name of no parameter" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
