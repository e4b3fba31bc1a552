"""What lerobot's processors made of the recorded observations, and what they made of its actions."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from etils import epath
from smolvla_recordings import CAMERAS, GOLDEN, architecture, inputs, recording

from clp_jax.data import open_dataset
from clp_jax.errors import InputError
from clp_jax.models import smolvla
from clp_jax.processing import policy_files
from clp_jax.processing.norm_stats import NormStats

TASKS = ("pick up the red cube and put it into the drawer", "push", "open the left door")
CKPT = epath.Path(GOLDEN / "ckpt")
NORMALISED_TOLERANCE = 2e-6
"""lerobot computes in float32, on values up to 5."""
UNITS_TOLERANCE = 5e-6
"""The same for values in units, which the statistics make larger."""


@pytest.fixture(scope="module")
def processing():
    pytest.importorskip("tokenizers")
    a = architecture()
    stats = smolvla.norm_stats_of(CKPT)
    assert stats is not None
    tokenizer = smolvla.load_tokenizer(a, None, CKPT)
    return smolvla.processing(a, smolvla.own_robot(a), stats, tokenizer, smolvla.lengths(a))


def observation(row: int) -> dict:
    with np.load(GOLDEN / "images_u8.npz") as archive:
        images = {f"observation.images.{camera}": archive[camera][row] for camera in CAMERAS}
    return {"state": recording()["raw_state"][row], "images": images, "prompt": TASKS[row]}


@pytest.mark.parametrize("row", range(3))
def test_inputs_are_lerobots(processing, row):
    g = recording()
    found = processing.inputs(**observation(row), actions=g["raw_actions"][row])
    assert np.array_equal(found["tokenized_prompt"], g["tokens"][row])
    assert np.array_equal(found["tokenized_prompt_mask"], g["token_mask"][row])
    np.testing.assert_allclose(found["state"][:6], g["state"][row], rtol=0, atol=NORMALISED_TOLERANCE)
    np.testing.assert_allclose(found["actions"][:, :8], g["actions"][row], rtol=0, atol=NORMALISED_TOLERANCE)
    assert found["state"].shape == (9,)
    assert found["actions"].shape == (7, 11)
    assert not found["state"][6:].any()
    assert not found["actions"][:, 8:].any()
    for camera in CAMERAS:
        name = f"observation.images.{camera}"
        assert np.array_equal(found[f"image/{name}"], observation(row)["images"][name])


def test_outputs_are_lerobots(processing):
    g = recording()
    for padded, wanted in zip(g["sampled_padded"], g["actions_unnormalised"], strict=True):
        found = processing.outputs(padded, state=g["raw_state"][0])
        np.testing.assert_allclose(found, wanted, rtol=0, atol=UNITS_TOLERANCE)


def test_a_long_prompt_is_cut_as_in_lerobot(processing):
    ids, mask = processing.tokenizer(TASKS[0], 5)
    assert np.array_equal(ids, recording()["tokens"][0, :5])
    assert mask.all()
    ends, _ = processing.tokenizer(f"{TASKS[1]}\n", 24)
    assert np.array_equal(ends, recording()["tokens"][1])


def test_what_is_not_normalised_stays(processing):
    plain = dataclasses.replace(
        processing, architecture=dataclasses.replace(architecture(), as_they_are=("state", "actions"))
    )
    state = plain.inputs(**observation(0))["state"]
    np.testing.assert_array_equal(state[:6], recording()["raw_state"][0].astype(np.float32))


def test_a_robot_with_delta_actions_or_other_dimensions_is_refused(processing):
    robot = dataclasses.replace(processing.robot, delta=(True,))
    with pytest.raises(InputError, match="delta"):
        dataclasses.replace(processing, robot=robot)
    robot = dataclasses.replace(processing.robot, state_modes=("min_max",))
    with pytest.raises(InputError, match="state_modes, action_modes or a processor, of which a smolvla knows none"):
        dataclasses.replace(processing, robot=robot)
    with pytest.raises(InputError, match=r"actions have 7 dimensions, config.json .* says 8"):
        processing.check_dims(6, 7)


def test_a_checkpoint_without_a_tokenizer_says_what_to_give(tmp_path):
    shutil.copy(GOLDEN / "ckpt" / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"tokenizer.json .*--tokenizer"):
        smolvla.load_tokenizer(architecture(), None, epath.Path(tmp_path))
    with pytest.raises(InputError, match="there is no tokenizer"):
        smolvla.load_tokenizer(architecture(), str(tmp_path), None)


def test_side_files_carry_new_statistics_and_depths(tmp_path):
    stats = {name: NormStats(np.full(n, 2.0), np.full(n, 3.0)) for name, n in (("state", 6), ("actions", 8))}
    files = smolvla.side_files(
        CKPT,
        norm_stats=stats,
        depths={"vlm": 6, "action": 6, "vision": 3},
        image_sizes={"observation.images.top": (48, 64)},
    )
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_vlm_layers"] == 6
    assert config["input_features"]["observation.images.top"]["shape"] == [3, 48, 64]
    found = smolvla.norm_stats_of(epath.Path(tmp_path))
    assert found is not None
    assert found["actions"].std.tolist() == [3.0] * 8
    after = policy_files.read_vectors(
        epath.Path(tmp_path / "policy_postprocessor_step_0_unnormalizer_processor.safetensors")
    )
    assert after["action.mean"].tolist() == [2.0] * 8
    assert "action.max" not in after
    assert {"vlm/config.json", "vlm/tokenizer.json", "vlm/tokenizer_config.json"} <= files.keys()


@pytest.mark.parametrize("padded", [True, False])
def test_observations_of_which_no_action_counts_are_refused(tmp_path, padded):
    arrays = {key: value for key, value in inputs().items() if key not in ("noise", "time")}
    arrays["action_is_pad"] = np.ones_like(arrays["action_is_pad"])
    arrays["action_is_pad"][0, 0] = padded
    np.savez(tmp_path / "data.npz", **arrays)
    if not padded:
        assert len(open_dataset(tmp_path / "data.npz", architecture()).rows) == 3
        return
    with pytest.raises(InputError, match="action_is_pad leave no action of any observation"):
        open_dataset(tmp_path / "data.npz", architecture())
