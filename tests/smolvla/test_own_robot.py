"""What a SmolVLA's own files say of its robot: cameras, tokenizer, statistics, and a data set that needs no flag."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import recordings
import toys
from etils import epath
from smolvla_recordings import CAMERAS, GOLDEN, architecture, recording

from clp_jax.commands.data_flags import stats_of_checkpoint
from clp_jax.data import open_dataset
from clp_jax.data.lerobot_writer import Recorded, png_of, write_lerobot
from clp_jax.errors import InputError
from clp_jax.models import smolvla
from clp_jax.models.family import Lengths
from clp_jax.models.smolvla.processing import Processing
from clp_jax.processing.robots import Robot, find_robot
from clp_jax.processing.tokenizer import load_tokenizer

CKPT = epath.Path(GOLDEN / "ckpt")
TASKS = ("pick up the red cube and put it into the drawer", "push", "open the left door")
ROUNDING = 1e-6
"""lerobot normalises in float32, we in float64; values are below 10."""


@pytest.fixture(scope="module")
def tokenizer():
    return smolvla.load_tokenizer(architecture(), None, CKPT)


def processing(tokenizer, robot: Robot | None = None, **changes) -> Processing:
    sizes = dataclasses.replace(architecture(), **changes)
    stats = smolvla.norm_stats_of(CKPT)
    assert stats is not None
    return smolvla.processing(sizes, robot or smolvla.own_robot(sizes), stats, tokenizer, Lengths(7, 24))


def observation(row: int) -> dict:
    with np.load(GOLDEN / "images_u8.npz") as archive:
        images = {f"observation.images.{camera}": archive[camera][row] for camera in CAMERAS}
    g = recording()
    return {"state": g["raw_state"][row], "actions": g["raw_actions"][row], "images": images, "prompt": TASKS[row]}


def test_images_stay_as_the_cameras_give_them(tokenizer):
    given = observation(0)
    found = processing(tokenizer).inputs(**given)
    floats = {camera: (image / np.float32(255)).transpose(2, 0, 1) for camera, image in given["images"].items()}
    again = processing(tokenizer).inputs(**given | {"images": floats})
    for camera, image in given["images"].items():
        assert np.array_equal(found[f"image/{camera}"], image)
        assert np.array_equal(again[f"image/{camera}"], image)
        assert found[f"image_mask/{camera}"]


def test_long_prompts_are_cut_and_a_line_break_is_added_once(tokenizer):
    ids, mask = tokenizer(TASKS[0], 5)
    assert mask.all()
    assert np.array_equal(ids, recording()["tokens"][0][:5])
    assert np.array_equal(tokenizer("push\n", 24)[0], recording()["tokens"][1])


def test_the_pad_id_is_never_guessed(tmp_path):
    shutil.copy(GOLDEN / "vlm/tokenizer.json", tmp_path)
    with pytest.raises(InputError, match="padding token"):
        smolvla.load_tokenizer(architecture(), str(tmp_path), None)
    shutil.copy(GOLDEN / "vlm/config.json", tmp_path)
    assert smolvla.load_tokenizer(architecture(), str(tmp_path / "tokenizer.json"), None)("push", 9)[0][-1] == 2
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "<image>"}}))
    assert smolvla.load_tokenizer(architecture(), str(tmp_path), None)("push", 9)[0][-1] == 3


def test_a_tokenizer_is_found_or_asked_for(tmp_path):
    for name, where in (("inside", "step/vlm"), ("beside", "vlm")):
        folder = tmp_path / name
        (folder / "step").mkdir(parents=True)
        shutil.copy(GOLDEN / "ckpt/config.json", folder / "step")
        with pytest.raises(InputError, match="--tokenizer"):
            smolvla.load_tokenizer(architecture(), None, epath.Path(folder / "step"))
        shutil.copytree(GOLDEN / "vlm", folder / where)
        assert smolvla.load_tokenizer(architecture(), None, epath.Path(folder / "step"))("push", 9)[0][-1] == 2
    with pytest.raises(InputError, match="there is no tokenizer"):
        smolvla.load_tokenizer(architecture(), str(tmp_path / "none.json"), None)
    (tmp_path / "broken.json").write_text('{"model": {"vocab": {}}')
    with pytest.raises(InputError, match="no readable"):
        smolvla.load_tokenizer(architecture(), str(tmp_path / "broken.json"), None)


def test_the_statistics_are_the_policys(tmp_path):
    found, name = stats_of_checkpoint(CKPT, None, architecture())
    assert name is None
    assert found is not None
    assert found["state"].mean.shape == (6,)
    shutil.copytree(CKPT, tmp_path / "policy")
    again, _ = stats_of_checkpoint(epath.Path(tmp_path), None, architecture())
    assert again is not None
    assert np.array_equal(again["actions"].std, found["actions"].std)
    file = tmp_path / "policy/policy_preprocessor_step_5_normalizer_processor.safetensors"
    file.unlink()
    with pytest.raises(InputError, match="copy it there"):
        stats_of_checkpoint(epath.Path(tmp_path), None, architecture())
    (tmp_path / "policy/policy_preprocessor.json").unlink()
    assert stats_of_checkpoint(epath.Path(tmp_path), None, architecture()) == (None, None)


def test_a_data_set_of_the_checkpoints_robot_is_read_without_naming_one(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    sizes = {"top": (120, 160), "wrist": (128, 128), "other": (96, 80)}
    pictures = {camera: rng.integers(0, 256, (4, *size, 3)).astype(np.uint8) for camera, size in sizes.items()}
    vectors = {
        "observation.state": rng.standard_normal((4, 6)).astype(np.float32),
        "action": rng.standard_normal((4, 8)).astype(np.float32),
    }
    images = {f"observation.images.{camera}": [png_of(p) for p in shots] for camera, shots in pictures.items()}
    write_lerobot(tmp_path, [Recorded("push", vectors, images)], fps=10, robot_type="toy")
    robot = find_robot(
        None,
        {},
        cameras=smolvla.camera_names(architecture()),
        start=smolvla.own_robot(architecture()),
        images=["observation.images.side=observation.images.other"],
    )
    stats = smolvla.norm_stats_of(CKPT)
    data = open_dataset(tmp_path, architecture(), robot=robot, tokenizer=tokenizer, norm_stats=stats)
    batch = data.read(np.array([2]))
    for camera, source in (("top", "top"), ("wrist", "wrist"), ("side", "other")):
        assert np.array_equal(batch[f"image/observation.images.{camera}"][0], pictures[source][2])
    assert stats is not None
    expected = (vectors["action"][3] - stats["actions"].mean) / (stats["actions"].std + 1e-8)
    np.testing.assert_allclose(batch["actions"][0, 1, :8], expected, rtol=0, atol=ROUNDING)
    assert batch["action_is_pad"][0].tolist() == [False, False, *[True] * 5]
    assert np.array_equal(batch["tokenized_prompt"][0], recording()["tokens"][1])


def test_a_robot_without_state_is_refused(tokenizer):
    with pytest.raises(InputError, match="robot 'blind' has no state, which a SmolVLA reads"):
        processing(tokenizer, Robot("blind", {"observation.images.top": "top"}, state=()))


def test_pictures_of_several_sizes_are_refused_before_a_batch(tmp_path, tokenizer):
    """A SmolVLA resizes a whole batch; π0's processing resizes each picture."""
    cameras = smolvla.camera_names(architecture())

    def episode(size):
        vectors = {"observation.state": np.ones((2, 6), np.float32), "action": np.ones((2, 8), np.float32)}
        return Recorded("push", vectors, dict.fromkeys(cameras, [png_of(np.zeros((*size, 3), np.uint8))] * 2))

    write_lerobot(tmp_path, [episode((32, 48)), episode((40, 40))], fps=10, robot_type="toy")
    settings = {"tokenizer": tokenizer, "norm_stats": smolvla.norm_stats_of(CKPT)}
    robot = smolvla.own_robot(architecture())
    with pytest.raises(
        InputError, match=r"pictures of 32x48 and 40x40 .height x width., and this model reads one size"
    ):
        open_dataset(tmp_path, architecture(), robot=robot, **settings)
    assert len(open_dataset(tmp_path, architecture(), robot=robot, episodes=["!1"], **settings)) == 2
    pi05 = dataclasses.replace(toys.architecture("pi05"), vocab_size=512, action_dim=8)
    own = Robot("own", {"base_0_rgb": cameras[0]})
    prompts = load_tokenizer(recordings.GOLDEN / "tokenizer/tiny_spm.model")
    data = open_dataset(tmp_path, pi05, robot=own, tokenizer=prompts, action_horizon=2)
    assert data.read(data.rows)["image/base_0_rgb"].shape[0] == 4
