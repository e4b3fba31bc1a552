"""A folder is pruned by a plan, and its record says how it came to be."""

import dataclasses
import json
import re

import numpy as np
import pytest
from safetensors_folders import GROOT, GROOT_PRUNED, SMOLVLA, WEIGHTS, groot_keep, tensors_of

import clp_jax
from clp_jax import cli
from clp_jax.checkpoint.safetensors.folder import fingerprint_folder, read_folder
from clp_jax.errors import InputError
from clp_jax.plan import PrunePlan
from clp_jax.prune_folder import prune_folder


def plan_of(spec, keep) -> PrunePlan:
    return PrunePlan.of(spec.kind, spec.depths, keep, coupled=tuple(g for g in spec.groups if len(g) > 1))


def test_the_record_says_what_was_done(tmp_path):
    spec = read_folder(GROOT)
    prune_folder(spec, plan_of(spec, groot_keep()), tmp_path / "out", config={"seed": 3}, calibration={"episodes": 2})
    assert tensors_of(tmp_path / "out") == tensors_of(GROOT_PRUNED)
    record = json.loads((tmp_path / "out" / "clp.json").read_text())
    assert record["kind"] == "groot_n15" and record["schema"] == 1
    (step,) = record["steps"]
    assert step["source"] == str(GROOT) and step["source_fingerprint"] == fingerprint_folder(spec)
    assert step["config"] == {"seed": 3} and step["calibration"] == {"episodes": 2}
    assert PrunePlan.from_json(record["plan"]) == plan_of(spec, groot_keep())
    assert read_folder(tmp_path / "out").plan_record == record


def test_plans_compose_when_a_pruned_folder_is_pruned_again(tmp_path):
    spec = read_folder(SMOLVLA)
    first = {name: [0, 1, 4, 5, 8, 11] for name in ("vlm", "action")}
    prune_folder(spec, plan_of(spec, first), tmp_path / "first")
    half = read_folder(tmp_path / "first")
    prune_folder(half, plan_of(half, {name: [0, 3, 4, 5] for name in first}), tmp_path / "second")
    prune_folder(spec, plan_of(spec, {name: [0, 5, 8, 11] for name in first}), tmp_path / "once")
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    twice, once = (json.loads((tmp_path / name / "clp.json").read_text()) for name in ("second", "once"))
    assert twice["plan"]["towers"] == once["plan"]["towers"] and twice["plan"]["coupled"] == once["plan"]["coupled"]
    assert [step["source"] for step in twice["steps"]] == [str(SMOLVLA), str(tmp_path / "first")]
    assert len(once["steps"]) == 1


def test_plans_that_do_not_fit(tmp_path):
    spec = read_folder(SMOLVLA)
    plan = plan_of(spec, {name: [0, 1] for name in ("vlm", "action")})
    with pytest.raises(InputError, match=r"the plan is for a smolvla model, .* is a groot"):
        prune_folder(read_folder(GROOT), plan, tmp_path / "out")
    prune_folder(spec, plan, tmp_path / "cut")
    with pytest.raises(InputError, match="for a 'vlm' tower of 12 blocks, but the model's has 2"):
        prune_folder(read_folder(tmp_path / "cut"), plan, tmp_path / "out")
    edited = dataclasses.replace(plan_of(spec, {name: [0, 2] for name in ("vlm", "action")}), coupled=())
    with pytest.raises(InputError, match="tower 'vlm': block 2 cannot take place 1"):
        prune_folder(spec, edited, tmp_path / "out")
    (tmp_path / "cut" / "clp.json").write_text('{"schema": 1}')
    with pytest.raises(InputError, match="lacks 'plan'"):
        read_folder(tmp_path / "cut")
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def test_command_cuts_towers_of_their_own_without_a_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("clp_jax.commands.prune.read_architecture", lambda *_, **__: pytest.fail("a model was built"))
    keep = [f"{name}={','.join(map(str, blocks))}" for name, blocks in groot_keep().items()]
    assert run("prune", "--checkpoint", GROOT, "--keep", *keep, "--out", tmp_path / "cut") == 0
    assert tensors_of(tmp_path / "cut") == tensors_of(GROOT_PRUNED)
    config, wanted = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "cut", GROOT_PRUNED))
    assert config == wanted
    assert "dit     16 -> 8 blocks" in capsys.readouterr().out


