"""Our own checkpoints say whose bytes are whose: exchanged, edited and damaged arrays are found by who reads them."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import toys
from safetensors_folders import SMOLVLA

from clp_jax.checkpoint import read_params, read_spec, rewrite, write_params
from clp_jax.checkpoint.manifest import checksum, listed_arrays
from clp_jax.checkpoint.safetensors.header import header_of, read_shard
from clp_jax.checkpoint.verifying import verify
from clp_jax.cli import main
from clp_jax.errors import InputError
from clp_jax.loading import load_model
from clp_jax.outputs import MANIFEST

A, B = "params.llm.w", "params.llm.v"
ROW = 2**18  # a megabyte, so that every row is a chunk


@pytest.fixture
def step(tmp_path) -> Path:
    """Two arrays of one shape, whose ends are the same: only the middle tells them apart."""
    w = np.zeros((3, ROW), np.float32)
    v = w.copy()
    v[:, ROW // 2] = np.random.default_rng(0).random(3)
    w[:, ROW // 3] = np.random.default_rng(1).random(3)
    write_params(tmp_path / "step", {"llm": {"w": w, "v": v}})
    return tmp_path / "step"


def swap(step: Path, a: str, b: str) -> None:
    (step / "params" / a).rename(step / "x")
    (step / "params" / b).rename(step / "params" / a)
    (step / "x").rename(step / "params" / b)


def reads(step: Path, out: Path):
    """Everything that reads a checkpoint."""
    yield lambda: read_params(read_spec(step))
    yield lambda: rewrite(read_spec(step), out / "all", take={})
    yield lambda: rewrite(read_spec(step), out / "some", take={"llm/w": [0, 2], "llm/v": [0, 2]})


def test_an_untouched_checkpoint_passes(step, tmp_path, capsys):
    assert verify(read_spec(step), lambda size: None).arrays == 2
    for read in reads(step, tmp_path):
        read()
    assert set(listed_arrays(read_spec(tmp_path / "some").path.parent)[A].crc32) == {"0.0", "1.0"}
    assert verify(read_spec(tmp_path / "some"), lambda size: None).arrays == 2


@pytest.mark.parametrize("wholly", [True, False])
def test_exchanged_leaves_of_one_shape_are_found(step, tmp_path, capsys, wholly):
    if wholly:
        swap(step, A, B)
    else:
        swap(step, f"{A}/1.0", f"{B}/1.0")
    for read in reads(step, tmp_path):
        with pytest.raises(InputError, match=r"the bytes that were written|other bytes than were"):
            read()
    assert {path.name for path in tmp_path.iterdir()} == {"step"}
    with pytest.raises(InputError, match=f"2 of 2 arrays .*: {A}, {B}"):
        verify(read_spec(step), lambda size: None)


def test_a_depth_that_was_edited_in_every_array_is_found_without_reading_one(step):
    for name in (A, B):
        file = step / "params" / name / ".zarray"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"shape": [2, ROW]}))
    with pytest.raises(InputError, match=rf"is float32\[2, {ROW}\] in .*, but float32\[3, {ROW}\] in its {MANIFEST}"):
        read_spec(step)


def test_a_checkpoint_without_a_manifest_loads_as_before(step):
    (step / MANIFEST).unlink()
    swap(step, A, B)
    read_params(read_spec(step))
    with pytest.raises(InputError, match="has no checksums"):
        verify(read_spec(step), lambda size: None)


def test_inspect_finds_exchanged_leaves_of_a_model_and_verify_names_them(tmp_path, capsys):
    write_params(tmp_path / "full", toys.params(toys.architecture()))
    assert main(["inspect", str(tmp_path / "full"), "--verify"]) == 0
    assert "all as they were written" in capsys.readouterr().out
    a, b = "params.PaliGemma.llm.layers.pre_attention_norm.scale", "params.PaliGemma.llm.layers.pre_ffw_norm.scale"
    swap(tmp_path / "full", a, b)
    assert main(["inspect", str(tmp_path / "full")]) == 2
    assert "does not hold the bytes that were written there" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "full"), "--verify"]) == 2
    assert f"{a}, {b}" in capsys.readouterr().err


@pytest.fixture
def policy(tmp_path) -> Path:
    """A cut SmolVLA."""
    keep = ["--keep", "0,1,2,3"]
    assert main(["prune", "--checkpoint", str(SMOLVLA), "--out", str(tmp_path / "policy"), *keep]) == 0
    return tmp_path / "policy"


def exchange(policy: Path) -> None:
    """Let the header give two tensors of one shape each other's bytes."""
    file = policy / "model.safetensors"
    shard = read_shard(file, file.name)
    by_shape = {}
    for name, tensor in shard.tensors.items():
        by_shape.setdefault((tensor.shape, tensor.dtype), []).append(name)
    a, b = next(names for names in by_shape.values() if len(names) > 1)[:2]
    tensors = dict(shard.tensors)
    tensors[a], tensors[b] = (
        tensors[a]._replace(begin=tensors[b].begin, end=tensors[b].end),
        tensors[b]._replace(begin=tensors[a].begin, end=tensors[a].end),
    )
    content = file.read_bytes()
    file.write_bytes(header_of(tensors, shard.metadata) + content[shard.data :])


