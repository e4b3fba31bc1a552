"""Files that nobody reads: carried with their holes, counted before anything is written."""

import types

import numpy as np
import pytest
import toys
from etils import epath
from safetensors_folders import GOLDEN, GROOT, SMOLVLA, copied, groot_keep

from clp_jax import cli
from clp_jax.checkpoint import carrying, write_params
from clp_jax.checkpoint.safetensors.folder import read_folder
from clp_jax.checkpoint.safetensors.slicing import slice_folder

GIB = 2**30


def sparse(file, size, *stretches):
    """A file of zeros that takes no room, but for bytes at these places; skips where there are no holes."""
    with file.open("wb") as stream:
        stream.truncate(size)
        for place, content in stretches:
            stream.seek(place)
            stream.write(content)
    if file.stat().st_blocks * 512 > size // 2:
        pytest.skip("this file system stores holes as zeros")
    return file


@pytest.mark.parametrize(
    "stretches",
    [(), ((0, b"begin"),), ((GIB - 3, b"across a GiB"), (5 * GIB + 1, b"middle")), ((64 * GIB - 3, b"end"),)],
    ids=["a hole", "begin", "middle", "end"],
)
def test_holes_stay_holes(stretches, tmp_path):
    source = sparse(tmp_path / "big", 64 * GIB, *stretches)
    parts = []
    carrying.copy_all({"a/big": source}, tmp_path / "out", parts.append)
    copy = tmp_path / "out" / "a" / "big"
    assert copy.stat().st_size == 64 * GIB and copy.stat().st_blocks == source.stat().st_blocks
    assert sum(parts) == carrying.size_to_copy(source) < GIB
    with copy.open("rb") as stream:
        for place, content in stretches:
            stream.seek(place)
            assert stream.read(len(content)) == content


@pytest.mark.parametrize("size", [0, 1, 2**20, 3 * 2**20 + 7])
def test_a_file_is_copied_whole(size, tmp_path):
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(content)
    carrying.copy_all({"file": tmp_path / "file"}, tmp_path / "out")
    assert (tmp_path / "out" / "file").read_bytes() == content


def test_a_sparse_file_beside_the_weights_ends_and_is_counted(tmp_path):
    source = copied(GROOT, tmp_path / "source")
    sparse(source / "optimizer.pt", 8 * GIB, (GIB, b"state" * 10**6))
    done = []
    report = slice_folder(read_folder(source), groot_keep(), tmp_path / "out", progress=lambda *x: done.append(x))
    copy = tmp_path / "out" / "optimizer.pt"
    assert copy.stat().st_size == 8 * GIB and copy.stat().st_blocks * 512 < GIB
    assert done[-1][0] == done[-1][1] >= report.bytes_out + 5 * 10**6


@pytest.fixture
def nearly_full(monkeypatch):
    """A disk with 10 MB left."""
    monkeypatch.setattr(carrying.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**7))


def orbax(folder):
    """A toy π0 with assets, of which a file has 20 MB."""
    (folder / "stats" / "robot").mkdir(parents=True)
    (folder / "stats" / "robot" / "film.bin").write_bytes(b"x" * 2 * 10**7)
    write_params(folder / "full", toys.params(toys.architecture("pi0")), assets=folder / "stats")
    return folder / "full"


@pytest.mark.usefixtures("nearly_full")
@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
@pytest.mark.parametrize("command", ["prune", "export"])
def test_what_does_not_fit_is_said_before_anything_is_written(kind, command, tmp_path, capsys):
    if kind == "orbax":
        source, to = orbax(tmp_path), ["openpi"]
    else:
        source, to = (
            copied(SMOLVLA, tmp_path / "source"),
            ["stablehlo", "--vlm-config", str(GOLDEN / "smolvla" / "vlm")],
        )
        (source / "film.bin").write_bytes(b"x" * 2 * 10**7)
    words = {"prune": ["--keep", "0,1"], "export": ["--to", *to]}[command]
    before = sorted(tmp_path.iterdir())
    assert cli.main([command, "--checkpoint", str(source), "--out", str(tmp_path / "new" / "out"), *words]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith(f"error: {tmp_path / 'new' / 'out'}: it needs ")
        and "other files (the largest: " in error
        and "film.bin, 0.02 GB" in error
    )
    assert "its disk has 0.01 GB left" in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("nearly_full")
def test_what_is_remote_has_no_known_end(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 2 * 10**7)
    assert carrying.check_room("gs://bucket/out", [epath.Path(tmp_path / "file")]) == 2 * 10**7


def test_the_topmost_folder_is_refused_in_one_line(tmp_path, capsys):
    full = orbax(tmp_path)
    for words in (["prune", "--keep", "0"], ["export", "--to", "openpi"]):
        assert cli.main([*words, "--checkpoint", str(full), "--out", "/"]) == 2
        assert "/ exists already" in capsys.readouterr().err
