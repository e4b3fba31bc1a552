"""Every kind of file that a user can give is read, or refused in one line that names it."""

import json
import os
import stat
import zipfile

import numpy as np
import pytest

from clp_jax.errors import InputError
from clp_jax.files import (
    check_all_regular,
    check_regular,
    read_archive,
    read_bytes,
    read_json,
    read_json_object,
    read_text,
)

DEEP = "[" * 100_000 + "]" * 100_000


def refused(file, read, message):
    with pytest.raises(InputError, match=message) as caught:
        read(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("read", [read_bytes, read_text, read_json, read_json_object, read_archive])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "circle", "nothing"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, read, kind):
    file = tmp_path / "file"
    make = {
        "pipe": lambda: os.mkfifo(file),
        "socket": lambda: os.mknod(file, stat.S_IFSOCK | 0o600),
        "device": lambda: file.symlink_to("/dev/zero"),
        "folder": file.mkdir,
        "circle": lambda: file.symlink_to("file"),
        "nothing": lambda: None,
    }
    make[kind]()
    refused(file, read, "no regular file|cannot be read")


@pytest.mark.parametrize("read", [read_bytes, read_json, read_archive, check_regular])
def test_what_git_lfs_left_in_place_of_a_file_is_named_as_such(tmp_path, read):
    file = tmp_path / "file"
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n")
    refused(file, read, "is a pointer of Git LFS.*run git lfs pull")


def test_a_pipe_deep_in_a_folder_is_named(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    os.mknod(tmp_path / "a" / "b" / "pipe", stat.S_IFIFO | 0o600)
    with pytest.raises(InputError, match=r"a/b/pipe is no regular file"):
        check_all_regular(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "nested too deeply"),
        ("[" * 200 + "]" * 200, "nested more than 64 deep"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ("9" * 5000, "digits"),
        ('{"a": "\\ud800"}', "surrogates"),
        ("{", "no valid JSON: line 1"),
        ("", "no valid JSON"),
    ],
)
def test_json_that_nobody_can_use(tmp_path, text, message):
    file = tmp_path / "file.json"
    file.write_text(text)
    refused(file, read_json, message)


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "[1e400]"])
def test_numbers_beyond_json_only_where_they_may_be(tmp_path, text):
    file = tmp_path / "file.json"
    file.write_text(text)
    read_json(file)
    refused(file, lambda path: read_json(path, finite=True), "no JSON number|beyond float64")


def test_text_that_is_none(tmp_path):
    file = tmp_path / "file.json"
    file.write_bytes(b"\xff\xfe{")
    refused(file, read_json, "no text in UTF-8")
    file.write_text("[1]")
    refused(file, read_json_object, r"must hold a JSON object \{...\}, not \[1\]")


@pytest.mark.slow
def test_a_file_without_end_is_not_read_to_its_end(tmp_path):
    file = tmp_path / "file.json"
    file.touch()
    os.truncate(file, 2**40)  # takes no place
    refused(file, read_json, "far too long")


def test_an_archive_comes_back(tmp_path):
    arrays = {"a/b": np.arange(6.0).reshape(2, 3), "flag": np.array(True), "text": np.array("text")}
    np.savez_compressed(tmp_path / "file.npz", **arrays)
    found = read_archive(tmp_path / "file.npz")
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array)
        assert found[key].dtype == array.dtype


def test_an_archive_that_lies_about_its_sizes(tmp_path):
    file = tmp_path / "file.npz"
    np.savez(file, a=np.zeros((7, 3)))
    content = file.read_bytes()
    file.write_bytes(content.replace(b"'shape': (7, 3)", b"'shape': (7777777777777, 3)"[: len(b"'shape': (7, 3)")]))
    refused(file, read_archive, "cannot be read")
    with zipfile.ZipFile(file, "w") as archive, archive.open("a.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (2**40,)})
        member.write(bytes(80))
    refused(file, read_archive, r"a.npy says that it is float64 of shape \(1099511627776,\), but has 80 bytes")


def test_an_archive_that_is_a_bomb(tmp_path):
    file = tmp_path / "file.npz"
    np.savez_compressed(file, a=np.zeros(10**6))
    refused(file, lambda path: read_archive(path, 10**6), r"unpacks to 8,000,128 bytes, more than 1,000,000")


def test_an_archive_of_objects_or_none_at_all(tmp_path):
    file = tmp_path / "file.npz"
    np.savez(file, a=np.array([{}], object))
    refused(file, read_archive, "cannot be read")
    np.save(tmp_path / "bare.npy", np.zeros(3))
    refused(tmp_path / "bare.npy", read_archive, "one bare array")
    file.write_text(json.dumps({}))
    refused(file, read_archive, "not a zip file")


def test_a_flipped_bit_of_an_archive_is_found(tmp_path):
    file = tmp_path / "file.npz"
    np.savez(file, a=np.arange(1000.0))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    refused(file, read_archive, "CRC")
