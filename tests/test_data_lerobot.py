"""LeRobot folders: what is in them comes out, and what is wrong with them is said in one line."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toys
from recordings import GOLDEN

from clp_jax.data import open_dataset
from clp_jax.data.lerobot import LeRobotData
from clp_jax.data.lerobot_meta import find_folder, read_meta
from clp_jax.errors import InputError
from clp_jax.models.pi0.robots import LIBERO
from clp_jax.processing.robots import Robot
from clp_jax.processing.tokenizer import load_tokenizer
from scripts.make_lerobot_toy import FPS, LENGTHS, TASKS, write

COLUMNS = {"observation.state": 5, "action": 3}
CAMERAS = {"observation.video": "video", "observation.still": "image"}
ROBOT = Robot("toy", {"base_0_rgb": "observation.video", "left_wrist_0_rgb": "observation.still"})
ARCH = dataclasses.replace(toys.architecture("pi05"), vocab_size=512)
COMPRESSION = 12
"""Levels of 255 by which h264 at this quality and 4:2:0 changes the toy's pictures; neighbouring frames differ by 8."""


@pytest.fixture(scope="module", params=["v2.1", "v3.0"])
def stored(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lerobot") / "toy"
    return folder, write(folder, request.param, COLUMNS, CAMERAS)


@pytest.fixture(scope="module")
def opened(stored):
    return LeRobotData(read_meta(stored[0])), stored[1]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GOLDEN / "tokenizer/tiny_spm.model")


@pytest.fixture
def copy(stored, tmp_path):
    return Path(shutil.copytree(stored[0], tmp_path / "copy"))


def test_numbers_tasks_and_episodes_come_out(opened):
    data, truth = opened
    assert len(data) == sum(LENGTHS)
    for key in (*COLUMNS, "timestamp", "task_index"):
        np.testing.assert_array_equal(data.numbers(key)[0], truth[key].reshape(len(data), -1))
    np.testing.assert_array_equal(data.episodes, truth["episode_index"])
    assert dict(data.meta.tasks) == dict(enumerate(TASKS))
    assert data.meta.fps == FPS


def test_every_frame_is_its_own(opened):
    data, truth = opened
    for row in np.random.default_rng(0).permutation(len(data)).tolist():
        np.testing.assert_array_equal(data.image("observation.still", row), truth["observation.still"][row])
        decoded = data.image("observation.video", row).astype(int)
        assert np.abs(decoded - truth["observation.video"][row]).mean() < 2
        distances = np.abs(decoded - truth["observation.video"].astype(int)).mean(axis=(1, 2, 3))
        assert distances.argmin() == row


def test_chunks_are_held_at_the_end_of_the_episode(opened):
    data, _ = opened
    rows, is_pad = data.chunk(LENGTHS[0] - 2, 4)
    assert rows.tolist() == [5, 6, 6, 6]
    assert is_pad.tolist() == [False, False, True, True]
    assert data.chunk(LENGTHS[0], 2)[0].tolist() == [7, 8]


def test_version_2_0_is_read_like_2_1(stored, copy):
    info = json.loads((copy / "meta/info.json").read_text())
    if info["codebase_version"] != "v2.1":
        return
    edit_info(copy, codebase_version="v2.0")
    assert len(LeRobotData(read_meta(copy))) == sum(LENGTHS)


def test_observations_follow_the_table(stored, tokenizer):
    folder, truth = stored
    data = open_dataset(folder, ARCH, robot=ROBOT, tokenizer=tokenizer, action_horizon=4, hold_out_ratio=0.34)
    assert (data.action_dim, data.asset_id, len(data.fingerprint)) == (3, "toy", 64)
    held = data.held_out()
    assert held is not None
    assert len(np.unique(held.episodes)) == 1
    everything = data.calibration()
    assert len(everything) + len(held) == sum(LENGTHS)
    arrays, stats = everything.arrays, data.norm_stats
    assert stats is not None
    row = data.rows[3]
    action = truth["action"][data.read(np.array([row]))["action_is_pad"][0].argmin() + row]
    normal = (action - stats["actions"].q01) / (stats["actions"].q99 - stats["actions"].q01 + 1e-6) * 2 - 1
    np.testing.assert_allclose(arrays["actions"][3, 0, :3], normal, rtol=1e-5)
    assert not arrays["actions"][..., 3:].any()
    assert arrays["image_mask/left_wrist_0_rgb"].all()
    assert everything.cameras == data.cameras == ("base_0_rgb", "left_wrist_0_rgb")
    assert {arrays["time"].dtype, arrays["noise"].dtype, arrays["state"].dtype} == {np.dtype("float32")}


