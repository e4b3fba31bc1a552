"""Bytes on their way: any dtype, no NaN, no mixture of two sources, complete or absent."""

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
    SMOLVLA,
    WEIGHTS,
    copied,
    groot_keep,
    header_of,
    tensors_of,
    write_file,
)

from clp_jax.checkpoint.safetensors import slicing as safetensors_slicing
from clp_jax.checkpoint.safetensors.folder import read_folder
from clp_jax.checkpoint.safetensors.slicing import slice_folder
from clp_jax.errors import InputError

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


@pytest.mark.slow
def test_tensors_longer_than_a_block_and_a_span(tmp_path, monkeypatch):
    monkeypatch.setattr("clp_jax.checkpoint.safetensors.copying.BLOCK_BYTES", 64)
    monkeypatch.setattr("clp_jax.checkpoint.safetensors.copying.SPAN_BYTES", 200)
    slice_folder(read_folder(GROOT), groot_keep(), tmp_path / "out")
    assert tensors_of(tmp_path / "out") == tensors_of(GROOT_PRUNED)


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


@pytest.mark.parametrize("name", ["policy_preprocessor.json", "config.json"])
def test_a_source_that_vanishes_while_it_is_read(name, tmp_path):
    source = copied(SMOLVLA, tmp_path / "source")
    spec = read_folder(source)
    with pytest.raises(InputError, match=rf"{name} (cannot be read|changed while)") as caught:
        slice_folder(
            spec,
            {"vlm": [0, 1], "action": [0, 1]},
            tmp_path / "out",
            progress=lambda done, total: (source / name).unlink(missing_ok=True),
        )
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["source"]


# Complete or absent

CUT_FOR_EVER = """
import sys
from clp_jax.checkpoint.safetensors.folder import read_folder
from clp_jax.checkpoint.safetensors.slicing import slice_folder
spec = read_folder(sys.argv[1])
print("ready", flush=True)
while True:
    slice_folder(spec, {"llm": [0, 1, 2, 10, 11], "dit": [0, 3]}, sys.argv[2], overwrite=True)
"""


@pytest.mark.slow
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
