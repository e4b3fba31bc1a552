"""The benchmark of pruning on disk, on a model of a few kilobytes."""

import jax
import numpy as np
import pytest
from checkpoints import restore_as_openpi

from clp_jax import trees
from clp_jax.benchmarks import checkpoint_io
from clp_jax.benchmarks.checkpoint_io import CheckpointIoConfig, make_checkpoint
from clp_jax.checkpoint import read_params, read_spec

TREE = {
    "PaliGemma": {
        "llm": {
            "layers": {"w": jax.ShapeDtypeStruct((4, 3, 50), "float32")},
            "embedder": jax.ShapeDtypeStruct((31, 8), "bfloat16"),
        }
    }
}


def test_run_measures_and_leaves_nothing(tmp_path):
    [result] = checkpoint_io.run(CheckpointIoConfig(scratch=tmp_path, layouts=("orbax",)), TREE)
    assert result.layout == "orbax"
    assert result.source_bytes == 4 * 3 * 50 * 4 + 31 * 8 * 2
    assert result.kept_bytes == 2 * 3 * 50 * 4 + 31 * 8 * 2
    assert result.largest_leaf == 4 * 3 * 50 * 4
    assert result.prune_peak_bytes > 2**20
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["leaf", "orbax", "layer"])
@pytest.mark.parametrize("limit", [200, 2**31])
def test_the_made_checkpoint_is_one_that_orbax_reads(layout, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_io, "ORBAX_CHUNK_BYTES", limit)
    shapes = trees.abstract({"w": np.zeros((4, 3, 50), np.float32), "layers": {"scale": np.zeros((4, 5), np.float32)}})
    make_checkpoint(tmp_path / "step", trees.flatten(shapes), layout=layout, bfloat16_exact=True)
    restored = restore_as_openpi(tmp_path / "step" / "params", restore_type=np.ndarray)
    assert trees.difference(shapes, restored, dtypes=True) == []
    ours = read_params(read_spec(tmp_path / "step"))
    for path, leaf in trees.flatten(restored).items():
        assert np.isfinite(leaf).all() and leaf.std() > 0
        np.testing.assert_array_equal(leaf, trees.flatten(ours)[path])
        assert not (leaf.view(np.uint32) & 0xFFFF).any(), "bfloat16 would round it"
