"""A SmolVLA acts in a simulator as the robot that its own config.json describes."""

import json
import shutil

import pytest
import simulated
from safetensors.numpy import load_file, save_file
from safetensors_folders import SMOLVLA, change_config
from smolvla_recordings import GOLDEN

from clp_jax.cli import main
from clp_jax.commands import evaluate as command
from clp_jax.evaluation.suite import Suite


@pytest.fixture
def policy(tmp_path):
    """The recorded policy with one camera of the simulator's size, and four of its dimensions of state and actions."""
    folder = shutil.copytree(SMOLVLA, tmp_path / "policy")
    shutil.copytree(GOLDEN / "vlm", folder / "vlm")
    features = {
        "input_features": {
            "observation.image": {"type": "VISUAL", "shape": [3, 8, 8]},
            "observation.state": {"type": "STATE", "shape": [4]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [4]}},
    }
    change_config(folder, lambda config: config.update(features))
    for file in folder.glob("*normalizer_processor.safetensors"):
        save_file({name: values[:4] for name, values in load_file(file).items()}, file)
    return folder


@pytest.mark.slow
def test_a_smolvla_acts_with_its_own_robot_and_number_of_steps(policy, monkeypatch, tmp_path, capsys):
    suite = Suite("counting", ("3", "never"), simulated.Counting, robot="metaworld")
    monkeypatch.setattr(command, "open_suite", lambda config: suite)
    out = tmp_path / "found"
    words = ["--suite", "metaworld", "--checkpoint", str(policy), "--episodes", "1", "--processes", "1"]
    assert main(["evaluate", *words, "--out", str(out)]) == 0, capsys.readouterr().err
    found = json.loads((out / "results.json").read_text())
    assert found["policy"]["robot"] == "of the checkpoint"
    assert found["policy"]["num_steps"] == json.loads((policy / "config.json").read_text())["num_steps"]
    assert found["tasks"]["3"]["successes"] == 1 and found["tasks"]["never"]["successes"] == 0
