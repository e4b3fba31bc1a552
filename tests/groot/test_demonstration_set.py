"""A data set of the form of Isaac-GR00T's own demonstration, `robot_sim.PickNPlace`: trained on, served, compared."""

import dataclasses
import json
import zlib

import groot_recordings as golden
import numpy as np
import pytest
from etils import epath
from groot_recordings import GOLDEN, OUTPUT_TOLERANCE
from lerobot_sets import edit_info, edit_table, tables, vectors, with_column

from clp_jax.checkpoint import read_spec, write_params
from clp_jax.cli import main
from clp_jax.commands.serve import Serve, make_policy
from clp_jax.models import abstract_params
from clp_jax.models.groot.pictures import middle, resized
from clp_jax.provenance import conventions_of
from clp_jax.trees import flatten, unflatten
from scripts.make_lerobot_toy import write

pytestmark = pytest.mark.slow

pytest.importorskip("tokenizers")

STOCK = {
    key.removeprefix("pick_n_place/"): array
    for key, array in golden.recording("data_configs").items()
    if key.startswith("pick_n_place/")
}
MODALITY = json.loads((GOLDEN / "pick_n_place_modality.json").read_text())
PARTS = ("left_arm", "right_arm", "left_hand", "right_hand")
TASK = "annotation.human.action.task_description"
TOLERANCE = 3e-6