def test_command_cuts_coupled_towers_alike_and_composes(tmp_path):
    assert run("prune", "--checkpoint", SMOLVLA, "--keep", "0,1,4,5,8,11", "--out", tmp_path / "once") == 0
    assert run("prune", "--checkpoint", tmp_path / "once", "--keep", "0,1,4,5", "--out", tmp_path / "twice") == 0
    assert run("prune", "--checkpoint", SMOLVLA, "--keep", "0,1,8,11", "--out", tmp_path / "direct") == 0
    assert tensors_of(tmp_path / "twice") == tensors_of(tmp_path / "direct")
    record = json.loads((tmp_path / "twice" / "clp.json").read_text())
    assert record["plan"]["towers"]["action"]["keep"] == [0, 1, 8, 11]
    assert [step["config"]["keep"] for step in record["steps"]] == ["0,1,4,5,8,11", "0,1,4,5"]


@pytest.mark.parametrize(
    ("source", "keep", "message"),
    [
        (SMOLVLA, ["0,2,5"], "block 2 cannot take place 1"),
        (SMOLVLA, ["vlm=0,1", "action=0,3"], "towers vlm and action keep the same blocks"),
        (SMOLVLA, ["vision=0,1"], "tower 'vision' must keep its 3 blocks"),
        (GROOT, ["0,1,2"], r"does not say of which tower; write --keep llm=\.\.\. dit=\.\.\. vl=\.\.\."),
        (GROOT, ["dit=0,2"], "block 2 cannot take place 1"),
        (GROOT, ["head=0"], "there is no tower 'head'"),
        (GROOT, ["llm=0,1", "llm=0,2"], "names a tower twice"),
        (GROOT, ["llm=0,x"], "is no list of block numbers"),
    ],
)
def test_command_refuses_blocks_that_cannot_be(tmp_path, capsys, source, keep, message):
    assert run("prune", "--checkpoint", source, "--keep", *keep, "--out", tmp_path / "cut") == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "cut").exists()


def test_command_refuses_what_only_models_read(tmp_path, capsys):
    assert run("prune", "--checkpoint", SMOLVLA, "--keep", "0", "--vlm-config", "x", "--out", tmp_path / "cut") == 2
    assert "--vlm-config: --keep already says which blocks stay; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()


@pytest.mark.slow
def test_a_cut_computes_what_the_whole_model_computes_with_closed_gates(tmp_path):
    """From lerobot's folder to lerobot's folder, through the library as the README has it."""
    settings = {"dtype": "float32", "vlm_config": SMOLVLA.parent / "vlm"}
    whole = clp_jax.load_model(SMOLVLA, **settings)
    keep = [0, 1, 4, 5, 8, 11]
    plan = clp_jax.plan_of_blocks(whole.architecture, keep)
    clp_jax.prune_checkpoint(whole.spec, plan, tmp_path / "cut")
    data = observations(whole.architecture, tmp_path / "observations.npz")
    cut = clp_jax.load_model(tmp_path / "cut", **settings)
    gates = clp_jax.plan_gates(whole.architecture, plan)
    loss = clp_jax.loss_of(whole, data)(gates)
    np.testing.assert_allclose(clp_jax.loss_of(cut, data)(clp_jax.Gates()), loss, rtol=1e-5)
    np.testing.assert_allclose(clp_jax.sample(cut, data), clp_jax.sample(whole, data, gates=gates), atol=1e-5)
    theirs = np.load(SMOLVLA.parent / "golden_smolvla_pruned.npz")
    np.testing.assert_allclose(loss, theirs["loss_per_sample"].mean(), rtol=1e-5)


def observations(architecture, file) -> clp_jax.CalibrationData:
    """lerobot's recorded inputs as a file of observations."""
    folder = SMOLVLA.parent
    recorded, images = np.load(folder / "golden_smolvla.npz"), np.load(folder / "images_u8.npz")
    names = {"tokenized_prompt": "tokens", "tokenized_prompt_mask": "token_mask"}
    names |= {key: key for key in ("state", "actions", "noise", "time", "action_is_pad")}
    arrays = {key: recorded[name] for key, name in names.items()}
    for camera in architecture.cameras:
        short = camera.removeprefix("observation.images.")
        arrays[f"image/{camera}"] = images[short]
        arrays[f"image_mask/{camera}"] = recorded[f"image_mask/{short}"]
    np.savez(file, **arrays)
    return clp_jax.load_npz(file, architecture)