def test_threads_read_what_one_reads(stored, tokenizer):
    data = open_dataset(stored[0], ARCH, robot=ROBOT, tokenizer=tokenizer, action_horizon=4)
    alone, threads = data.batches(4, workers=0), data.batches(4, workers=3)
    for _ in range(8):
        one, other = next(alone), next(threads)
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_a_prompt_replaces_the_tasks(stored, tokenizer):
    pi0 = dataclasses.replace(toys.architecture("pi0"), vocab_size=512)
    own = open_dataset(stored[0], pi0, robot=ROBOT, tokenizer=tokenizer, prompt="go", max_token_len=9)
    ids = own.read(np.arange(20))["tokenized_prompt"]
    assert ids.shape == (20, 9)
    assert (ids == ids[0]).all()
    silent = dataclasses.replace(ROBOT, prompt="", prompt_from_task=False)
    empty = open_dataset(stored[0], pi0, robot=silent, tokenizer=tokenizer, max_token_len=9).read(np.arange(1))
    np.testing.assert_array_equal(empty["tokenized_prompt"][0], tokenizer("", 9)[0])
    tasks = open_dataset(stored[0], pi0, robot=ROBOT, tokenizer=tokenizer).read(np.array([0, 7]))["tokenized_prompt"]
    for found, task in zip(tasks, TASKS, strict=True):
        np.testing.assert_array_equal(found, tokenizer(task, 48)[0])


def edit_info(folder: Path, **changes) -> None:
    info = json.loads((folder / "meta/info.json").read_text())
    (folder / "meta/info.json").write_text(json.dumps(info | changes))


def first(folder: Path, pattern: str) -> Path:
    return min(folder.glob(pattern))


def cut(folder: Path, pattern: str) -> None:
    file = first(folder, pattern)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def edit_table(folder: Path, change) -> None:
    file = first(folder, "data/*/*.parquet")
    pq.write_table(change(pq.read_table(file)), file)


def with_nan(table):
    values = table.column("action").combine_chunks().flatten().to_numpy().copy()
    values[0] = np.nan
    return table.set_column(
        table.schema.get_field_index("action"), "action", pa.FixedSizeListArray.from_arrays(pa.array(values), 3)
    )


