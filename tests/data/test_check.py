"""``clp check`` lists all that has to be repaired; identities are of content; a hub id is found in lerobot's home."""

import json
import shutil
import sys

import lerobot_sets as sets
import numpy as np
import pytest
from lerobot_sets import ACTION, STATE, STILL, VIDEO, counter, vector

from clp_jax.cli import main
from clp_jax.data.lerobot_meta import find_folder
from clp_jax.data.proof import check_set
from clp_jax.data.recording import open_recording
from clp_jax.errors import InputError
from clp_jax.processing.robots import Robot

ROBOT = Robot("toy", {"base_0_rgb": VIDEO, "left_wrist_0_rgb": STILL})


@pytest.fixture(scope="module", params=sets.VERSIONS)
def sound(request, tmp_path_factory):
    return sets.make(tmp_path_factory.mktemp("sound") / "set", request.param)


@pytest.fixture
def folder(sound, tmp_path):
    return sets.copied(sound, tmp_path / "set")


def damage_much(folder):
    """Each of another kind; the first table stays readable throughout."""
    counter("timestamp", lambda times: 2 * times)(folder)
    counter("task_index", lambda tasks: tasks + 7)(folder)
    sets.edit_info(folder, total_frames=21)
    min(folder.glob("videos/**/*.mp4")).write_bytes(b"")


def test_a_sound_set_passes_with_code_0(sound, capsys):
    assert main(["check", "--data", str(sound)]) == 0
    shown = capsys.readouterr().out
    assert "is whole" in shown
    assert all(name in shown for name in ("order of rows", "timestamps", VIDEO, STILL))


def test_all_findings_are_listed_with_code_2(folder, capsys):
    damage_much(folder)
    assert main(["check", "--data", str(folder)]) == 2
    shown = capsys.readouterr()
    for text in ("total_frames 21", "timestamp goes from", "task_index is 7", "cannot be decoded", "has no frame at"):
        assert text in shown.out
    assert shown.err.count("\n") == 1
    assert "to repair, listed above" in shown.err


def test_findings_are_printed_as_json(folder, sound, capsys):
    damage_much(folder)
    assert main(["check", "--data", str(sound), str(folder), "--json"]) == 2
    whole, damaged = json.loads(capsys.readouterr().out)
    assert whole["data"] == str(sound)
    assert not any(check["findings"] for check in whole["checks"])
    texts = [one["text"] for check in damaged["checks"] for one in check["findings"] if one["to_repair"]]
    assert any("total_frames 21" in text for text in texts)


def test_rows_of_sound_files_are_proven_beside_broken_ones(folder):
    counter("timestamp", lambda times: 2 * times)(folder)
    vector(ACTION, lambda values: values * np.nan)(folder)
    texts = [finding.text for check in check_set(folder) for finding in check.findings]
    assert len(texts) == 3 and "holds nan" in texts[0]
    assert "timestamp goes from" in texts[1] and "has no frame at" in texts[2], "only its actions cannot be read"
    file = sets.tables(folder)[0]
    sets.edit_table(file, lambda t: sets.with_column(t, "frame_index", [np.zeros(len(t), np.int64)]))
    texts = [finding.text for check in check_set(folder) for finding in check.findings]
    assert len(texts) >= 2
    assert any("holds nan" in text for text in texts)
    assert any("episode 0, row 1" in text and "frame_index goes from 0 to 0" in text for text in texts)


def found_in(folder, **options):
    """Per check its sentences, those that do not count as faults left out; and why the others were not made."""
    checks = check_set(folder, **options)
    faults = {check.name: [finding.text for finding in check.findings if finding.fatal] for check in checks}
    return faults, {check.name: check.unmade for check in checks if check.unmade is not None}


def test_one_bad_value_hides_no_other_fault_of_its_table(folder):
    def one_nan(values):
        return np.where(np.arange(values.size).reshape(values.shape) == 3, np.nan, values)

    vector(ACTION, one_nan)(folder)
    counter("timestamp", lambda times: times + (np.arange(len(times)) > 1))(folder)
    for row in (2, 4):
        sets.pictures(STILL, lambda _: b"junk", row)(folder)
    faults, unmade = found_in(folder)
    assert not unmade
    assert [name for name, texts in faults.items() if texts] == [
        *("tables", "timestamps", f"camera {VIDEO}", f"camera {STILL}")
    ]
    (pictures,) = faults[f"camera {STILL}"]
    assert "holds a broken image" in pictures and pictures.endswith("So it is with 1 more of this episode.")


def test_what_cannot_be_checked_is_listed_with_the_reason(folder, capsys):
    for file in sets.tables(folder):
        sets.edit_table(file, lambda t: sets.with_column(t, "timestamp", [np.full(len(t), np.nan)]))
    faults, unmade = found_in(folder)
    assert [name for name, texts in faults.items() if texts] == ["tables"]
    assert unmade.keys() == {"timestamps", f"camera {VIDEO}"}
    flags = ["--state-key", STATE, "--action-key", ACTION, "--image", f"base_0_rgb={STILL}"]
    assert main(["check", "--data", str(folder), *flags]) == 2
    shown = capsys.readouterr().out
    reason = "no table has a column timestamp that can be read and fits the list of episodes."
    assert f"not checked: timestamps: {reason}" in shown
    assert "dimensions" in shown and "it is compared with what was read, which has to be repaired first." in shown
    assert main(["check", "--data", str(folder), "--json"]) == 2
    (said,) = json.loads(capsys.readouterr().out)
    assert {one["checked"] for one in said["checks"] if one["not_checked"] is not None} == unmade.keys()


