"""What is written is what the reader reads, to the bit, over several files."""

import numpy as np
import pytest

from clp_jax.data import lerobot_writer
from clp_jax.data.lerobot_writer import Recorded, decode_png, png_of, write_lerobot
from clp_jax.data.recording import open_recording
from clp_jax.errors import InputError
from clp_jax.models.pi0.robots import METAWORLD

LENGTHS, TASKS = (40, 3, 20), ("open it", "close it", "open it")


def recorded():
    rng = np.random.default_rng(0)
    for length, task in zip(LENGTHS, TASKS, strict=True):
        pictures = rng.integers(0, 256, (length, 6, 8, 3)).astype(np.uint8)
        vectors = {key: rng.standard_normal((length, 4)).astype(np.float32) for key in ("observation.state", "action")}
        yield Recorded(task, vectors, {"observation.image": [png_of(picture) for picture in pictures]})


def test_what_is_written_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot_writer, "_FILE_BYTES", 9000)  # two files
    write_lerobot(tmp_path, recorded(), fps=80, robot_type="toy")
    assert len(list(tmp_path.glob("data/*/*.parquet"))) == 2
    found, expected = open_recording(tmp_path, METAWORLD), list(recorded())
    assert np.array_equal(found.state, np.concatenate([e.vectors["observation.state"] for e in expected]))
    assert np.array_equal(found.actions, np.concatenate([e.vectors["action"] for e in expected]))
    assert np.array_equal(found.episodes, np.repeat(range(3), LENGTHS))
    pngs = [png for e in expected for png in e.images["observation.image"]]
    for row in (0, 17, 39, 40, 62):
        assert np.array_equal(found.data.image("observation.image", row), decode_png(pngs[row]))
    assert found.data.meta.tasks == {0: "open it", 1: "close it"}
    tasks, times = found.data.numbers("task_index", "timestamp")
    assert np.array_equal(tasks[:, 0], np.repeat([0, 1, 0], LENGTHS))
    assert times[42, 0] == np.float32(2 / 80)


def test_a_set_without_episodes_is_refused(tmp_path):
    with pytest.raises(InputError, match="without episodes"):
        write_lerobot(tmp_path, [], fps=80, robot_type="toy")