BROKEN = {
    "of version v9.9; v2.0, v2.1, v3.0 are read": lambda f: edit_info(f, codebase_version="v9.9"),
    "not as LeRobot .* writes it": lambda f: edit_info(f, features=None),
    "info.* is no valid JSON": lambda f: (f / "meta/info.json").write_text("{"),
    "lacks 1 of the .* files of its meta; first .*mp4": lambda f: first(f, "videos/**/*.mp4").unlink(),
    "lacks 1 of the .* files of its meta; first .*parquet": lambda f: first(f, "data/**/*.parquet").unlink(),
    "cannot be read, it is cut off or damaged": lambda f: cut(f, "data/**/*.parquet"),
    "has 6 rows, its episodes have 7|has 10 rows, its episodes have 11": lambda f: edit_table(f, lambda t: t.slice(1)),
    "column action of .* holds nan in row 0, dimension 0; repair": lambda f: edit_table(f, with_nan),
    "has no column action; it has": lambda f: edit_table(f, lambda t: t.drop_columns(["action"])),
    "row 0 of .* is of episode": lambda f: edit_table(
        f,
        lambda t: t.take(list(range(len(t)))[::-1]).set_column(
            t.schema.get_field_index("episode_index"), "episode_index", [[5] * len(t)]
        ),
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_data_set_is_refused_before_any_batch(copy, tokenizer, message):
    BROKEN[message](copy)
    with pytest.raises(InputError, match=message) as caught:
        open_dataset(copy, ARCH, robot=ROBOT, tokenizer=tokenizer)
    assert "\n" not in str(caught.value)


def shorten(folder: Path) -> None:
    """A video of another length than the table says."""
    source, target = max(folder.glob("videos/**/*.mp4")), first(folder, "videos/**/*.mp4")
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for i, frame in zip(range(2), old.decode(video=0), strict=False):
            frame.pts = i
            new.mux(stream.encode(frame))
        new.mux(stream.encode())


def with_broken_png(table):
    column = [{"bytes": b"no picture", "path": None}] * len(table)
    return table.set_column(table.schema.get_field_index("observation.still"), "observation.still", [column])


BROKEN_IMAGES = {
    "episode 0, observation.video: .*cannot be decoded": lambda f: cut(f, "videos/**/*.mp4"),
    "episode 0, frame 1, observation.video: .* has no frame at 0.100 s": shorten,
    "episode 0, frame 0, observation.still: .*broken image": lambda f: edit_table(f, with_broken_png),
}


@pytest.mark.parametrize("message", BROKEN_IMAGES)
def test_broken_image_names_its_episode_and_file_before_any_batch(copy, tokenizer, message):
    BROKEN_IMAGES[message](copy)
    with pytest.raises(InputError, match=message) as caught:
        open_dataset(copy, ARCH, robot=ROBOT, tokenizer=tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"robot": None}, "say which robot"),
        ({"robot": LIBERO}, r"no state, actions, image, wrist_image, which robot 'libero' reads; it has .*float32 5"),
        ({"robot": Robot("x", {"base_0_rgb": "action"})}, "action of .* is no image, but base_0_rgb"),
        ({"robot": dataclasses.replace(ROBOT, action_dim=7)}, "has 3 dimensions, robot 'toy' 7"),
        ({"robot": dataclasses.replace(ROBOT, delta=(True,) * 4)}, "fewer than robot 'toy' converts"),
        (
            {"robot": ROBOT, "max_token_len": 3, "long_prompts": "refuse"},
            r"more than 3 \(too long are 2 prompts\); give a larger --max-token-len",
        ),
    ],
)
def test_robot_that_does_not_fit_is_refused(stored, tokenizer, settings, message):
    with pytest.raises(InputError, match=message):
        open_dataset(stored[0], ARCH, tokenizer=tokenizer, **settings)


def test_prompts_that_are_too_long_are_cut_and_named(stored, tokenizer):
    """π0.5 spells the robot's five numbers of state, not the model's padding."""
    settings = {"robot": ROBOT, "tokenizer": tokenizer, "action_horizon": 2}
    tokens = max(len(tokenizer.encode(text, np.zeros(5))) for text in TASKS)
    assert open_dataset(stored[0], ARCH, **settings, max_token_len=tokens, long_prompts="refuse").notes == ()
    cut = open_dataset(stored[0], ARCH, **settings, max_token_len=tokens - 1)
    assert [note.partition("; a larger")[0] for note in cut.notes] == [
        f"the prompt {text!r} has {tokens} tokens, more than {tokens - 1}: the rest is cut, as upstream does"
        for text in TASKS
        if len(tokenizer.encode(text, np.zeros(5))) == tokens
    ]
    assert cut.read(cut.rows)["tokenized_prompt"].shape[1] == tokens - 1


def test_folder_that_is_no_data_set_and_hub_out_of_reach_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="it has no meta"):
        find_folder(tmp_path)
    with pytest.raises(InputError, match=r"there is no folder .*; give the folder of a LeRobot data set or its hub id"):
        find_folder(tmp_path / "absent")
    (tmp_path / "data.npz").touch()
    with pytest.raises(InputError, match=r"data.npz is a file; a LeRobot data set is a folder"):
        find_folder(tmp_path / "data.npz")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        find_folder("nobody/nothing")