def columns(vector: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The parts that the configuration reads, by name."""
    return {name: rows[..., MODALITY[vector][name]["start"] : MODALITY[vector][name]["end"]] for name in PARTS}


def make_set(folder) -> None:
    """The recorded rows under the demonstration's keys, in one episode, with two cameras of which one is read."""
    vector = {"observation.state": 44, "action": 44, TASK: 1, "annotation.human.validity": 1, "next.reward": 1}
    cameras = {"observation.images.egoview": "image", "observation.images.ego_view": "image"}
    write(folder, "v2.1", vector, cameras, lengths=(20,))
    edit_info(folder, codebase_version="v2.0", robot_type="GR1ArmsOnly")
    (folder / "meta/modality.json").write_text(json.dumps(MODALITY))

    def rows(table):
        for key, name in (("observation.state", "state"), ("action", "action")):
            table = with_column(table, key, vectors(STOCK[name]))
        return with_column(table, TASK, table["task_index"])

    (file,) = tables(folder)
    edit_table(file, rows)


def drawn(path: str, leaf) -> np.ndarray:
    """Random weights that depend on their name and shape alone, since a recording was made with them."""
    fan_in = leaf.shape[-2] if len(leaf.shape) > 1 else 100
    return (np.random.default_rng(zlib.crc32(path.encode())).standard_normal(leaf.shape) / fan_in**0.5).astype(
        np.float32
    )


def make_checkpoint(folder) -> None:
    """A toy that is as wide outside as the released model, in the form of a step of a run."""
    small = golden.architecture("ckpt_pruned").with_depths({"llm": 1, "vl": 1, "dit": 2, "vision": 1})
    wide = dataclasses.replace(small, state_dim=64, action_dim=32, embodiments=32)
    config = json.loads((GOLDEN / "ckpt_pruned/config.json").read_text())
    head = config["action_head_cfg"]
    config |= {"action_dim": 32, "action_horizon": 16}
    config["backbone_cfg"]["select_layer"] = 1
    head |= {"action_dim": 32, "max_state_dim": 64, "action_horizon": 16, "max_num_embodiments": 32}
    head["vl_self_attention_cfg"]["num_layers"], head["diffusion_model_cfg"]["num_layers"] = 1, 2
    policy = folder / "files/policy"
    policy.mkdir(parents=True)
    (policy / "config.json").write_text(json.dumps(config))
    (policy / "eagle").mkdir()
    for file in (GOLDEN / "eagle").iterdir():
        (policy / "eagle" / file.name).write_bytes(file.read_bytes())
    params = unflatten({path: drawn(path, leaf) for path, leaf in flatten(abstract_params(wide)).items()})
    write_params(folder / "ckpt", params, assets=epath.Path(folder / "files"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The set, a checkpoint, and a run of one step by the configuration's name."""
    folder = tmp_path_factory.mktemp("demonstration")
    make_set(folder / "set")
    make_checkpoint(folder)
    words = ["--checkpoint", folder / "ckpt", "--data", folder / "set", "--out", folder / "run", "--steps", "1"]
    words += ["--data-config", "fourier_gr1_arms_only", "--embodiment", "gr1", "--batch-size", "8", "--workers", "0"]
    assert main([str(word) for word in ("finetune", *words, "--evaluate-every", "0", "--holdout-ratio", "0")]) == 0
    return folder


def test_it_is_trained_on_and_served_as_stock_transforms_it(place):
    step = str(place / "run/0")
    conventions = conventions_of(read_spec(step).plan_record)
    assert conventions is not None
    assert conventions.config == "fourier_gr1_arms_only"
    assert conventions.robot is not None
    assert conventions.robot.task == TASK
    policy = make_policy(Serve(checkpoint=step, dtype="float32", max_batch=1), read_spec(step))
    request = {f"state.{name}": part for name, part in columns("state", STOCK["state"][0]).items()}
    request |= {"video.ego_view": STOCK["image"], "prompt": "pick the pear"}
    prepared = policy.prepare(request)
    np.testing.assert_allclose(prepared.inputs["state"][:52], STOCK["out/state"], atol=TOLERANCE)
    assert not prepared.inputs["state"][52:].any()
    assert prepared.inputs["embodiment_id"] == 24
    answer = policy.infer(request)["actions"]
    assert answer.shape == (16, 26)
    assert np.isfinite(answer).all()
    model = np.pad(STOCK["model"], [(0, 0), (0, 6)])
    found = policy.requests.actions(model, prepared.state)
    np.testing.assert_allclose(found, STOCK["robot"], atol=TOLERANCE)


def test_an_exported_folder_answers_as_in_nvidias_policy(place):
    folder, recorded = str(place / "export"), golden.recording("policy")
    assert main(["export", "--checkpoint", str(place / "run/0"), "--to", "groot", "--out", folder]) == 0
    policy = make_policy(Serve(checkpoint=folder, dtype="float32", max_batch=1), read_spec(folder))
    request = {f"state.{name}": part for name, part in columns("state", STOCK["state"][0]).items()}
    # NVIDIA's policy writes an instruction as a list of Python.
    request |= {"video.ego_view": STOCK["image"], "prompt": "['pick the pear']"}
    inputs = policy.prepare(request).inputs
    assert np.array_equal(inputs["tokenized_prompt"][inputs["tokenized_prompt_mask"]], recorded["tokenized_prompt"])
    answer = policy.infer(request, noise=recorded["noise"])["actions"]
    np.testing.assert_allclose(answer, recorded["actions"], atol=OUTPUT_TOLERANCE)


def test_a_steps_files_say_what_stock_code_asks_for(place):
    entry = json.loads((place / "run/0/assets/policy/experiment_cfg/metadata.json").read_text())["gr1"]
    assert entry["modalities"]["video"] == {"ego_view": {"resolution": [64, 48], "channels": 3, "fps": 10.0}}
    for vector in ("state", "action"):
        assert list(entry["statistics"][vector]) == list(PARTS)
        for name, part in columns(vector, STOCK[vector]).items():
            np.testing.assert_allclose(entry["statistics"][vector][name]["min"], part.min(axis=0), rtol=1e-6)
            assert entry["modalities"][vector][name]["shape"] == [part.shape[1]]


def test_its_pictures_are_stocks():
    difference = np.abs(resized(middle(STOCK["image"]), 224).astype(int) - STOCK["out/image"])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.002
