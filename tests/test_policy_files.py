"""The processors of a lerobot policy folder: what no data and no lerobot writes is refused in one line."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from safetensors_folders import SMOLVLA

from clp_jax.errors import InputError
from clp_jax.processing.policy_files import PREPROCESSOR, norm_stats_of, read_vectors, state_files, to_safetensors

STATE_FILE = "policy_preprocessor_step_5_normalizer_processor.safetensors"


@pytest.fixture
def folder(tmp_path):
    for file in SMOLVLA.glob("policy_*"):
        shutil.copy(file, tmp_path)
    return epath.Path(tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("action.std", lambda x: -x, r"action, dimension 0: std is -.*, a deviation is never negative"),
        ("action.mean", lambda x: np.full_like(x, np.nan), "not finite in float32"),
        ("observation.state.mean", lambda x: x.astype(np.float64) * 1e300, "not finite in float32"),
        ("observation.state.std", lambda x: x[:2], "different shapes"),
        ("observation.state.mean", lambda x: x[:, None], "no number"),
        ("action.mean", lambda x: x > 0, "no number|dimension"),
    ],
)
def test_statistics_that_no_data_have(folder, key, change, message):
    vectors = read_vectors(folder / STATE_FILE)
    (folder / STATE_FILE).write_bytes(to_safetensors(vectors | {key: change(vectors[key])}))
    with pytest.raises(InputError, match=message) as caught:
        norm_stats_of(folder)
    assert STATE_FILE in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda steps: None,
        lambda steps: 3,
        lambda steps: ["x"],
        lambda steps: [step | {"config": [1]} for step in steps],
        lambda steps: [step | {"state_file": 5} for step in steps],
        lambda steps: [step | {"registry_name": {}} for step in steps],
        lambda steps: [step | {"config": {"norm_map": "x"}} for step in steps],
    ],
)
def test_steps_that_lerobot_does_not_write(folder, change):
    content = json.loads((folder / PREPROCESSOR).read_text())
    (folder / PREPROCESSOR).write_text(json.dumps(content | {"steps": change(content["steps"])}))
    with pytest.raises(InputError, match="is no processor file of lerobot"):
        norm_stats_of(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\2" + bytes(7) + b"[]", b"\1" + bytes(7) + b"3"])
def test_a_state_file_that_is_none(folder, content):
    (folder / STATE_FILE).write_bytes(content)
    with pytest.raises(InputError, match=f"{STATE_FILE} is no"):
        norm_stats_of(folder)


def test_a_state_file_outside_of_the_folder_is_not_read(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / STATE_FILE
    shutil.move(folder / STATE_FILE, outside)
    Path(folder, STATE_FILE).symlink_to(outside)
    for read in (norm_stats_of, state_files):
        with pytest.raises(InputError, match=r"is a link to .*, outside of the checkpoint"):
            read(folder)
    content = (folder / PREPROCESSOR).read_text()
    (folder / PREPROCESSOR).write_text(content.replace(STATE_FILE, f"../{outside.parent.name}/{STATE_FILE}"))
    for read in (norm_stats_of, state_files):
        with pytest.raises(InputError, match="state_file"):
            read(folder)


def test_a_pipe_is_not_waited_for(folder):
    (folder / STATE_FILE).unlink()
    os.mkfifo(folder / STATE_FILE)
    with pytest.raises(InputError, match="no regular file"):
        norm_stats_of(folder)
