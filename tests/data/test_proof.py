"""Damage is refused before training, in one line that names where; what is odd and unread is not."""

import json
import shutil

import lerobot_sets as sets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_sets import ACTION, STATE, STILL, VIDEO, counter, proven, vector

from clp_jax.data.lerobot import LeRobotData
from clp_jax.data.lerobot_meta import read_meta
from clp_jax.data.proof.rows import timestamp_tolerance
from clp_jax.errors import InputError
from scripts.make_lerobot_toy import TASKS


@pytest.fixture(scope="module", params=sets.VERSIONS)
def sound(request, tmp_path_factory):
    return sets.make(tmp_path_factory.mktemp("sound") / "set", request.param)


@pytest.fixture
def folder(sound, tmp_path):
    return sets.copied(sound, tmp_path / "set")


def test_a_sound_set_is_proven_without_a_word(sound):
    proof = proven(sound)
    assert proof.notes == ()
    assert set(proof.pictures) == {VIDEO, STILL}


def test_a_second_proof_finds_the_same(sound):
    data = LeRobotData(read_meta(sound))
    first = sets.prove(data, columns=(STATE, ACTION), cameras=(VIDEO, STILL))
    assert sets.prove(data, columns=(STATE, ACTION), cameras=(VIDEO, STILL)) == first


def at(row, value):
    def change(values):
        values[row] = value
        return values

    return change


def restart(values):
    """A second take from row 5 on."""
    return np.concatenate([values[:5], values[:4]])


def two_takes(folder):
    counter("timestamp", restart)(folder)
    counter("frame_index", restart)(folder)


def swap(folder):
    sets.edit_table(sets.last_table(folder), lambda t: t.take([0, 1, 2, 4, 3, 5, 6, 7, 8]))


def all_of_five(folder):
    sets.edit_table(
        sets.last_table(folder), lambda t: sets.with_column(t, "episode_index", pa.array([5] * len(t), pa.int64()))
    )


def twice(folder):
    sets.edit_table(sets.last_table(folder), lambda t: t.append_column(ACTION, t.column(ACTION)))


def typed(key, values):
    return lambda folder: sets.edit_table(
        sets.last_table(folder), lambda t: sets.with_column(t, key, pa.array(values[: len(t)]))
    )


