"""What a run used between robot and model, from its flags through clp.json to whoever serves, exports or resumes it."""

import dataclasses
import json
import shutil
from typing import Any

import numpy as np
import pytest
import toys
from recordings import GOLDEN

from clp_jax.checkpoint import read_spec, write_params
from clp_jax.cli import main
from clp_jax.commands import serve
from clp_jax.commands.data_flags import DataFlags, open_data
from clp_jax.commands.evaluate import Evaluate
from clp_jax.commands.evaluate_policy import open_policy
from clp_jax.commands.serve import Serve, make_policy
from clp_jax.errors import InputError
from clp_jax.loading import load_model
from clp_jax.models.pi0 import CONFIGURATIONS, ROBOTS
from clp_jax.processing import norm_stats
from clp_jax.processing.conventions import Conventions, conventions_of_json
from clp_jax.provenance import conventions_of
from scripts.make_lerobot_toy import write

pytestmark = pytest.mark.slow

ARCH = dataclasses.replace(toys.architecture(), vocab_size=512, action_dim=16)
SPM = GOLDEN / "tokenizer/tiny_spm.model"
LIBERO: Any = CONFIGURATIONS["pi0_libero"].conventions


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A toy checkpoint with a tokenizer, and data sets with openpi's columns of LIBERO and of simulated ALOHA."""
    folder = tmp_path_factory.mktemp("conventions")
    (folder / "assets").mkdir()
    shutil.copy(SPM, folder / "assets" / "paligemma_tokenizer.model")
    write_params(folder / "start", toys.params(ARCH), assets=folder / "assets")
    write(folder / "libero", "v3.0", {"state": 8, "actions": 7}, {"image": "image", "wrist_image": "image"})
    columns = {"observation.state": 14, "action": 14}
    write(folder / "sim", "v3.0", columns, {"observation.images.top": "image"})
    return folder


def finetune(place, run, *flags) -> int:
    paths = ("--checkpoint", place / "start", "--data", place / "libero", "--out", run, "--steps", "1")
    fast = ("--batch-size", "8", "--warmup-steps", "1", "--no-augment", "--evaluate-every", "0")
    return main([str(word) for word in ("finetune", *paths, *fast, *flags)])


def refusal(capsys, code: int) -> str:
    assert code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def run(place):
    """One step on LIBERO's columns by openpi's name."""
    assert finetune(place, place / "run", "--openpi-config", "pi0_libero") == 0
    return place / "run"


def test_a_run_records_what_it_used(run):
    record = read_spec(run / "0").plan_record
    recorded: Any = conventions_of(record)
    assert dataclasses.replace(recorded, robot=LIBERO.robot) == LIBERO
    assert dataclasses.replace(recorded.robot, widths={}) == LIBERO.robot
    assert (run / "0/assets/physical-intelligence/libero/norm_stats.json").exists()


