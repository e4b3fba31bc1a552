"""Our reader beside lerobot's own: the same rows, frames, chunks and tasks (lerobot 0.6.1, Python 3.12)."""

import numpy as np
import pytest

from clp_jax.data.lerobot import LeRobotData
from clp_jax.data.lerobot_meta import read_meta
from clp_jax.data.lerobot_writer import Recorded, png_of, write_lerobot
from clp_jax.data.proof import prove
from scripts.make_lerobot_toy import FPS, write

pytest.importorskip("lerobot", reason="needs lerobot")

COLUMNS = {"observation.state": 5, "action": 3}
CAMERAS = {"observation.video": "video", "observation.still": "image"}
HORIZON = 5


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def check_same(ours: LeRobotData, root, cameras=tuple(CAMERAS)) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    chunks = {"action": [step / FPS for step in range(HORIZON)]}
    theirs = LeRobotDataset("toy/toy", root=root, delta_timestamps=chunks, video_backend="pyav", return_uint8=True)
    assert len(ours) == len(theirs)
    state, action, task = ours.numbers("observation.state", "action", "task_index")
    for row in range(len(ours)):
        sample = theirs[row]
        rows, is_pad = ours.chunk(row, HORIZON)
        np.testing.assert_array_equal(state[row], sample["observation.state"].numpy())
        np.testing.assert_array_equal(action[rows], sample["action"].numpy())
        np.testing.assert_array_equal(is_pad, sample["action_is_pad"].numpy())
        assert ours.meta.tasks[int(task[row, 0])] == sample["task"]
        for camera in cameras:
            image = sample[camera].numpy()
            image = (image * 255).round().astype(np.uint8) if image.dtype != np.uint8 else image
            np.testing.assert_array_equal(ours.image(camera, row), image.transpose(1, 2, 0))


@pytest.mark.filterwarnings("default")
def test_v3_is_read_as_by_lerobot(offline, tmp_path):
    write(tmp_path / "toy", "v3.0", COLUMNS, CAMERAS)
    check_same(LeRobotData(read_meta(tmp_path / "toy")), tmp_path / "toy")


@pytest.mark.filterwarnings("default")
def test_v21_is_read_as_lerobot_reads_it_after_its_own_conversion(offline, tmp_path):
    from lerobot.scripts.convert_dataset_v21_to_v30 import convert_dataset

    root = tmp_path / "toy"
    write(root, "v2.1", COLUMNS, CAMERAS)
    convert_dataset("toy/toy", root=root, push_to_hub=False)
    assert read_meta(root).episodes[0].table.name.startswith("file-")  # converted in place
    for folder in (tmp_path / "toy_old", root):
        assert prove(LeRobotData(read_meta(folder)), columns=tuple(COLUMNS), cameras=tuple(CAMERAS)).notes == ()
    check_same(LeRobotData(read_meta(tmp_path / "toy_old")), root)
    check_same(LeRobotData(read_meta(root)), root)


@pytest.mark.filterwarnings("default")
def test_what_we_write_is_read_by_lerobot(offline, tmp_path):
    rng, camera = np.random.default_rng(0), "observation.image"
    episodes = [
        Recorded(
            task,
            {key: rng.standard_normal((length, d)).astype(np.float32) for key, d in COLUMNS.items()},
            {camera: [png_of(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)) for _ in range(length)]},
        )
        for task, length in (("open it", 20), ("close it", 3))
    ]
    write_lerobot(tmp_path, episodes, fps=FPS, robot_type="toy")
    check_same(LeRobotData(read_meta(tmp_path)), tmp_path, (camera,))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("use_videos", [True, False])
def test_what_lerobot_records_is_proven_without_a_note(offline, tmp_path, use_videos):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    camera, rng = "observation.image", np.random.default_rng(0)
    features = {key: {"dtype": "float32", "shape": (d,), "names": None} for key, d in COLUMNS.items()}
    features[camera] = {
        "dtype": "video" if use_videos else "image",
        "shape": (64, 96, 3),
        "names": ["height", "width", "channels"],
    }
    root = tmp_path / "toy"
    recorded = LeRobotDataset.create("toy/toy", 30, features, root=root, use_videos=use_videos)
    for task, length in (("open it", 40), ("close it", 3), ("open it", 61)):
        for _ in range(length):
            frame = {key: rng.standard_normal(d).astype(np.float32) for key, d in COLUMNS.items()}
            recorded.add_frame(frame | {camera: rng.integers(0, 256, (64, 96, 3)).astype(np.uint8), "task": task})
        recorded.save_episode()
    recorded.finalize()
    proof = prove(LeRobotData(read_meta(root)), columns=tuple(COLUMNS), cameras=(camera,))
    assert proof.notes == ()
    assert list(proof.pictures) == [camera]