DAMAGE = {
    r"episode 2, row 5 \(row 5 of .*parquet\): frame_index goes from 4 to 0; rows are missing": two_takes,
    r"episode 2, row 5 .*: timestamp goes from 0.4 to 0 s .*3 more|timestamp goes from 0.4 to 0 s": counter(
        "timestamp", restart
    ),
    r"episode 2, row 6 .*: timestamp goes from 0.5 to 0.7 s; .*must grow by 0.1 s": counter(
        "timestamp", lambda t: np.where(np.arange(len(t)) >= 6, t + 0.1, t).astype(np.float32)
    ),
    r"episode 2, row 1 .*: timestamp goes from 0 to 0.2 s \(and 7 more rows": counter("timestamp", lambda t: 2 * t),
    r"episode 2, row 3 .*: frame_index goes from 2 to 4 \(and 2 more": swap,
    r"episode 2, row 4 .*: index goes from 14 to 3": counter("index", at(4, 3)),
    r"episode 2, row 0 .*: index goes from 10 back to 0": counter("index", lambda i: i - 11),
    r"episode 2, row 0 .*: index goes from 10 back to 10": counter("index", lambda i: i - 1),
    r"episode 2, row 4 .*: task_index is 7, the list has 2 tasks, 0 to 1": counter("task_index", at(4, 7)),
    r"column action of .*parquet holds nan in row 4, dimension 1; repair": vector(ACTION, at((4, 1), np.nan)),
    r"column action of .*parquet holds inf in row 4, dimension 1, and 1 more such": vector(
        ACTION, lambda v: at((4, 1), np.inf)(at((7, 0), -np.inf)(v))
    ),
    r"column observation.state of .* holds 1e\+39, which float32 cannot hold, in row 2, dimension 0": vector(
        STATE, lambda v: at((2, 0), 1e39)(v.astype(np.float64))
    ),
    r"column action of .* has 2 dimensions, in info.json it has 3": vector(ACTION, lambda v: v[:, :2]),
    r"column action of .* holds lists of different lengths: row 0 has 3 values, row 5 2": typed(
        ACTION, [[0.0, 1.0, 2.0]] * 5 + [[0.0, 1.0]] * 4
    ),
    r"column action of .* holds string, not numbers": typed(ACTION, [["a", "b", "c"]] * 9),
    r"column action of .* has 1 empty values, the first in row 3": typed(
        ACTION, [[0.0] * 3] * 3 + [None] + [[0.0] * 3] * 5
    ),
    r"column action of .* has 1 empty values in its lists, the first in row 2": typed(
        ACTION, [[0.0] * 3] * 2 + [[0.0, None, 0.0]] + [[0.0] * 3] * 6
    ),
    r"has the column action 2 times; which is right": twice,
    r"has no column timestamp; it has": lambda f: sets.edit_table(
        sets.last_table(f), lambda t: t.drop_columns(["timestamp"])
    ),
    r"row 0 of .* is of episode 5, according to meta of 2": all_of_five,
    r"has 8 rows, its episodes have 9 according to meta": lambda f: sets.edit_table(
        sets.last_table(f), lambda t: t.slice(1)
    ),
    r"has 0 rows, its episodes have 9": lambda f: sets.edit_table(sets.last_table(f), lambda t: t.slice(0, 0)),
    r"info.json says total_episodes 4, the list of episodes has 3: lines were lost": lambda f: sets.edit_info(
        f, total_episodes=4
    ),
    r"info.json says total_frames '20', the list": lambda f: sets.edit_info(f, total_frames="20"),
    r"lists episode 1 twice": lambda f: sets.edit_episodes(f, lambda e: [*e, e[1]]),
    r"lists episode 1 with 0 rows": lambda f: sets.edit_episodes(f, lambda e: [e[0], e[1] | {"length": 0}, e[2]]),
    r"not as LeRobot .* writes it": lambda f: sets.edit_episodes(f, lambda e: [e[0] | {"length": -7}, *e[1:]]),
    r"says fps 0; it must be a number above 0": lambda f: sets.edit_info(f, fps=0),
    r"lacks . of the . files of its meta; first": lambda f: sets.edit_info(f, data_path="a" * 5000),
    r"says fps '10'": lambda f: sets.edit_info(f, fps="10"),
    r"gives task 0 two texts": lambda f: sets.edit_tasks(f, lambda t: [*t, t[0] | {"task": "other"}]),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_named_with_its_place(folder, message):
    DAMAGE[message](folder)
    with pytest.raises(InputError, match=message) as caught:
        proven(folder, cameras=())
    assert "\n" not in str(caught.value)


def test_a_lost_line_of_the_list_of_episodes_is_noticed(folder):
    sets.edit_episodes(folder, lambda episodes: episodes[:2])
    with pytest.raises(InputError, match="total_episodes 3, the list of episodes has 2"):
        proven(folder, cameras=())


def test_numbers_of_rows_that_meta_has_otherwise_are_refused_and_a_gap_alone_is_said(tmp_path):
    folders = {version: sets.make(tmp_path / version, version) for version in sets.VERSIONS}
    for folder in folders.values():
        counter("index", lambda i: i + 100)(folder)
    with pytest.raises(InputError, match="episode 2 begins with index 111, according to meta with 11"):
        proven(folders["v3.0"], cameras=())
    assert proven(folders["v2.1"], cameras=()).notes == ("index leaves out numbers at 1 places between episodes.",)


def test_a_listed_episode_without_rows_is_refused(folder):
    sets.edit_info(folder, total_episodes=4, total_frames=25)
    fresh = {"episode_index": 3, "length": 5, "dataset_from_index": 20, "dataset_to_index": 25}
    sets.edit_episodes(folder, lambda episodes: [*episodes, episodes[2] | fresh])
    with pytest.raises(InputError, match=r"lacks 1 of|has 9 rows, its episodes have 14"):
        proven(folder, cameras=())


def unread_shape(shape):
    return lambda folder: sets.edit_feature(folder, "next.reward", dtype="float32", shape=shape)


def absent_camera(folder):
    sets.edit_feature(folder, "observation.other", dtype="video", shape=[480, 640, 3])


ODD = {
    "a feature without a shape": unread_shape(None),
    "a feature whose shape is a number": unread_shape(3),
    "a counter without a shape": lambda f: sets.edit_feature(f, "timestamp", shape=None),
    "a feature that is no object": lambda f: sets.edit_info(
        f, features=json.loads((f / "meta/info.json").read_text())["features"] | {"x": None}
    ),
    "a camera that was not downloaded": absent_camera,
    "no totals": lambda f: sets.edit_info(f, total_frames=20.0, splits=None),
    "an unread file of other characters": lambda f: (f / "README.md").write_bytes(b"\xff\xfe\x00"),
    "an unread column of text": lambda f: sets.edit_table(
        sets.last_table(f), lambda t: t.append_column("note", pa.array([None] * len(t), pa.string()))
    ),
    "a byte-order mark": lambda f: (f / "meta/info.json").write_bytes(
        b"\xef\xbb\xbf" + (f / "meta/info.json").read_bytes()
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_and_unread_is_not_refused(folder, name):
    ODD[name](folder)
    assert proven(folder).notes == ()


NOTES = {
    "tables have no column frame_index": lambda f: [
        sets.edit_table(t, lambda t: t.drop_columns(["frame_index"])) for t in sets.tables(f)
    ],
    "frame_index of 1 episodes does not begin at 0, first that of episode 2 at 5": counter(
        "frame_index", lambda i: i + 5
    ),
    "1 episodes begin at another time than 0, first episode 2 at 3": counter("timestamp", lambda t: t + np.float32(3)),
    "the rows of episode 1 have the task 'open the_drawer', which is used; meta/episodes lists 'fly'": (
        lambda f: sets.edit_episodes(f, lambda e: [e[0], e[1] | {"tasks": ["fly"]}, e[2]])
    ),
    "total_tasks 5, the list of tasks has 2": lambda f: sets.edit_info(f, total_tasks=5),
}


@pytest.mark.parametrize("note", NOTES)
def test_what_may_be_meant_is_said(folder, note):
    NOTES[note](folder)
    (found,) = proven(folder, cameras=()).notes
    assert note in found


def test_rows_are_found_where_the_converter_listed_another_file(tmp_path):
    folder = sets.make(tmp_path / "set", "v3.0")
    whole = LeRobotData(read_meta(folder)).numbers(ACTION)[0]
    sets.edit_episodes(folder, lambda e: [*e[:2], e[2] | {"data/file_index": 0}])
    (note,) = proven(folder).notes
    assert "first episode 2" in note
    data = LeRobotData(read_meta(folder))
    np.testing.assert_array_equal(data.numbers(ACTION)[0], whole)
    original = LeRobotData(read_meta(sets.make(tmp_path / "other", "v3.0")))
    for row in (0, 10, 11, 19):
        np.testing.assert_array_equal(data.image(STILL, row), original.image(STILL, row))


def test_rows_that_an_unlisted_table_has_again_are_refused(tmp_path):
    """Where all tables are looked through, since one episode is elsewhere than meta says."""
    folder = sets.make(tmp_path / "set", "v3.0")
    first, _ = sets.tables(folder)
    both = pq.read_table(first)
    of = both["episode_index"].to_numpy()
    pq.write_table(both.filter(of == 1), first.with_name("file-002.parquet"))
    pq.write_table(both.filter(of == 0), first)
    sets.edit_episodes(folder, lambda e: [e[0], e[1] | {"data/file_index": 1}, e[2]])
    assert len(proven(folder, cameras=()).notes) == 1
    shutil.copy(first, first.with_name("file-003.parquet"))
    with pytest.raises(InputError, match=r"^episode 0 has rows at several places of the tables below .*/data; which"):
        proven(folder, cameras=())


@pytest.mark.parametrize("key", ["data/file_index", f"videos/{VIDEO}/chunk_index"])
def test_numbers_of_files_that_pandas_made_decimal_are_read_and_others_are_named(tmp_path, key):
    folder = sets.make(tmp_path / "set", "v3.0")
    sets.edit_episodes(folder, lambda e: [row | {key: float(row[key])} for row in e])
    assert proven(folder).notes == ()
    sets.edit_episodes(folder, lambda e: [*e[:2], e[2] | {key: -1.0}])
    with pytest.raises(InputError, match=rf"{key} -1\.0 is no whole number"):
        proven(folder)


@pytest.mark.parametrize("pattern", ["data/**/*.parquet", "videos/**/*.mp4"])
def test_files_that_git_lfs_did_not_fetch_are_named(folder, pattern):
    max(folder.glob(pattern)).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="is a pointer of Git LFS"):
        proven(folder)


@pytest.mark.parametrize("first", [3, 6])
def test_the_same_rows_given_to_two_episodes_are_refused(tmp_path, first):
    folder = sets.make(tmp_path / "set", "v3.0")
    sets.edit_episodes(folder, lambda e: [e[0], e[1] | {"dataset_from_index": first}, e[2]])
    with pytest.raises(InputError, match="gives the same rows to episodes 0 and 1"):
        proven(folder, cameras=())


def test_unlisted_tables_of_v2_are_said(tmp_path):
    folder = sets.make(tmp_path / "set", "v2.1")
    sets.edit_episodes(folder, lambda episodes: episodes[:2])
    sets.edit_info(folder, total_episodes=2, total_frames=11)
    (note,) = proven(folder, cameras=()).notes
    assert "1 tables are of no listed episode" in note


def test_a_width_that_changes_between_files_is_refused_where_info_gives_none(folder):
    sets.edit_feature(folder, ACTION, shape=None)
    vector(ACTION, lambda values: values[:, :2])(folder)
    with pytest.raises(InputError, match=r"column action of .* has 2 dimensions, in .*parquet it has 3"):
        proven(folder, cameras=())


def test_jitter_passes_with_a_larger_tolerance_only(folder):
    jitter = np.random.default_rng(0).uniform(-0.004, 0.004, 9).astype(np.float32)
    counter("timestamp", lambda times: times + jitter)(folder)
    with pytest.raises(InputError, match="allow a larger tolerance"):
        proven(folder)
    assert proven(folder, tolerance=0.01, cameras=(VIDEO,)).notes == ()


def test_times_of_a_long_episode_pass_in_float32():
    """At 3 hours float32 counts in milliseconds: what lerobot's fixed 1e-4 s would refuse is as exact as it can be."""
    from pathlib import Path

    from clp_jax.data.lerobot import Rows
    from clp_jax.data.lerobot_meta import Episode, Meta
    from clp_jax.data.places import Place
    from clp_jax.data.proof.rows import timestamps

    times = (np.arange(10_000) / 50 + 10_000).astype(np.float32)
    assert np.abs(np.diff(times.astype(np.float64)) - 0.02).max() > timestamp_tolerance(50.0)
    episode = Episode(0, len(times), Path("x"), {}, {})
    rows = Rows((episode,), (Place(Path("x"), 0),), np.array([len(times)]), {"timestamp": times[:, None]})
    assert not [f for f in timestamps(Meta(Path("x"), 50.0, {}, (episode,), {}), rows, None) if f.fatal]


def test_a_text_with_a_line_separator_is_one_text(tmp_path):
    folder = sets.make(tmp_path / "set", "v2.1")
    sets.edit_tasks(folder, lambda tasks: [tasks[0] | {"task": "push\u2028the button\x85"}, tasks[1]])
    assert read_meta(folder).tasks == {0: "push\u2028the button\x85", 1: TASKS[1]}


@pytest.mark.parametrize("text", [None, "", "  ", 5])
def test_a_task_without_a_text_is_never_the_word_none(folder, text):
    if text == 5 and not (folder / "meta/tasks.jsonl").exists():
        return  # a parquet column is of texts or of numbers
    sets.edit_tasks(folder, lambda tasks: [tasks[0] | {"task": text}, tasks[1]])
    assert read_meta(folder, ()).tasks == {0: None, 1: TASKS[1]}


def test_a_broken_line_is_named(tmp_path):
    folder = sets.make(tmp_path / "set", "v2.1")
    (folder / "meta/episodes.jsonl").write_text('{"episode_index": 0, "length": 7}\n[' + "[" * 100_000)
    with pytest.raises(InputError, match=r"line that is no JSON, line 2: it is nested too deeply|line 2"):
        read_meta(folder)


def test_a_chunk_of_no_files_is_refused(tmp_path):
    folder = sets.make(tmp_path / "set", "v2.1")
    sets.edit_info(folder, chunks_size=0)
    with pytest.raises(InputError, match="chunks_size is 0"):
        read_meta(folder)
