"""The files of a checkpoint folder, and which of them are its weights."""

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clp_jax.checkpoint.safetensors.header import Shard, read_shard, stamp_of
from clp_jax.errors import InputError
from clp_jax.files import read_json_object
from clp_jax.folders import linked_file

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD = r"model-\d+-of-\d+\.safetensors"
_LEFT_OUT = (".git", ".cache")
"""Folders at the top that say where the source's own files come from; a cut is another checkpoint."""


@dataclass(frozen=True)
class Files:
    """The files below a folder.

    Attributes:
      found: by path in the folder, with "/"; where each lies, symbolic links followed.
      left_out: folders that are not looked into.
    """

    found: dict[str, Path]
    left_out: tuple[str, ...]


def list_files(folder: Path) -> Files:
    """Lists a folder without opening any file.

    Args:
      folder: absolute path.

    Raises:
      InputError: there is no such folder, or it holds a pipe, a device, or a link to somewhere else.
    """
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise InputError(f"{folder} is {what}; give a folder with config.json and the weights")
    try:
        left_out = tuple(name for name in _LEFT_OUT if (folder / name).is_dir())
        found = dict(_walk(folder, folder.resolve(), folder, left_out))
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}); copy it again") from error
    return Files(found, left_out)


def _walk(top: Path, real: Path, folder: Path, left_out: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.iterdir()):
        name, mode = path.relative_to(top).as_posix(), path.lstat().st_mode
        if name in left_out:
            continue
        if stat.S_ISLNK(mode):
            target = linked_file(path, real)
            stamp_of(target)
            yield name, target
        elif stat.S_ISDIR(mode):
            yield from _walk(top, real, path, left_out)
        elif stat.S_ISREG(mode):
            yield name, path
        else:
            raise InputError(f"{path} is a pipe, socket or device, which no checkpoint has; remove it")


def read_shards(folder: Path, files: Files) -> tuple[dict[str, Shard], dict[str, Any] | None]:
    """Reads the headers of all weights of a folder.

    Args:
      folder: the checkpoint.
      files: its files.

    Returns:
      The shards by file name, in the order in which the index first names them, and the index, None for a single file.

    Raises:
      InputError: weights are missing, left over or damaged, or the index does not fit them.
    """
    named = [name for name in files.found if name == WEIGHTS_FILE or re.fullmatch(_SHARD, name)]
    if INDEX_FILE not in files.found:
        if named != [WEIGHTS_FILE]:
            raise InputError(_without_index(folder, named))
        return {WEIGHTS_FILE: read_shard(files.found[WEIGHTS_FILE], WEIGHTS_FILE)}, None
    index = read_json_object(files.found[INDEX_FILE])
    weight_map = _weight_map(folder / INDEX_FILE, index)
    names = list(dict.fromkeys(weight_map.values()))
    if missing := [name for name in names if name not in files.found]:
        raise InputError(f"{folder / INDEX_FILE} names {missing[0]}, which is not there; copy or download it again")
    if stale := [name for name in named if name not in names]:
        raise InputError(f"{folder} holds {stale[0]}, which {INDEX_FILE} does not name; remove what does not belong")
    shards = {name: read_shard(files.found[name], name) for name in names}
    _check_index(folder, weight_map, shards)
    return shards, index


def _without_index(folder: Path, named: list[str]) -> str:
    if not named:
        return f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; give the folder with the weights"
    if WEIGHTS_FILE in named:
        return f"{folder} holds {WEIGHTS_FILE} and {named[0]}, one of several shards; remove what does not belong"
    return f"{folder} holds {named[0]}, but no {INDEX_FILE} that says what belongs to it; download it again"


def _weight_map(path: Path, index: dict[str, Any]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path} has no weight_map, or an empty one; download it again")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\x00]+\.safetensors", file):
            raise InputError(f"{path} puts {tensor!r} into {file!r}, which is no name of a file beside it; correct it")
    if not isinstance(index.get("metadata", {}), dict):
        raise InputError(f"{path} has metadata that is no JSON object; download it again")
    return weight_map


def _check_index(folder: Path, weight_map: dict[str, str], shards: dict[str, Shard]) -> None:
    """Every tensor lies in one file, the one that the index says."""
    where: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.tensors:
            if name in where:
                raise InputError(
                    f"{folder} has the tensor {name} twice, in {where[name]} and {file}; download it again"
                )
            where[name] = file
    for name, file in weight_map.items():
        if where.get(name) != file:
            place = f"but it is in {where[name]}" if name in where else "which does not hold it"
            raise InputError(f"{folder / INDEX_FILE} puts {name} into {file}, {place}; download it again")
    if extra := sorted(where.keys() - weight_map.keys()):
        raise InputError(f"{folder / where[extra[0]]} holds {extra[0]}, which {INDEX_FILE} lacks; download it again")
