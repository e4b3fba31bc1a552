"""No name and no link leads out of a user's folder."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from safetensors_folders import SMOLVLA

from clp_jax.checkpoint import read_spec, write_params
from clp_jax.cli import main
from clp_jax.data.lerobot_meta import find_folder, read_meta
from clp_jax.errors import InputError
from clp_jax.folders import check_inside, check_open, files_below
from clp_jax.processing import policy_files
from scripts.make_lerobot_toy import write as write_toy_set


@pytest.mark.parametrize("name", ["", "/etc/x", "..", "../x", "a/../../x", "a//b", "a/./b", "a\\b", "a\nb", "a\0b"])
def test_a_name_that_leads_out_of_its_folder_is_refused(name):
    with pytest.raises(InputError, match=r"--asset-id .* leads out of its folder"):
        check_inside(name, "--asset-id")


def step_with_assets(folder: Path) -> Path:
    (folder / "stats" / "robot").mkdir(parents=True)
    (folder / "stats" / "robot" / "norm_stats.json").write_text("{}")
    (folder / "private").write_text("secret")
    write_params(folder / "step", {"w": np.ones(3, np.float32)}, assets=folder / "stats")
    return folder / "step"


@pytest.mark.parametrize(
    ("link", "wrong"),
    [
        ("../../private", "outside of the checkpoint"),
        ("../..", "outside of the checkpoint"),
        ("robot", "a link to a folder"),
        ("x", "which is not there"),
        ("nowhere", "which is not there"),
    ],
)
def test_a_link_out_of_assets_is_no_part_of_a_checkpoint(tmp_path, capsys, link, wrong):
    step = step_with_assets(tmp_path)
    (step / "assets" / "x").symlink_to(link)
    assert main(["inspect", str(step)]) == 2
    assert wrong in capsys.readouterr().err


def test_a_pipe_in_assets_is_refused_and_not_waited_for(tmp_path):
    step = step_with_assets(tmp_path)
    os.mkfifo(step / "assets" / "x")
    with pytest.raises(InputError, match="is no file"):
        read_spec(step)


@pytest.mark.parametrize("below", ["", "a/b"])
def test_the_links_of_a_hubs_cache_are_followed(tmp_path, below):
    step = step_with_assets(tmp_path)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123" / below
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    step.rename(snapshot) if below else shutil.copytree(step, snapshot)
    file, blob = snapshot / "assets" / "robot" / "norm_stats.json", tmp_path / "models--a--b" / "blobs" / "ff"
    file.rename(blob)
    file.symlink_to(os.path.relpath(blob, file.parent))
    assets = read_spec(snapshot).assets
    assert [path.read_text() for path in files_below(assets)] == ["{}"]


def test_a_link_within_the_folder_is_a_file_of_it(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    (tmp_path / "link").symlink_to("a/file")
    assert files_below(epath.Path(tmp_path)) == [tmp_path / "a" / "file", tmp_path / "link"]


def test_statistics_named_by_a_flag_stay_in_the_output(tmp_path, capsys):
    write_toy_set(tmp_path / "data", "v2.1", {"observation.state": 4, "action": 4}, {"observation.image": "image"})
    flags = ["--data", str(tmp_path / "data"), "--robot", "metaworld", "--out", str(tmp_path / "a" / "ns")]
    for name in ("../../escaped", str(tmp_path / "escaped")):
        assert main(["norm-stats", *flags, "--asset-id", name]) == 2
        assert "leads out of its folder" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_files_that_a_policys_processor_names_stay_in_its_folder(tmp_path):
    shutil.copytree(SMOLVLA, tmp_path / "policy")
    file = tmp_path / "policy" / policy_files.PREPROCESSOR
    content = json.loads(file.read_text())
    for step in content["steps"]:
        if "state_file" in step:
            step["state_file"] = "../private.safetensors"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"state_file .*private.* leads out"):
        policy_files.state_files(epath.Path(tmp_path / "policy"))


@pytest.mark.parametrize(
    ("template", "wrong"),
    [
        ("../{episode_chunk}/{episode_index}.parquet", "leads out of its folder"),
        ("/etc/{episode_index}", "leads out of its folder"),
        ("{no_such_number}.parquet", "can be put in"),
        ("{episode_index.parquet", "can be put in"),
        (None, "can be put in"),
    ],
)
def test_paths_of_a_data_set_stay_in_its_folder(tmp_path, template, wrong):
    write_toy_set(tmp_path / "data", "v2.1", {"observation.state": 4, "action": 4}, {"observation.image": "image"})
    file = tmp_path / "data" / "meta" / "info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data_path": template}))
    with pytest.raises(InputError, match=wrong):
        read_meta(tmp_path / "data")


@pytest.fixture
def closed(tmp_path, monkeypatch) -> Path:
    """A folder whose permissions forbid to look into it. (Of root they forbid nothing, so they are made up.)"""
    folder, allowed = tmp_path / "closed", os.access
    (folder / "params").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and allowed(path, mode))
    return folder


@pytest.mark.parametrize("below", ["", "params", "params/no"])
def test_a_folder_that_may_not_be_looked_into_is_not_taken_for_an_empty_one(closed, below):
    for read in (read_spec, find_folder):
        with pytest.raises(InputError, match=f"^{re.escape(str(closed))} cannot be read: Permission denied"):
            read(closed / below)


def test_what_may_be_read_is_open(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file", tmp_path / "nothing" / "here", "gs://bucket/folder"):
        check_open(path)
