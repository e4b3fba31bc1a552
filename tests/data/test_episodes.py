"""Episodes are kept or left out by number; of those that are left out nothing is read and nothing asked."""

import dataclasses

import lerobot_sets as sets
import numpy as np
import pyarrow as pa
import pytest
import toys
from lerobot_sets import ACTION, STATE, STILL, VIDEO, vector
from recordings import GOLDEN

from clp_jax.cli import main
from clp_jax.commands.data_flags import DataFlags, open_data
from clp_jax.data import open_dataset
from clp_jax.data.episodes import chosen
from clp_jax.data.recording import open_recording
from clp_jax.errors import InputError
from clp_jax.processing.robots import Robot
from scripts.make_lerobot_toy import LENGTHS, write

ROBOT = Robot("toy", {"base_0_rgb": VIDEO, "left_wrist_0_rgb": STILL})
CAMERAS = {VIDEO: "video", STILL: "image"}
ARCH = dataclasses.replace(toys.architecture("pi05"), vocab_size=512)
SPM = str(GOLDEN / "tokenizer/tiny_spm.model")


@pytest.fixture(scope="module", params=sets.VERSIONS)
def stored(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("episodes") / "set"
    return folder, write(folder, request.param, {STATE: 5, ACTION: 3}, CAMERAS)


@pytest.fixture
def folder(stored, tmp_path):
    return sets.copied(stored[0], tmp_path / "set")


@pytest.mark.parametrize(
    ("text", "stay"),
    [
        ("0:2", [0, 1]),
        ("4,0", [0, 4]),
        ("3:", [3, 4]),
        (":", [0, 1, 2, 3, 4]),
        (" :1 , 4 ", [0, 4]),
        ("!1", [0, 2, 3, 4]),
        ("!:3,4", [3]),
        ("2:99", [2, 3, 4]),
    ],
)
def test_numbers_and_ranges_choose(text, stay):
    assert sorted(chosen(text, range(5))) == stay


@pytest.mark.parametrize("text", ["", "a", "1-3", "1:2:3", "!", "0 1", "-1", "1,,2", "0:!2"])
def test_what_is_no_choice_is_refused(text):
    with pytest.raises(InputError, match=r"cannot be read; write numbers and ranges as 0:100,120"):
        chosen(text, range(5))


@pytest.mark.parametrize(
    ("text", "message"),
    [("5", "no episode 5; there are 5, 0 to 4"), ("3:3", "no episode 3:3"), ("!7:", "7:"), ("!:", "leaves no episode")],
)
def test_a_choice_of_nothing_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        chosen(text, range(5))


@pytest.mark.parametrize("text", ["!0", "!1", "!2", "1"])
def test_rows_and_pictures_of_the_others_stay_their_own(stored, text):
    folder, truth = stored
    recorded = open_recording(folder, ROBOT, episodes=text)
    rows = np.flatnonzero(np.isin(truth["episode_index"], sorted(chosen(text, range(len(LENGTHS))))))
    np.testing.assert_array_equal(recorded.episodes, truth["episode_index"][rows])
    np.testing.assert_array_equal(recorded.state, truth[STATE][rows])
    assert recorded.proof.notes == ()
    for row, original in enumerate(rows):
        np.testing.assert_array_equal(recorded.data.image(STILL, row), truth[STILL][original])
        assert np.abs(recorded.data.image(VIDEO, row).astype(int) - truth[VIDEO][original]).mean() < 2


def nan_in(episode):
    def damage(folder):
        for file in sets.tables(folder):
            sets.edit_table(file, lambda table: with_nan(table, episode))

    return damage


def with_nan(table, episode):
    values = table.column(STATE).combine_chunks().flatten().to_numpy().reshape(len(table), -1).copy()
    values[table.column("episode_index").to_numpy() == episode, 2] = np.nan
    return sets.with_column(table, STATE, sets.vectors(values))


def broken_picture_in(episode):
    def broken(table):
        owners, stored = table.column("episode_index").to_pylist(), table.column(STILL).to_pylist()
        changed = [
            {"bytes": b"x", "path": None} if owner == episode else one
            for owner, one in zip(owners, stored, strict=True)
        ]
        return sets.with_column(table, STILL, pa.array(changed))

    return lambda folder: [sets.edit_table(file, broken) for file in sets.tables(folder)]


def without_rows_of_1(episodes):
    return [episode | {"length": 0} if episode["episode_index"] == 1 else episode for episode in episodes]


DAMAGES = {
    "a number": (2, vector(ACTION, lambda values: values * np.inf)),
    "a number beside others": (1, nan_in(1)),
    "a time": (2, sets.counter("timestamp", lambda times: 3 * times)),
    "a task": (2, sets.counter("task_index", lambda tasks: tasks + 9)),
    "a picture": (2, sets.pictures(STILL, lambda _: b"no picture")),
    "a picture beside others": (1, broken_picture_in(1)),
    "a video": (2, lambda folder: max(folder.glob("videos/**/*.mp4")).unlink()),
    "a table": (2, lambda folder: sets.last_table(folder).unlink()),
    "a length": (1, lambda folder: sets.edit_episodes(folder, without_rows_of_1)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_wrong_with_an_episode_that_is_left_out_does_not_matter(folder, name, capsys):
    episode, damage = DAMAGES[name]
    damage(folder)
    if name == "a length":  # the totals of info.json are those of the whole set
        sets.edit_info(folder, total_frames=sum(LENGTHS) - LENGTHS[1])
    robot = ["--image", f"base_0_rgb={VIDEO}", f"left_wrist_0_rgb={STILL}"]
    assert main(["check", "--data", str(folder), *robot]) == 2
    assert main(["check", "--data", str(folder), *robot, "--episodes", f"!{episode}"]) == 0, capsys.readouterr().out
    assert main(["check", "--data", str(folder), "--episodes", f"!{episode}"]) == 0


def test_lost_lines_are_found_beside_a_choice(folder):
    sets.edit_episodes(folder, lambda episodes: episodes[:-1])
    with pytest.raises(InputError, match="total_episodes 3, the list of episodes has 2: lines were lost"):
        open_recording(folder, ROBOT, episodes="0")


def opened(folder, *episodes, **flags):
    flags = {"image": (f"base_0_rgb={STILL}",), "tokenizer": SPM, "action_horizon": 2} | flags
    config = DataFlags(episodes=episodes, **flags)
    return open_data(config, str(folder), ARCH, assets=None, hold_out_ratio=0.5, seed=0)


def test_statistics_hold_out_and_identity_are_of_what_is_kept(stored):
    folder, truth = stored
    data = opened(folder, "!2")
    kept = truth[STATE][truth["episode_index"] < 2]
    np.testing.assert_allclose(data.norm_stats["state"].mean, kept.mean(axis=0, dtype=np.float64), atol=1e-7)
    assert len(data.rows) + len(data.held) == len(kept)
    assert data.fingerprint == opened(folder, "0:2").fingerprint != opened(folder).fingerprint
    assert data.pictures != opened(folder).pictures


def test_norm_stats_are_of_what_is_kept(stored, tmp_path, capsys):
    flags = ["--data", str(stored[0]), "--image", f"base_0_rgb={STILL}", "--out", str(tmp_path / "stats")]
    assert main(["norm-stats", *flags, "--episodes", "0:2"]) == 0
    assert "11 rows of 2 episodes" in capsys.readouterr().out
    assert main(["norm-stats", *flags, "--overwrite", "--episodes", "0", "1"]) == 2
    assert "--episodes has 2 values for 1 data sets; give one for each" in capsys.readouterr().err


def test_model_ready_observations_are_chosen_by_their_episodes(tmp_path):
    arch = toys.architecture()
    np.savez(tmp_path / "d.npz", **toys.data(arch, 12, per_episode=3).arrays)
    data = open_dataset(tmp_path / "d.npz", arch, episodes=["!1"])
    assert np.unique(data.episodes).tolist() == [0, 2, 3]
    assert len(data) == len(data.read(data.rows)["state"]) == 9