def test_rows_that_a_check_could_not_look_at_are_counted(folder):
    sets.edit_table(sets.last_table(folder), lambda t: sets.with_column(t, "frame_index", [np.full(len(t), np.inf)]))
    (order,) = [check for check in check_set(folder) if check.name == "order of rows"]
    (note,) = [finding.text for finding in order.findings]
    assert "rows were not checked: their frame_index cannot be read" in note


def test_names_that_a_set_lacks_hide_no_other_fault(folder):
    counter("timestamp", lambda times: 2 * times)(folder)
    faults, _ = found_in(folder, columns=(ACTION, "nowhere"), cameras=(STILL, "nothing"))
    assert "has no nowhere, nothing; it has" in faults["names"][0]
    assert faults["timestamps"] and f"camera {STILL}" in faults
    for video in folder.glob("videos/**/*.mp4"):
        video.unlink()
    faults, _ = found_in(folder, cameras=(STILL, VIDEO))
    assert "lacks" in faults[f"camera {VIDEO}"][0] and faults["timestamps"] and not faults[f"camera {STILL}"]


def test_without_meta_nothing_else_is_checked_and_that_is_said(folder):
    (folder / "meta/info.json").write_text("{")
    faults, unmade = found_in(folder)
    assert [name for name, texts in faults.items() if texts] == ["meta"]
    assert {"tables", "order of rows", "timestamps", "tasks", "cameras"} == unmade.keys()


def test_a_camera_that_is_not_here_is_noted_without_a_robot_and_refused_with_one(folder, capsys):
    for video in folder.glob("videos/**/*.mp4"):
        video.unlink()
    assert main(["check", "--data", str(folder)]) == 0
    assert f"{VIDEO} was not checked" in capsys.readouterr().out
    flags = ["--state-key", STATE, "--action-key", ACTION]
    assert main(["check", "--data", str(folder), "--image", f"base_0_rgb={STILL}", *flags]) == 0
    assert main(["check", "--data", str(folder), "--image", f"base_0_rgb={VIDEO}", *flags]) == 2
    assert "lacks" in capsys.readouterr().out


def test_a_task_without_text_needs_a_prompt(folder, capsys):
    sets.edit_tasks(folder, lambda tasks: [tasks[0] | {"task": None}, tasks[1]])
    assert main(["check", "--data", str(folder)]) == 2
    assert "no text for task 0; give --prompt" in capsys.readouterr().out
    for prompt in ("go", ""):
        assert main(["check", "--data", str(folder), "--prompt", prompt]) == 0


def test_what_cannot_be_checked_is_one_line(tmp_path, folder, capsys):
    assert main(["check", "--data", str(tmp_path / "absent")]) == 2
    assert main(["check", "--data", str(folder), "--image", "base_0_rgb=nothing"]) == 2
    assert "has no observation.state" not in (shown := capsys.readouterr()).out
    assert "has no nothing; it has" in shown.out
    (folder / "meta/info.json").write_text("{")
    assert main(["check", "--data", str(folder)]) == 2
    assert "is no valid JSON" in capsys.readouterr().out


def test_the_identity_of_rows_is_of_content_alone(folder, tmp_path):
    recorded = open_recording(folder, ROBOT)
    (folder / "README.md").write_text("new")
    (folder / ".DS_Store").write_bytes(b"x")
    sets.edit_table(sets.last_table(folder), lambda t: t.append_column("unread", [list(range(len(t)))]))
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    again = open_recording(moved, ROBOT)
    assert (again.fingerprint(), again.video_fingerprint()) == (recorded.fingerprint(), recorded.video_fingerprint())


CHANGES = {
    "state": vector(STATE, lambda values: values + 1),
    "actions": vector(ACTION, lambda values: values + 1),
    "tasks": counter("task_index", lambda tasks: 1 - tasks),
    "texts": lambda f: sets.edit_tasks(f, lambda tasks: [tasks[0] | {"task": "other"}, tasks[1]]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_identity_of_rows_follows_each_value(folder, name):
    before = open_recording(folder, ROBOT)
    CHANGES[name](folder)
    after = open_recording(folder, ROBOT)
    assert after.fingerprint() != before.fingerprint()
    assert after.video_fingerprint() == before.video_fingerprint()


PICTURES = {
    VIDEO: lambda f: sets.write_video(
        max(f.glob("videos/**/*.mp4")), np.random.default_rng(0).integers(0, 256, (9, 48, 64, 3)).astype(np.uint8)
    ),
    STILL: sets.pictures(STILL, lambda _: sets.encoded(np.zeros((48, 64, 3), np.uint8))),
}


@pytest.mark.parametrize("key", PICTURES)
def test_the_identity_of_pictures_is_its_own(folder, key):
    before = open_recording(folder, ROBOT)
    PICTURES[key](folder)
    after = open_recording(folder, ROBOT)
    assert after.fingerprint() == before.fingerprint()
    assert after.video_fingerprint() != before.video_fingerprint()
    other = Robot("one", {"base_0_rgb": STILL if key == VIDEO else VIDEO})
    sets.proven(folder)
    assert open_recording(folder, other).video_fingerprint() != after.video_fingerprint()


def test_a_hub_id_is_looked_for_in_lerobots_home(sound, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    shutil.copytree(sound, tmp_path / "home/somebody/something")
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "home"))
    assert find_folder("somebody/something") == tmp_path / "home/somebody/something"
    monkeypatch.delenv("HF_LEROBOT_HOME")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"nor .*lerobot/somebody/something"):
        find_folder("somebody/something")
    (tmp_path / "home").rename(tmp_path / "lerobot")
    assert find_folder("somebody/something") == tmp_path / "lerobot/somebody/something"
