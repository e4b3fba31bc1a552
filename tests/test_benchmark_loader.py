"""The benchmark of reading data, on a toy set."""

import time

import numpy as np
import pytest
from rich.console import Console

from clp_jax.benchmarks import loader
from clp_jax.cli import main
from clp_jax.data.loader import BatchIterator
from clp_jax.errors import InputError
from scripts.make_lerobot_toy import write

CAMERAS = {"observation.a": "video", "observation.b": "video"}


def test_samples_are_read_by_turns_and_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write(tmp_path / "set", "v3.0", {"action": 3}, CAMERAS)
    result = loader.run(str(tmp_path / "set"), batch_size=4, workers=1, horizon=5, batches=2, rounds=1)
    rates = result["samples_per_second"]
    assert rates["clp_jax"] > 0
    assert result["conditions"]["cameras"].keys() == CAMERAS.keys()
    try:
        import lerobot  # noqa: F401
    except ModuleNotFoundError:
        assert (rates["lerobot"], result["ratio"]) == (None, None)
    else:
        assert result["ratio"] == rates["clp_jax"] / rates["lerobot"]
    console = Console(record=True, width=120)
    loader.show(result, console)
    assert "samples/s" in console.export_text()


def test_what_workers_have_ready_when_the_clock_starts_is_not_counted():
    def read(rows):
        time.sleep(0.05)
        return {"rows": rows}

    batches = BatchIterator(read, np.arange(100), 1, seed=0, workers=4)
    assert loader._batches_per_second(batches, 2, workers=4) < 1.3 * 4 / 0.05


def test_what_eight_h100_read_is_their_operations_over_those_of_a_sample():
    from clp_jax.flops import forward_flops
    from clp_jax.models import Lengths
    from clp_jax.models.pi0 import PI0

    step = 3 * forward_flops(PI0, Lengths(50, 48), cameras=3)
    assert loader._needed(PI0) == pytest.approx(8 * 0.4 * 989e12 / step)


def test_sets_without_pictures_and_small_ones_are_refused(tmp_path, capsys):
    write(tmp_path / "blind", "v3.0", {"action": 3}, {})
    with pytest.raises(InputError, match="has no pictures"):
        loader.run(str(tmp_path / "blind"))
    write(tmp_path / "small", "v3.0", {"action": 3}, CAMERAS)
    with pytest.raises(InputError, match="20 rows; 32 are needed"):
        loader.run(str(tmp_path / "small"))
    assert main(["benchmark", "--part", "loader"]) == 2
    assert "give --data" in capsys.readouterr().err