def test_exchanged_tensors_of_a_folder_are_found(policy, tmp_path, capsys):
    assert verify(read_spec(policy), lambda size: None).arrays == len(read_spec(policy).tensors)
    exchange(policy)
    for words in (["inspect", str(policy)], ["prune", "--checkpoint", str(policy), "--keep", "0", "--out", "x"]):
        assert main(words) == 2
        assert "does not hold the bytes that were written there" in capsys.readouterr().err


def test_a_bit_in_the_middle_of_a_tensor_is_found_by_who_reads_it(policy, tmp_path, capsys):
    load_model(read_spec(policy), vlm_config=SMOLVLA.parent / "vlm")
    spec = read_spec(policy)
    name, tensor = max(spec.tensors.items(), key=lambda item: item[1].size)
    with (policy / "model.safetensors").open("r+b") as file:
        file.seek(spec.shards["model.safetensors"].data + tensor.begin + tensor.size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(InputError, match=f"{name} holds other bytes"):
        load_model(read_spec(policy), vlm_config=SMOLVLA.parent / "vlm")
    assert main(["prune", "--checkpoint", str(policy), "--keep", "0,1", "--out", str(tmp_path / "x")]) == 2
    assert "holds other bytes" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match=f"1 of .*: {name}; copy"):
        verify(read_spec(policy), lambda size: None)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content | {"arrays": []},
        lambda content: content | {"arrays": dict.fromkeys(content["arrays"])},
        lambda content: content | {"arrays": {name: {"shape": "x", "dtype": 1} for name in content["arrays"]}},
        lambda content: content | {"fingerprint": 3},
        lambda content: [content],
    ],
)
def test_a_damaged_manifest_is_one_line(step, change):
    file = step / MANIFEST
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(InputError, match=MANIFEST):
        read_params(read_spec(step)) and read_spec(step).identity


STATISTICS = "assets/robot/norm_stats.json"


def with_statistics(step: Path) -> Path:
    """The same checkpoint with a file of statistics beside the arrays, as prune and export write it."""
    (step / "assets/robot").mkdir(parents=True)
    (step / STATISTICS).write_text('{"norm_stats": {}}')
    (step / "assets/tokenizer.json").write_text("{}")
    rewrite(read_spec(step), step.parent / "cut", take={})
    return step.parent / "cut"


def becomes_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    "change", [lambda file: file.write_text('{"norm_stats": {"state": 0}}'), Path.unlink, becomes_a_folder]
)
@pytest.mark.parametrize("name", [STATISTICS, "assets/tokenizer.json"])
def test_statistics_that_are_not_what_was_written_are_found(step, name, change):
    cut = with_statistics(step)
    assert verify(read_spec(cut), lambda size: None).files == 2
    change(cut / name)
    with pytest.raises(
        InputError, match=rf"1 of 2 files beside the arrays .*: {name}; .* remove them from \"files\" of"
    ):
        verify(read_spec(cut), lambda size: None)


def test_what_lies_beside_without_being_listed_is_nobodys(step):
    cut = with_statistics(step)
    (cut / "notes.txt").write_text("mine")
    assert verify(read_spec(cut), lambda size: None).files == 2
    assert verify(read_spec(step), lambda size: None).files == 0


@pytest.mark.parametrize("name", ["config.json", "clp.json"])
def test_files_beside_tensors_are_listed_too_but_for_those_for_people(tmp_path, name):
    shutil.copytree(SMOLVLA, tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("for people, who may change it")
    policy = tmp_path / "policy"
    assert main(["prune", "--checkpoint", str(tmp_path / "source"), "--out", str(policy), "--keep", "0,1,2,3"]) == 0
    listed = {str(file.relative_to(policy)) for file in policy.rglob("*") if file.is_file()}
    listed -= {"model.safetensors", MANIFEST, "README.md"}
    (policy / "README.md").unlink()
    assert verify(read_spec(policy), lambda size: None).files == len(listed) > 2
    (policy / name).write_text((policy / name).read_text() + "\n")
    with pytest.raises(InputError, match=rf"1 of {len(listed)} files beside the arrays .*: {name};"):
        verify(read_spec(policy), lambda size: None)


def test_checksums_are_those_of_zlib_whoever_takes_them():
    content = np.random.default_rng(0).bytes(70_001)
    assert checksum(content[7:], checksum(content[:7])) == zlib.crc32(content)


@pytest.mark.parametrize("files", [3, ["clp.json"]])
def test_a_damaged_list_of_files_is_one_line(step, files):
    (step / MANIFEST).write_text(json.dumps(json.loads((step / MANIFEST).read_text()) | {"files": files}))
    with pytest.raises(InputError, match=f"{MANIFEST} lists files in a form"):
        verify(read_spec(step), lambda size: None)


def test_a_copy_elsewhere_passes(step, tmp_path):
    shutil.copytree(step, tmp_path / "elsewhere")
    assert verify(read_spec(tmp_path / "elsewhere"), lambda size: None).arrays == 2
