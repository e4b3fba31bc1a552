"""Statistics: openpi's numbers, openpi's file, without decoding an image."""

import json
from pathlib import Path

import numpy as np
import pytest
import toys
from etils import epath
from recordings import GOLDEN, recording

from clp_jax.cli import main
from clp_jax.data import load_npz
from clp_jax.errors import InputError
from clp_jax.processing import norm_stats, transforms
from clp_jax.processing.norm_stats import NormStats
from scripts.make_lerobot_toy import LENGTHS, write

BINS = 5000


def openpis(batches: np.ndarray) -> NormStats:
    """What openpi's RunningStats give (shared/normalize.py), in float64 and on the final bins."""
    values = batches.reshape(-1, batches.shape[-1]).astype(np.float64)
    mean, mean_of_squares = values.mean(0), (values**2).mean(0)
    quantiles = []
    for share in (0.01, 0.99):
        edges = [np.linspace(column.min(), column.max(), BINS + 1) for column in values.T]
        counts = [np.histogram(column, e)[0] for column, e in zip(values.T, edges, strict=True)]
        found = [e[np.searchsorted(c.cumsum(), share * len(values))] for e, c in zip(edges, counts, strict=True)]
        quantiles.append(np.array(found))
    return NormStats(mean, np.sqrt(mean_of_squares - mean**2), *quantiles)


def check_close(ours: NormStats, theirs: NormStats, width: np.ndarray, bins: float = 1.0) -> None:
    np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ours.std, theirs.std, rtol=1e-5)
    for name in ("q01", "q99"):
        assert (np.abs(getattr(ours, name) - getattr(theirs, name)) <= bins * width * 1.001).all()


def test_statistics_are_those_of_openpis_running_statistics():
    g = recording("transforms")
    values = g["running_in"].reshape(-1, 3)
    theirs = NormStats(*(g[f"running_{name}"].astype(np.float64) for name in ("mean", "std", "q01", "q99")))
    # openpi moves counts to new bins whenever the range grows, here three times at most, one bin each.
    check_close(norm_stats.of_vectors(values.T), theirs, np.ptp(values, axis=0) / BINS, bins=4)


@pytest.mark.parametrize("delta", [(), (True, True, False)])
def test_action_statistics_run_over_the_chunks_that_training_sees(delta):
    rng = np.random.default_rng(0)
    state, actions = (rng.normal(size=(30, d)).astype(np.float32) for d in (4, 3))
    ends, horizon = np.array([7, 19, 30]), 6
    chunks = []
    for row in range(30):
        end = ends[np.searchsorted(ends, row, side="right")]
        chunk = actions[np.minimum(np.arange(row, row + horizon), end - 1)]
        chunks.append(transforms.to_delta(chunk, state[row], delta))
    ours = norm_stats.of_robot(state, actions, ends, horizon, delta)
    check_close(ours["actions"], openpis(np.stack(chunks)), np.ptp(np.stack(chunks), axis=(0, 1)) / BINS)
    check_close(ours["state"], openpis(state), np.ptp(state, axis=0) / BINS)


def test_file_is_openpis(tmp_path):
    file = GOLDEN / "ckpt/pi05_released/assets/physical-intelligence/libero/norm_stats.json"
    norm_stats.save(tmp_path / "a" / "b", norm_stats.load(file.parent))
    assert (tmp_path / "a/b/norm_stats.json").read_text() == file.read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "norm_stats.json is no valid JSON"),
        ("{}", "no norm_stats.json of openpi"),
        ('{"norm_stats": {"state": {"mean": [1.0]}}}', "lacks mean or std"),
        ('{"norm_stats": {"state": {"mean": [1.0], "std": [1.0, 2.0]}}}', "different shapes"),
        ('{"norm_stats": {"state": {"mean": [NaN], "std": [1.0]}}}', "not finite"),
    ],
)
def test_broken_file_is_refused(tmp_path, content, message):
    (tmp_path / "norm_stats.json").write_text(content)
    with pytest.raises(InputError, match=message):
        norm_stats.load(tmp_path)
    with pytest.raises(InputError, match="write one with clp norm-stats"):
        norm_stats.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": [1.0, -1.0]}, "actions, dimension 1: std is -1, a deviation is never negative"),
        ({"q01": [0.0, 2.0], "q99": [1.0, 1.0]}, "actions, dimension 1: q01 2 is above q99 1"),
        ({"min": [0.0, 2.0], "max": [1.0, 1.0]}, "actions, dimension 1: min 2 is above max 1"),
        ({"q01": [0.0, 0.0]}, "actions has only one of q01 and q99"),
        ({"max": [0.0, 0.0]}, "actions has only one of min and max"),
        ({"std": [0.0, 1.0], "q01": [0.0, 0.0], "q99": [1.0, 1.0]}, "dimension 0: std is 0, but q01 and q99 differ"),
        ({"mean": [0.0, True]}, "actions, mean, dimension 1 is True, no number"),
    ],
)
def test_statistics_of_no_data_are_refused(tmp_path, change, message):
    content = {"norm_stats": {"actions": {"mean": [0.0, 0.0], "std": [1.0, 1.0]} | change}}
    (tmp_path / "norm_stats.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        norm_stats.load(tmp_path)


@pytest.mark.parametrize("read", [norm_stats.load, lambda path: load_npz(path, toys.architecture())])
def test_a_network_that_fails_is_one_line(read, monkeypatch):
    def fail(_):
        raise ImportError("Please install gcsfs\nto access Google Storage")

    monkeypatch.setattr(type(epath.Path("gs://bucket/file")), "is_dir", fail)
    with pytest.raises(InputError, match=r"gs://bucket/file cannot be read: Please install gcsfs; copy") as caught:
        read("gs://bucket/file")
    assert "\n" not in str(caught.value)


def test_command_writes_the_file_without_reading_an_image(tmp_path, capsys):
    columns = {"observation.state": 4, "action": 4}
    truth = write(tmp_path / "toy", "v2.1", columns, {"observation.image": "video"})
    for video in (tmp_path / "toy").glob("videos/**/*.mp4"):
        video.write_bytes(b"nobody looks")
    flags = ["--data", str(tmp_path / "toy"), "--robot", "metaworld", "--out", str(tmp_path / "stats")]
    assert main(["norm-stats", *flags, "--action-horizon", "3"]) == 0
    assert f"{sum(LENGTHS)} rows of 3 episodes, chunks of 3 actions" in capsys.readouterr().out
    written = json.loads((tmp_path / "stats/toy/norm_stats.json").read_text())["norm_stats"]
    np.testing.assert_allclose(written["state"]["mean"], truth["observation.state"].mean(0), rtol=1e-5)
    assert list(written) == ["state", "actions"]
    assert list(written["actions"]) == ["mean", "std", "q01", "q99", "min", "max"]
    assert main(["norm-stats", *flags]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["norm-stats", *flags, "--overwrite", "--json", "--action-horizon", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["norm_stats"] == written and told["rows"] == sum(LENGTHS) and told["action_horizon"] == 3
    assert json.loads(Path(told["file"]).read_text())["norm_stats"] == written


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "say which robot"),
        (["--robot", "metaworld", "--action-horizon", "0"], "give at least 1"),
        (["--robot", "metaworld", "--vlm-config", "x"], "--vlm-config: it describes a checkpoint; give --checkpoint"),
    ],
)
def test_command_refuses_what_it_cannot_do(tmp_path, capsys, flags, message):
    assert main(["norm-stats", "--data", "x/y", "--out", str(tmp_path / "o"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