def test_inspect_shows_what_a_run_used(run, capsys):
    assert main(["inspect", str(run / "0"), "--verify"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "conventions openpi's pi0_libero: 50 actions, 48 tokens, no state in the prompt; actions 0 1 2 3 4" in text
    assert "base_0_rgb from image, left_wrist_0_rgb from wrist_image, state from state, actions from actions" in text
    assert main(["inspect", str(run / "0"), "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert conventions_of_json(found["conventions"]) == conventions_of(read_spec(run / "0").plan_record)
    assert found["verified"]["arrays"] > 100


def test_a_run_is_served_as_it_was_trained_and_not_otherwise(run, capsys):
    policy: Any = make_policy(Serve(checkpoint=str(run / "0"), max_batch=1), read_spec(run / "0"))
    processing = policy.requests.processing
    assert (processing.robot.delta, policy.metadata["action_horizon"]) == (LIBERO.robot.delta, 50)
    told = policy.metadata["conventions"]
    assert told.startswith(
        "as trained, by clp.json: 50 actions, 48 tokens, no state in the prompt; actions 0 1 2 3 4 5"
    )
    for flags in (("--action-horizon", "10"), ("--robot", "metaworld"), ("--openpi-config", "pi0_aloha_sim")):
        assert "by the checkpoint's clp.json" in refusal(
            capsys, main(["serve", "--checkpoint", str(run / "0"), *flags])
        )


def test_a_released_checkpoint_is_served_as_it_is_told_and_says_what_it_assumes(run, tmp_path, monkeypatch):
    shutil.copytree(run / "0", tmp_path / "c")
    (tmp_path / "c" / "clp.json").unlink()

    def told(**flags) -> dict:
        return make_policy(Serve(checkpoint=str(tmp_path / "c"), **flags), read_spec(tmp_path / "c")).metadata

    model = load_model(read_spec(tmp_path / "c"))
    monkeypatch.setattr(serve, "load_model", lambda *_, **__: model)

    assert told(openpi_config="pi0_libero")["conventions"].startswith("openpi's pi0_libero: 50 actions")
    assumed = told(robot="libero")["conventions"]
    assert assumed.startswith("assumed for --robot libero, as in openpi's pi0_libero: 50 actions, 48 tokens, no state")
    assert assumed.endswith("statistics physical-intelligence/libero")
    ready = told()
    assert (ready["robot"], ready["conventions"]) == ("model-ready", "model-ready: 50 actions, 48 tokens")


def test_a_run_is_exported_with_its_lengths_and_not_with_others(run, tmp_path, capsys):
    words = [
        "export",
        "--checkpoint",
        str(run / "0"),
        "--to",
        "openpi",
        "--check",
        "bits",
        "--out",
        str(tmp_path / "e"),
    ]
    message = "max_token_len is 40 by the flags, 48 by the checkpoint's clp.json. Leave the flags out"
    assert message in refusal(capsys, main([*words, "--prompt-length", "40"]))
    assert main(words) == 0
    assert conventions_of(read_spec(tmp_path / "e").plan_record) == conventions_of(read_spec(run / "0").plan_record)


def test_a_run_goes_on_by_its_record_and_not_under_another_convention(place, run, capsys):
    assert finetune(place, run, "--resume") == 0
    assert finetune(place, run, "--resume", "--robot", "libero") == 0
    message = refusal(capsys, finetune(place, run, "--resume", "--openpi-config", "pi0_aloha_sim"))
    assert "cameras is" in message
    assert "by the checkpoint's clp.json" in message


def test_a_robots_file_is_known_by_its_content(place, run, tmp_path, capsys):
    file, images = tmp_path / "mine.json", dict(LIBERO.robot.images)
    robot = {"images": images, "state": "state", "actions": "actions", "delta": [6, -1]}
    file.write_text(json.dumps(robot))
    assert finetune(place, run, "--resume", "--robot", file) == 0
    file.write_text(json.dumps(robot | {"delta": [7]}))
    message = refusal(capsys, finetune(place, run, "--resume", "--robot", file))
    assert "delta is [0, 1, 2, 3, 4, 5, 6] by --robot" in message
    file.write_text(json.dumps(robot | {"images": dict(zip(images, reversed(images.values()), strict=True))}))
    message = refusal(capsys, finetune(place, run, "--resume", "--robot", file))
    assert "robot.images was {'base_0_rgb': 'image', 'left_wrist_0_rgb': 'wrist_image'}, is" in message


def test_statistics_are_known_by_their_values(place, run, tmp_path, capsys):
    saved = run / "0/assets/physical-intelligence/libero"
    assert finetune(place, run, "--resume", "--norm-stats", saved) == 0
    stats = norm_stats.load(saved)
    norm_stats.save(tmp_path, stats | {"state": dataclasses.replace(stats["state"], mean=stats["state"].mean + 1)})
    message = refusal(capsys, finetune(place, run, "--resume", "--norm-stats", tmp_path))
    assert "statistics_fingerprint was" in message


def test_simulated_aloha_is_absolute_and_has_one_prompt_whatever_its_tasks_say(place):
    flags = DataFlags(robot="aloha-sim", tokenizer=str(SPM))
    data: Any = open_data(flags, str(place / "sim"), ARCH, assets=None, hold_out_ratio=0.0, seed=0)
    rows = data.read(np.arange(20))
    assert len(np.unique(rows["tokenized_prompt"], axis=0)) == 1
    named = DataFlags(openpi_config="pi0_aloha_sim", tokenizer=str(SPM))
    same = open_data(named, str(place / "sim"), ARCH, assets=None, hold_out_ratio=0.0, seed=0).read(np.arange(20))
    relative = dataclasses.replace(ROBOTS["aloha"], images=ROBOTS["aloha-sim"].images)
    assert data.conventions.robot.delta == () != relative.delta
    for key, value in rows.items():
        np.testing.assert_array_equal(same[key], value)


def test_what_openpi_trains_from_other_files_is_not_trained_here(place):
    pi05 = dataclasses.replace(toys.architecture("pi05"), vocab_size=512)
    flags = DataFlags(openpi_config="pi05_full_droid_finetune")
    with pytest.raises(
        InputError, match="openpi trains pi05_full_droid_finetune from RLDS files, which clp_jax does not"
    ):
        open_data(flags, str(place / "libero"), pi05, assets=None, hold_out_ratio=0.0, seed=0)


def test_model_ready_data_take_no_configuration(tmp_path):
    np.savez(tmp_path / "d.npz", **toys.data(toys.architecture()).arrays)
    flags = DataFlags(openpi_config="pi0_libero")
    with pytest.raises(InputError, match=r"is model-ready: --openpi-config cannot change what it holds"):
        open_data(flags, str(tmp_path / "d.npz"), toys.architecture(), assets=None, hold_out_ratio=0.0, seed=0)


def test_statistics_are_a_configurations(place, tmp_path, capsys):
    def actions(*flags) -> tuple[np.ndarray, str]:
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        assert main(["norm-stats", "--data", str(place / "libero"), "--out", str(tmp_path / "s"), *flags]) == 0
        (file,) = (tmp_path / "s").rglob("norm_stats.json")
        return norm_stats.load(file)["actions"].mean, file.parent.relative_to(tmp_path / "s").as_posix()

    relative, name = actions("--openpi-config", "pi0_libero")
    assert name == "physical-intelligence/libero"
    capsys.readouterr()
    alone, name = actions("--robot", "libero")
    assert name == "libero"
    assert "pi0_libero" in capsys.readouterr().out
    assert not np.allclose(relative[:6], alone[:6])
    np.testing.assert_allclose(actions("--robot", "libero", "--checkpoint", str(place / "start"))[0], relative)


def test_a_simulator_names_the_values_of_a_recorded_run(place, run, tmp_path, monkeypatch):
    shutil.copytree(run / "0", tmp_path / "c")
    robot = dataclasses.replace(ROBOTS["metaworld"], images={"base_0_rgb": "top"}, state=("q",), delta=(True,))
    record = json.loads((tmp_path / "c" / "clp.json").read_text())
    record["steps"][-1]["conventions"] = Conventions(robot, 7, 9).to_json()
    (tmp_path / "c" / "clp.json").write_text(json.dumps(record))
    made = []

    def make(config, spec):
        made.append(config)
        raise InputError("enough")

    monkeypatch.setattr(serve, "make_policy", make)
    with pytest.raises(InputError, match="enough"):
        open_policy(Evaluate(suite="metaworld", out="x", checkpoint=str(tmp_path / "c")), "metaworld", 1)
    (config,) = made
    assert (config.robot, config.image) == (None, ("base_0_rgb=observation.image",))
    assert config.state_key == ("observation.state",)
