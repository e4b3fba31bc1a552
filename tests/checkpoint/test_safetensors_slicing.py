"""A cut folder: the kept tensors bit for bit under their new numbers, everything else as it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors_folders import (
    GROOT,
    GROOT_PRUNED,
    INDEX,
    SMOLVLA,
    WEIGHTS,
    change_config,
    copied,
    groot_keep,
    header_of,
    sharded,
    tensors_of,
    write_file,
    write_index,
)

from clp_jax.checkpoint import safetensors_slicing
from clp_jax.checkpoint.safetensors_folder import read_folder
from clp_jax.checkpoint.safetensors_slicing import slice_folder
from clp_jax.errors import InputError

SMOLVLA_CUTS = [[0, 1, 4, 5, 8, 11], [2, 3, 4, 9, 10]]
HEAD = "backbone.eagle_model.language_model.lm_head.weight"
EMBEDDING = "backbone.eagle_model.language_model.model.embed_tokens.weight"


def coupled(blocks: list[int]) -> dict[str, list[int]]:
    return {"vlm": blocks, "action": blocks}


def smolvla_expected(keep: list[int]) -> dict:
    """What a cut of the recorded policy must hold, found without the code under test."""
    expected = {}
    for name, tensor in tensors_of(SMOLVLA).items():
        for stack in ("text_model.layers.", "lm_expert.layers."):
            if stack in name:
                before, _, after = name.partition(stack)
                block, _, rest = after.partition(".")
                if int(block) in keep:
                    expected[f"{before}{stack}{keep.index(int(block))}.{rest}"] = tensor
                break
        else:
            expected[name] = tensor
    return expected


@pytest.mark.parametrize("keep", SMOLVLA_CUTS)
def test_a_smolvla_policy_is_cut(keep, tmp_path):
    seen = []
    report = slice_folder(
        read_folder(SMOLVLA), coupled(keep), tmp_path / "out", progress=lambda done, total: seen.append((done, total))
    )
    expected, got = smolvla_expected(keep), tensors_of(tmp_path / "out")
    assert got == expected
    config = json.loads((SMOLVLA / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"num_vlm_layers": len(keep)}
    for file in SMOLVLA.iterdir():
        if file.name not in ("config.json", WEIGHTS):
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in SMOLVLA.iterdir()}
    size = sum(len(content) for _, _, content in got.values())
    assert report.bytes_out == size and seen[-1] == (size, size)
    assert report.leaves == len(got) and report.sliced == 9 * 2 * len(keep) and report.notes == ()
    assert read_folder(tmp_path / "out").depths == {"vision": 3, "vlm": len(keep), "action": len(keep)}


def test_the_recorded_cut_of_groot_is_reproduced(tmp_path):
    slice_folder(read_folder(GROOT), groot_keep(), tmp_path / "out")
    assert tensors_of(tmp_path / "out") == tensors_of(GROOT_PRUNED)
    config, recorded = ((f / "config.json").read_text() for f in (tmp_path / "out", GROOT_PRUNED))
    assert json.loads(config) == json.loads(recorded)
    assert header_of(tmp_path / "out" / WEIGHTS)["__metadata__"] == header_of(GROOT / WEIGHTS)["__metadata__"]


@pytest.mark.parametrize(("count", "spread"), [(2, False), (3, True), (4, False)])
def test_shards_are_cut_like_one_file(count, spread, tmp_path):
    source = sharded(GROOT, tmp_path / "source", count, spread=spread)
    slice_folder(read_folder(source), groot_keep(), tmp_path / "out")
    got = tensors_of(tmp_path / "out")
    assert got == tensors_of(GROOT_PRUNED)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(len(content) for _, _, content in got.values())}
    for file in sorted(source.glob("*.safetensors")):
        cut = header_of(tmp_path / "out" / file.name)
        assert cut["__metadata__"] == {"format": "pt"}
        assert {name for name, where in index["weight_map"].items() if where == file.name} == cut.keys() - {
            "__metadata__"
        }
    assert read_folder(tmp_path / "out").depths == {"vision": 3, "llm": 5, "vl": 3, "dit": 8}


def test_a_total_of_parameters_in_the_index_is_counted_anew(tmp_path):
    source = sharded(GROOT, tmp_path / "source", 2)
    index = json.loads((source / INDEX).read_text())
    write_index(source, index["weight_map"], {"total_parameters": 1, "total_size": 1, "more": "kept"})
    slice_folder(read_folder(source), groot_keep(), tmp_path / "out")
    size = sum(len(content) for _, _, content in tensors_of(GROOT_PRUNED).values())
    metadata = json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]
    assert metadata == {"total_parameters": size // 4, "total_size": size, "more": "kept"}


def test_a_shard_that_loses_all_its_tensors_is_left_out(tmp_path):
    source, tensors = copied(GROOT, tmp_path / "source"), tensors_of(GROOT)
    alone = {name for name in tensors if ".vl_self_attention.transformer_blocks.2." in name}
    files = {"model-00001-of-00002.safetensors": tensors.keys() - alone, "model-00002-of-00002.safetensors": alone}
    for file, names in files.items():
        write_file(source / file, {name: tensors[name] for name in sorted(names)})
    write_index(source, {name: file for file, names in files.items() for name in names})
    (source / WEIGHTS).unlink()
    report = slice_folder(read_folder(source), groot_keep(), tmp_path / "out")
    assert report.notes == ("model-00002-of-00002.safetensors was left out: none of its tensors stay",)
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model-00001-of-00002.safetensors"]
    assert tensors_of(tmp_path / "out") == tensors_of(GROOT_PRUNED)


def test_tensors_keep_their_order_in_header_and_data(tmp_path):
    slice_folder(read_folder(GROOT), groot_keep(), tmp_path / "out")
    source, cut = header_of(GROOT / WEIGHTS), header_of(tmp_path / "out" / WEIGHTS)
    kept = [
        name for name in source if ".norm1.linear.weight" in name and int(name.split(".")[3]) in groot_keep()["dit"]
    ]
    numbers = [groot_keep()["dit"].index(int(name.split(".")[3])) for name in kept]
    assert [int(name.split(".")[3]) for name in cut if ".norm1.linear.weight" in name] == numbers
    others = [name for name in source if ".transformer_blocks." not in name and ".layers." not in name]
    assert [name for name in cut if ".transformer_blocks." not in name and ".layers." not in name] == others


def test_keeping_all_changes_nothing(tmp_path):
    source = copied(SMOLVLA, tmp_path / "source")
    (source / "config.json").write_text((source / "config.json").read_text() + "\n\n")
    slice_folder(read_folder(source), {}, tmp_path / "out")
    assert tensors_of(tmp_path / "out") == tensors_of(source)
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_two_cuts_are_one(tmp_path):
    slice_folder(read_folder(GROOT), {"llm": [0, 1, 3, 5, 7], "dit": [0, 1, 2, 7, 8, 11]}, tmp_path / "first")
    slice_folder(read_folder(tmp_path / "first"), {"llm": [0, 2, 4], "dit": [2, 3], "vl": [1]}, tmp_path / "second")
    slice_folder(read_folder(GROOT), {"llm": [0, 3, 7], "dit": [2, 7], "vl": [1]}, tmp_path / "once")
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


def test_the_config_keeps_its_form(tmp_path):
    slice_folder(read_folder(SMOLVLA), coupled(SMOLVLA_CUTS[0]), tmp_path / "out")
    before = (SMOLVLA / "config.json").read_text().splitlines()
    after = (tmp_path / "out" / "config.json").read_text().splitlines()
    assert [(a, b) for a, b in zip(before, after, strict=True) if a != b] == [
        ('    "num_vlm_layers": 12,', '    "num_vlm_layers": 6,')
    ]


def test_an_expert_depth_of_its_own_follows(tmp_path):
    source = copied(SMOLVLA, tmp_path / "source")
    change_config(source, lambda config: config.update(num_expert_layers=12))
    slice_folder(read_folder(source), coupled([0, 1]), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_vlm_layers"] == config["num_expert_layers"] == 2


# Bytes are copied, whatever they mean


def odd_tensors() -> dict:
    """Tensors of every kind of dtype, with random bits that are finite floats."""
    random = np.random.default_rng(0)
    finite = {"F64": (8, 0x7F, -1), "F32": (4, 0x3F, -1), "F16": (2, 0x3F, -1), "BF16": (2, 0x3F, -1)}
    finite |= {"F8_E4M3": (1, 0x3F, -1), "F8_E5M2": (1, 0x3F, -1), "F8_E8M0": (1, 0x3F, -1)}
    finite |= {"F8_E4M3FNUZ": (1, 0x3F, -1), "F8_E5M2FNUZ": (1, 0x3F, -1)}
    tensors = {}
    for dtype, (width, mask, last) in finite.items():
        bits = random.integers(0, 256, (35, width)).astype(np.uint8)
        bits[:, last] &= mask  # the highest byte, of the sign and the exponent
        tensors[f"odd.{dtype}"] = (dtype, (5, 7), bits.tobytes())
    for dtype, width in [("I64", 8), ("U64", 8), ("I32", 4), ("U16", 2), ("I8", 1), ("U8", 1), ("BOOL", 1)]:
        content = np.full(35 * width, 0xFF, np.uint8)  # NaN, if they were floats
        tensors[f"odd.{dtype}"] = (dtype, (7, 5), (content if dtype != "BOOL" else content // 255).tobytes())
    tensors["odd.scalar"] = ("F32", (), b"\0\0\x80\x3f")
    tensors["odd.empty"] = ("F32", (0, 4), b"")
    return tensors


def test_every_dtype_is_carried_bit_for_bit(tmp_path):
    source = copied(GROOT, tmp_path / "source")
    write_file(source / WEIGHTS, odd_tensors() | tensors_of(GROOT))
    slice_folder(read_folder(source), groot_keep(), tmp_path / "out")
    got = tensors_of_raw(tmp_path / "out" / WEIGHTS)
    for name, tensor in odd_tensors().items():
        assert got[name] == tensor, name
    assert {name: got[name] for name in got.keys() - odd_tensors().keys()} == tensors_of(GROOT_PRUNED)


def test_a_dtype_that_nobody_knows_is_carried(tmp_path):
    source = copied(GROOT, tmp_path / "source")
    new = {"odd": ("F3_NEW", (3, 5), bytes(range(11)))}
    write_file(source / WEIGHTS, tensors_of(GROOT) | new)
    slice_folder(read_folder(source), groot_keep(), tmp_path / "out")
    assert tensors_of_raw(tmp_path / "out" / WEIGHTS)["odd"] == new["odd"]


def tensors_of_raw(file: Path) -> dict:
    """As `tensors_of`, also for dtypes that the installed library does not know."""
    data, header = file.read_bytes(), header_of(file)
    start = 8 + int.from_bytes(data[:8], "little")
    header.pop("__metadata__", None)
    places = {name: entry["data_offsets"] for name, entry in header.items()}
    return {
        name: (entry["dtype"], tuple(entry["shape"]), data[start + places[name][0] : start + places[name][1]])
        for name, entry in header.items()
    }


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        ("F64", b"\0\0\0\0\0\0\xf0\x7f"),
        ("F32", b"\0\0\xc0\x7f"),
        ("F32", b"\0\0\x80\xff"),
        ("F16", b"\0\x7c"),
        ("BF16", b"\x80\xff"),
        ("BF16", b"\x01\x7f"[::-1] + b"\xc0\x7f"),
        ("F8_E4M3", b"\x7f"),
        ("F8_E4M3", b"\xff"),
        ("F8_E5M2", b"\x7c"),
        ("F8_E8M0", b"\xff"),
        ("F8_E4M3FNUZ", b"\x80"),
        ("F8_E5M2FNUZ", b"\x80"),
        ("C64", b"\0\0\0\0\0\0\xc0\x7f"),
    ],
)
def test_nan_and_infinity_are_refused_unless_allowed(dtype, bits, tmp_path):
    source = copied(GROOT, tmp_path / "source")
    width = {"F64": 8, "C64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(dtype, 1)
    content = bytes(width * 1000) + bits
    write_file(source / WEIGHTS, tensors_of(GROOT) | {"odd": (dtype, (len(content) // width,), content)})
    with pytest.raises(InputError, match=r"odd in .* holds NaN or infinity"):
        slice_folder(read_folder(source), groot_keep(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    slice_folder(read_folder(source), groot_keep(), tmp_path / "out", allow_nonfinite=True)
    assert tensors_of_raw(tmp_path / "out" / WEIGHTS)["odd"][2] == content


@pytest.mark.parametrize(("dtype", "bits"), [("F8_E4M3", b"\x7e"), ("F8_E5M2", b"\x7b"), ("F8_E4M3FNUZ", b"\x7f\xff")])
def test_the_largest_numbers_of_eight_bits_are_finite(dtype, bits, tmp_path):
    source = copied(GROOT, tmp_path / "source")
    write_file(source / WEIGHTS, tensors_of(GROOT) | {"odd": (dtype, (len(bits),), bits)})
    slice_folder(read_folder(source), groot_keep(), tmp_path / "out")


def test_nan_in_a_block_that_goes_does_not_matter(tmp_path):
    source, tensors = copied(GROOT, tmp_path / "source"), tensors_of(GROOT)
    name = "action_head.model.transformer_blocks.1.attn1.to_q.bias"
    dtype, shape, content = tensors[name]
    tensors[name] = (dtype, shape, b"\0\0\xc0\x7f" + content[4:])
    write_file(source / WEIGHTS, tensors)
    slice_folder(read_folder(source), groot_keep(), tmp_path / "out")
    assert tensors_of(tmp_path / "out") == tensors_of(GROOT_PRUNED)


def test_tensors_longer_than_a_block_and_a_span(tmp_path, monkeypatch):
    monkeypatch.setattr("clp_jax.checkpoint.safetensors_copying.BLOCK_BYTES", 64)
    monkeypatch.setattr("clp_jax.checkpoint.safetensors_copying.SPAN_BYTES", 200)
    slice_folder(read_folder(GROOT), groot_keep(), tmp_path / "out")
    assert tensors_of(tmp_path / "out") == tensors_of(GROOT_PRUNED)


# The tied head of GR00T


def test_a_head_alone_gets_its_embedding_table(tmp_path):
    source, tensors = copied(GROOT, tmp_path / "source"), tensors_of(GROOT)
    table = tensors.pop(EMBEDDING)
    write_file(source / WEIGHTS, tensors)
    report = slice_folder(read_folder(source), groot_keep(), tmp_path / "out")
    assert report.notes == (f"{EMBEDDING} was added with the bytes of {HEAD}, because stock loaders need it",)
    got = tensors_of(tmp_path / "out")
    assert got[EMBEDDING] == got[HEAD] == table and got == tensors_of(GROOT_PRUNED)
    shards = sharded(source, tmp_path / "shards", 3)
    slice_folder(read_folder(shards), groot_keep(), tmp_path / "cut")
    assert tensors_of(tmp_path / "cut") == got
    read_folder(tmp_path / "cut")  # the index names the new tensor


@pytest.mark.parametrize("absent", [[], [HEAD]])
def test_an_embedding_table_is_enough(absent, tmp_path):
    source, tensors = copied(GROOT, tmp_path / "source"), tensors_of(GROOT)
    for name in absent:
        del tensors[name]
    write_file(source / WEIGHTS, tensors)
    report = slice_folder(read_folder(source), groot_keep(), tmp_path / "out")
    expected = {name: tensor for name, tensor in tensors_of(GROOT_PRUNED).items() if name not in absent}
    assert report.notes == () and tensors_of(tmp_path / "out") == expected


# Files around the weights


def test_other_files_are_carried_and_bookkeeping_is_not(tmp_path):
    source = copied(GROOT, tmp_path / "source")
    for name in ("experiment_cfg/metadata.json", ".git/config", ".cache/huggingface/x.metadata", "a/.git", "README.md"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"\xff" + name.encode())
    (source / "clp.json").write_text("{}")
    report = slice_folder(read_folder(source), groot_keep(), tmp_path / "out")
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"config.json", WEIGHTS, "experiment_cfg/metadata.json", "a/.git", "README.md"}
    assert (tmp_path / "out/experiment_cfg/metadata.json").read_bytes() == b"\xffexperiment_cfg/metadata.json"
    assert [note.split()[0] for note in report.notes] == [".git", ".cache"]


def test_links_of_the_hubs_cache_become_files(tmp_path):
    snapshot, blobs = tmp_path / "models" / "snapshots" / "0", tmp_path / "models" / "blobs"
    (snapshot / "experiment_cfg").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "m").write_text("{}")
    (snapshot / "experiment_cfg" / "metadata.json").symlink_to("../../../blobs/m")
    for name in ("config.json", WEIGHTS):
        (blobs / name[:1]).write_bytes((GROOT / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{name[:1]}")
    (blobs / "m").write_bytes((GROOT / WEIGHTS).read_bytes())
    slice_folder(read_folder(snapshot), groot_keep(), tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert tensors_of(tmp_path / "out") == tensors_of(GROOT_PRUNED)


# What cannot be meant


@pytest.mark.parametrize(
    ("keep", "match"),
    [
        ({"llm": []}, "cannot keep blocks \\[\\] of tower 'llm'"),
        ({"llm": [0, 12]}, "increasing numbers from 0 to 11"),
        ({"llm": [-1, 3]}, "increasing numbers from 0 to 11"),
        ({"llm": [3, 3]}, "increasing numbers"),
        ({"expert": [0]}, "no tower 'expert'; its towers are vision, llm, vl, dit"),
        ({"vision": [0, 1]}, "tower 'vision' must keep its 3 blocks"),
        ({"dit": [0, 3, 5]}, "tower 'dit': block 5 cannot take place 2, .*; keep 4 instead, or keep 6 instead"),
    ],
)
def test_blocks_that_cannot_be_kept(keep, match, tmp_path):
    with pytest.raises(InputError, match=match):
        slice_folder(read_folder(GROOT), keep, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_coupled_towers_keep_the_same_blocks(tmp_path):
    with pytest.raises(InputError, match=r"'vlm' and 'action' share one stack .*\[0, 1\] and \[0, 3\]"):
        slice_folder(read_folder(SMOLVLA), {"vlm": [0, 1], "action": [0, 3]}, tmp_path / "out")
    with pytest.raises(InputError, match="'vlm' and 'action' share one stack"):
        slice_folder(read_folder(SMOLVLA), {"vlm": [0, 1]}, tmp_path / "out")


def test_an_output_that_is_in_the_way(tmp_path):
    source = copied(SMOLVLA, tmp_path / "source")
    spec = read_folder(source)
    for out in (source, source / "inside", tmp_path):
        with pytest.raises(InputError, match="overlaps with the input"):
            slice_folder(spec, {}, out, overwrite=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        slice_folder(spec, {}, tmp_path / "out")
    with pytest.raises(InputError, match="is remote"):
        slice_folder(spec, {}, "gs://bucket/out")
    slice_folder(spec, {}, tmp_path / "out", overwrite=True)
    assert tensors_of(tmp_path / "out") == tensors_of(source)


# A source that changes


def rewritten(file: Path) -> None:
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(0, 0))


def replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(0, file.stat().st_mtime_ns))
    other.replace(file)


@pytest.mark.parametrize("change", [rewritten, replaced])
@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "policy_preprocessor.json"])
def test_a_source_that_changes_is_no_mixture(change, name, tmp_path):
    source = copied(SMOLVLA, tmp_path / "source")
    spec = read_folder(source)
    with pytest.raises(InputError, match=f"{name} changed while it was read"):
        slice_folder(
            spec,
            {},
            tmp_path / "out",
            progress=lambda done, total: change(source / name) if done == total else None,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_bytes_that_change_under_the_same_stamp_are_seen(tmp_path):
    source = copied(SMOLVLA, tmp_path / "source")
    stamp = (source / WEIGHTS).stat().st_mtime_ns

    def overwrite(done, total):
        if done == total:
            with (source / WEIGHTS).open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x11")
            os.utime(source / WEIGHTS, ns=(stamp, stamp))

    with pytest.raises(InputError, match="changed while it was read"):
        slice_folder(read_folder(source), {}, tmp_path / "out", progress=overwrite)


def test_a_source_that_was_replaced_before_is_read_again(tmp_path):
    source = copied(SMOLVLA, tmp_path / "source")
    spec = read_folder(source)
    replaced(source / WEIGHTS)
    with pytest.raises(InputError, match="changed while it was read"):
        slice_folder(spec, {}, tmp_path / "out")


def test_a_source_that_shrinks_while_it_is_read(tmp_path):
    source = copied(SMOLVLA, tmp_path / "source")
    spec, size = read_folder(source), (source / WEIGHTS).stat().st_size

    def shrink(done, total):
        os.truncate(source / WEIGHTS, size // 2)

    with pytest.raises(InputError, match=r"became shorter while it was read|changed while it was read"):
        slice_folder(spec, {}, tmp_path / "out", progress=shrink)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Complete or absent

CUT_FOR_EVER = """
import sys
from clp_jax.checkpoint.safetensors_folder import read_folder
from clp_jax.checkpoint.safetensors_slicing import slice_folder
spec = read_folder(sys.argv[1])
print("ready", flush=True)
while True:
    slice_folder(spec, {"llm": [0, 1, 2, 10, 11], "dit": [0, 3]}, sys.argv[2], overwrite=True)
"""


def test_a_kill_at_any_moment_leaves_a_complete_folder_or_none(tmp_path):
    out, root = tmp_path / "out", str(Path(__file__).parent.parent.parent)
    random = np.random.default_rng(0)
    slice_folder(read_folder(GROOT), {"llm": [0, 1, 2, 10, 11], "dit": [0, 3]}, tmp_path / "expected")
    expected = tensors_of(tmp_path / "expected")
    for _ in range(3):
        command = [sys.executable, "-c", CUT_FOR_EVER, str(GROOT), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(random.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
        if out.exists():
            assert tensors_of(out) == expected
    slice_folder(read_folder(GROOT), {"llm": [0, 1, 2, 10, 11], "dit": [0, 3]}, out, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "expected"}


def test_a_failure_after_the_weights_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_slicing, "write_beside", fail)
    with pytest.raises(KeyboardInterrupt):
        slice_folder(read_folder(GROOT), {}, tmp_path / "out")
    assert not any(tmp_path.iterdir())
