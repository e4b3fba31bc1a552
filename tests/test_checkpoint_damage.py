"""Damaged, foreign and half-written checkpoints: one clear line, and no output."""

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from checkpoints import RECORDED, save_by_orbax, toy_params

from clp_jax.checkpoint import read_params, read_spec, rewrite, write_params
from clp_jax.errors import InputError


@pytest.fixture
def copied(tmp_path):
    """A recorded checkpoint that a test may damage, and the biggest of its files."""
    shutil.copytree(RECORDED / "pi0_fast_released", tmp_path / "step")
    params = tmp_path / "step" / "params"
    return params, max((f for f in params.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def prune(params: Path, out: Path) -> None:
    rewrite(read_spec(params), out, take=lambda path: [0, 17] if "/llm/layers/" in path else None)


def refused(params: Path, tmp_path: Path, message: str) -> None:
    """Every road from `params` ends in an InputError, and nothing is left of an output."""
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(InputError, match=message) as caught:
        prune(params, tmp_path / "out")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        read_params(read_spec(params))
    assert {p.name for p in tmp_path.iterdir()} == before


def test_missing_data_file(copied, tmp_path):
    params, biggest = copied
    biggest.unlink()
    refused(params, tmp_path, "cannot be read.*incomplete")


@pytest.mark.parametrize("left", [0, 0.5, 0.99])
def test_truncated_data_file(left, copied, tmp_path):
    params, biggest = copied
    content = biggest.read_bytes()
    biggest.write_bytes(content[: int(left * len(content))])
    refused(params, tmp_path, "damaged")


def test_overwritten_bytes_in_data(copied, tmp_path):
    params, biggest = copied
    content = bytearray(biggest.read_bytes())
    content[:: len(content) // 50] = bytes(len(content[:: len(content) // 50]))
    biggest.write_bytes(content)
    refused(params, tmp_path, "damaged|NaN")


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_one_flipped_bit_of_our_own_output_is_found_by_every_reader(where, tmp_path):
    # Orbax's own zstd frames hold no checksum, so there a flipped bit within the data can pass for another weight.
    values = np.random.default_rng(0).normal(size=(4, 3000)).astype(np.float32)
    write_params(tmp_path / "step", {"llm": {"layers": {"w": values}}})
    params = tmp_path / "step" / "params"
    [chunk] = (params / "params.llm.layers.w").glob("0.*")
    content = bytearray(chunk.read_bytes())
    content[int(where * values.nbytes)] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be decoded.*damaged"):
        read_params(read_spec(params))
    with pytest.raises(InputError, match=r"cannot be decoded.*damaged"):
        rewrite(read_spec(params), tmp_path / "out", take={})
    store = {"driver": "zarr", "kvstore": f"file://{params}/params.llm.layers.w/"}
    with pytest.raises(ValueError, match="checksum"):  # tensorstore is what Orbax reads with
        ts.open(store).result().read().result()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_missing_metadata(name, copied, tmp_path):
    params, _ = copied
    (params / name).unlink()
    refused(params, tmp_path, "incomplete|damaged")


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\x00" * 500])
def test_scrambled_metadata(name, content, copied, tmp_path):
    params, _ = copied
    (params / name).write_bytes(content)
    refused(params, tmp_path, "damaged|no valid JSON|must hold a JSON object")


def test_index_with_a_flipped_bit(copied, tmp_path):
    params, _ = copied
    index = next((params / "d").iterdir())
    content = bytearray(index.read_bytes())
    content[len(content) // 2] ^= 1
    index.write_bytes(content)
    refused(params, tmp_path, "damaged")


def test_metadata_that_lists_other_parameters(copied, tmp_path):
    params, _ = copied
    metadata = json.loads((params / "_METADATA").read_text())
    key, entry = metadata["tree_metadata"].popitem()
    metadata["tree_metadata"][key.replace("'params'", "'params', 'more'")] = entry
    (params / "_METADATA").write_text(json.dumps(metadata))
    refused(params, tmp_path, "listed but not stored.*more")


def test_missing_chunk(tmp_path):
    save_by_orbax(tmp_path / "step", toy_params(), use_ocdbt=False)
    (tmp_path / "step" / "params" / "params.img.kernel" / "0.0").unlink()
    with pytest.raises(InputError, match=r"params.img.kernel lacks chunk \(0, 0\)"):
        rewrite(read_spec(tmp_path / "step"), tmp_path / "out", take={})
    assert not (tmp_path / "out").exists()


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(InputError, match="there is no checkpoint at"):
        read_spec(tmp_path / "missing")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    with pytest.raises(InputError, match=r"has no config\.json"):
        read_spec(tmp_path)
    with pytest.raises(InputError, match="is not an Orbax checkpoint"):
        read_spec(tmp_path / "model.safetensors")


def test_a_run_folder_names_its_last_step(tmp_path):
    for step in ("9", "10"):
        shutil.copytree(RECORDED / "pi0_fast_released", tmp_path / "run" / step)
    with pytest.raises(InputError, match=r"is a training run; give one of its steps, e.g. .*run/10$"):
        read_spec(tmp_path / "run")


def test_an_unfinished_save_is_no_checkpoint(copied, tmp_path):
    params, _ = copied
    unfinished = params.rename(params.with_name("params.orbax-checkpoint-tmp-0"))
    with pytest.raises(InputError, match="temporary folder of an unfinished save"):
        read_spec(unfinished)
    with pytest.raises(InputError, match="holds only an unfinished save"):
        read_spec(tmp_path / "step")


def test_an_item_that_is_not_params_alone(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "train_state", {"params": {"w": np.ones(3)}, "step": np.ones(1)})
    with pytest.raises(InputError, match=r"holds \['params', 'step'\], not only 'params'"):
        read_spec(tmp_path / "train_state")


def test_a_full_disk(copied, tmp_path):
    params, _ = copied
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # stands in for a full disk: writing fails with OSError
    try:
        with pytest.raises(OSError, match=rf"File too large; check the space left there: '{tmp_path / 'out'}'"):
            prune(params, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_nothing_is_printed_on_the_way(copied, tmp_path, capfd):
    params, biggest = copied
    prune(params, tmp_path / "out")
    read_params(read_spec(tmp_path / "out"))
    shutil.rmtree(tmp_path / "out")
    biggest.unlink()
    refused(params, tmp_path, "incomplete")
    assert capfd.readouterr() == ("", "")
