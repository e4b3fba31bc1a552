"""The benchmark of pruning on disk, on a model of a few kilobytes."""

import os

import jax
import numpy as np
import pytest
import smolvla_recordings
from checkpoints import restore_as_openpi
from rich.console import Console

from clp_jax import trees
from clp_jax.benchmarks import checkpoint_floors as floors
from clp_jax.benchmarks import checkpoint_io, made_checkpoints
from clp_jax.benchmarks.checkpoint_io import CheckpointIoConfig
from clp_jax.benchmarks.made_checkpoints import make_checkpoint
from clp_jax.checkpoint import read_params, read_spec
from clp_jax.models import abstract_params

TREE = {
    "PaliGemma": {
        "llm": {
            "layers": {"w": jax.ShapeDtypeStruct((4, 3, 50), "float32")},
            "embedder": jax.ShapeDtypeStruct((31, 8), "bfloat16"),
        }
    }
}


def test_run_measures_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_io, "in_own_process", lambda step, *args, **kwargs: step(*args, **kwargs))
    policy = smolvla_recordings.architecture()
    rows = checkpoint_io.run(CheckpointIoConfig(tmp_path, rounds=1), TREE, policy)
    assert {(row.work, row.by) for row in rows} == {
        *(("prune", by) for by in ("floor", "cp", "clp", "orbax")),
        *(("prune tensors", by) for by in ("cp", "clp")),
        *(("export", by) for by in ("floor", "clp")),
        *(("load", by) for by in ("floor", "clp", "orbax")),
    }
    assert {row.decoded_bytes for row in rows if row.work == "prune"} == {2 * 3 * 50 * 4 + 31 * 8 * 2}
    assert {row.decoded_bytes for row in rows if row.work in ("load", "export")} == {4 * 3 * 50 * 4 + 31 * 8 * 2}
    shallower = abstract_params(policy.with_depths(dict.fromkeys(policy.groups[0], policy.depths["vlm"] // 2)))
    numbers = sum(leaf.size for leaf in trees.flatten(shallower).values())
    assert {row.decoded_bytes for row in rows if row.work == "prune tensors"} == {4 * numbers}
    assert all(
        row.over_floor == 1 for row in rows if row.by == "floor" or (row.work, row.by) == ("prune tensors", "cp")
    )
    assert all(row.seconds > 0 and row.peak_bytes > 2**20 for row in rows)
    assert list(tmp_path.iterdir()) == []
    console = Console(record=True, width=150)
    checkpoint_io.show(rows, console)
    assert "Orbax alone" in console.export_text()


def test_what_is_measured_has_a_process_of_its_own():
    assert checkpoint_io.in_own_process(os.getpid) != os.getpid()


@pytest.mark.parametrize("layout", ["leaf", "orbax", "layer"])
def test_floors_do_the_work_that_they_stand_for(layout, tmp_path):
    make_checkpoint(tmp_path / "step", trees.flatten(TREE), layout=layout)
    spec, path = read_spec(tmp_path / "step"), "PaliGemma/llm/layers/w"
    floors.prune(spec, {path: [0, 3]}, tmp_path / "floor")
    floors.prune_by_orbax(spec, {path: [0, 3]}, tmp_path / "orbax")
    written = {file.name: file.read_bytes() for file in sorted((tmp_path / "floor").iterdir())}
    expected = trees.flatten(read_params(spec))
    expected[path] = expected[path][[0, 3]]
    assert sum(map(len, written.values())) == sum(leaf.nbytes for leaf in expected.values())
    stack = b"".join(content for name, content in written.items() if "layers.w" in name)
    assert stack == expected[path].tobytes()
    by_orbax = restore_as_openpi(tmp_path / "orbax", restore_type=np.ndarray)
    assert trees.difference(trees.unflatten(expected), by_orbax, dtypes=True) == []
    loaded = floors.load(spec)
    assert sum(chunk.nbytes for chunk in loaded) == sum(
        leaf.nbytes for leaf in trees.flatten(read_params(spec)).values()
    )
    restored = trees.flatten(floors.restore_by_orbax(spec))
    np.testing.assert_array_equal(restored[path], trees.flatten(read_params(spec))[path])


@pytest.mark.parametrize("layout", ["leaf", "orbax", "layer"])
@pytest.mark.parametrize("limit", [200, 2**31])
def test_the_made_checkpoint_is_one_that_orbax_reads(layout, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(made_checkpoints, "ORBAX_CHUNK_BYTES", limit)
    shapes = trees.abstract({"w": np.zeros((4, 3, 50), np.float32), "layers": {"scale": np.zeros((4, 5), np.float32)}})
    make_checkpoint(tmp_path / "step", trees.flatten(shapes), layout=layout, bfloat16_exact=True)
    restored = restore_as_openpi(tmp_path / "step" / "params", restore_type=np.ndarray)
    assert trees.difference(shapes, restored, dtypes=True) == []
    ours = read_params(read_spec(tmp_path / "step"))
    for path, leaf in trees.flatten(restored).items():
        assert np.isfinite(leaf).all() and leaf.std() > 0
        np.testing.assert_array_equal(leaf, trees.flatten(ours)[path])
        assert not (leaf.view(np.uint32) & 0xFFFF).any(), "bfloat16 would round it"
