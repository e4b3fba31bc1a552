"""A header is believed only where it fits the file."""

import json

import pytest
from safetensors_folders import write_raw

from clp_jax.checkpoint.safetensors.header import HEADER_LIMIT, StoredTensor, header_of, read_shard
from clp_jax.errors import InputError


def entry(begin: int, end: int, shape=None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def read(tmp_path, header, data: bytes):
    write_raw(tmp_path / "a.safetensors", header, data)
    return read_shard(tmp_path / "a.safetensors", "a.safetensors")


def test_a_header_is_read_and_written_back(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "b": entry(4, 12), "a": entry(0, 4, []), "none": entry(12, 12, [3, 0])}
    shard = read(tmp_path, header, bytes(12))
    assert list(shard.tensors) == ["b", "a", "none"] and shard.metadata == {"format": "pt"}
    assert shard.tensors["b"] == StoredTensor("F32", (2,), "a.safetensors", 4, 12)
    text = header_of(shard.tensors, shard.metadata)
    assert len(text) % 8 == 0 and int.from_bytes(text[:8], "little") == len(text) - 8
    assert json.loads(text[8:]) == header


@pytest.mark.parametrize(("dtype", "bits"), [("F4", 4), ("F6_E2M3", 6), ("BF16", 16), ("C64", 64), ("BOOL", 8)])
def test_sizes_are_those_of_the_dtype(dtype, bits, tmp_path):
    assert read(tmp_path, {"a": entry(0, bits, [8], dtype)}, bytes(bits)).tensors["a"].dtype == dtype
    with pytest.raises(InputError, match="does not take the"):
        read(tmp_path, {"a": entry(0, bits, [9], dtype)}, bytes(bits))


def test_a_dtype_that_nobody_knows_is_bytes(tmp_path):
    assert read(tmp_path, {"a": entry(0, 7, [3], "F3_NEW")}, bytes(7)).tensors["a"].size == 7


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "'b' begins at byte 0 and overlaps with 'a', which ends at 4"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "'b' begins at byte 8 and leaves a gap after 'a'"),
        ({"a": entry(4, 8)}, 8, "leaves a gap after 'the header'"),
        ({"a": entry(0, 8)}, 4, "take 8 bytes after it, but there are 4: the file is truncated"),
        ({"a": entry(0, 4)}, 8, "take 4 bytes after it, but there are 8: the file goes on"),
        ({"a": entry(0, 4, [2])}, 4, r"'a' is F32 of shape \[2\], which does not take the 4 bytes"),
        ({"a": entry(0, 4, [-1])}, 4, "shape of 'a' is no list of whole numbers"),
        ({"a": entry(0, 4, [1.0])}, 4, "shape of 'a' is no list"),
        ({"a": entry(0, 4, [True])}, 4, "shape of 'a' is no list"),
        ({"a": entry(0, 4, "1")}, 4, "shape of 'a' is no list"),
        ({"a": entry(4, 0, [1])}, 4, "not a beginning and an end"),
        ({"a": {**entry(0, 4), "data_offsets": [0]}}, 4, "not a beginning and an end"),
        ({"a": {**entry(0, 4), "dtype": None}}, 4, "the dtype of 'a' is None"),
        ({"a": {"dtype": "F32"}}, 4, "'a' must have dtype, shape and data_offsets"),
        ({"a": 3}, 4, "'a' must have dtype"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__ is no object of strings"),
        (b"[]", 0, "no JSON object"),
        (b"{", 0, "the header of .* is no valid JSON"),
        (b"\xff\xfe", 0, "the header of .* is no valid JSON"),
        (b"[" * 100_000, 0, "the header of .* is no valid JSON"),
        (b'{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}', 0, "surrogates"),
        (b'{"a": {"dtype": "U8", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 0]}}', 0, "digits"),
        (b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "a": 1}', 0, "the key 'a' occurs twice"),
    ],
)
def test_a_damaged_header_says_what_is_wrong(header, data, match, tmp_path):
    with pytest.raises(InputError, match=match) as caught:
        read(tmp_path, header, bytes(data))
    assert "\n" not in str(caught.value) and "a.safetensors" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\1\0", (100).to_bytes(8, "little") + b"{}", b"\xff" * 8 + b"{}"])
def test_a_file_shorter_than_its_header(content, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=f"but the file has {len(content)}: it is truncated or no safetensors file"):
        read_shard(tmp_path / "a.safetensors", "a.safetensors")


def test_an_absurd_header_is_not_read(tmp_path):
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write((HEADER_LIMIT + 1).to_bytes(8, "little"))
        file.truncate(2 * HEADER_LIMIT)
    with pytest.raises(InputError, match="says that its header has 100000001 bytes"):
        read_shard(tmp_path / "a.safetensors", "a.safetensors")
