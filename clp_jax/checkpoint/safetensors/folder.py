"""Checkpoints that are folders of safetensors files: what one holds, from the headers and the config alone.

A folder has a ``config.json``, one ``model.safetensors`` or several shards with ``model.safetensors.index.json``, and
files around them (processors, statistics, a model card). What a tower and its blocks are, ``clp_jax.models.stored``
says for each family; nothing here loads a model.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from clp_jax.checkpoint.manifest import Listed, check_arrays, check_identity, listed_arrays
from clp_jax.checkpoint.orbax.spec import RECORD_FILE
from clp_jax.checkpoint.record import read_record
from clp_jax.checkpoint.safetensors.header import Shard, Stamp, StoredTensor, opened_to_read, read_exactly, stamp_of
from clp_jax.checkpoint.safetensors.listing import INDEX_FILE, Files, list_files, read_shards
from clp_jax.errors import InputError, blamed_on
from clp_jax.files import read_json_object
from clp_jax.folders import is_remote
from clp_jax.models.stored import StoredFamily, StoredTower, stored_families
from clp_jax.models.towers import Shape, Tower
from clp_jax.outputs import MANIFEST

CONFIG_FILE = "config.json"
_END_BYTES = 512
_FLOATS = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}


@dataclass(frozen=True)
class FolderSpec:
    """What a folder of safetensors files holds.

    Attributes:
      path: the folder.
      family: whose folder it is.
      config: content of ``config.json``.
      shards: the files of the weights, by name, in the order in which the index first names them.
      index: content of ``model.safetensors.index.json``; None for a single file.
      tensors: all tensors by name, shard by shard in the order of their headers.
      depths: blocks of every tower, in data-flow order.
      others: every other file to carry over, by its path in the folder; symbolic links followed.
      stamps: of the files in `others` and of the two JSON files.
      left_out: folders of version control and of downloads, which describe the source alone.
      plan_record: content of ``clp.json``, if there is one.
    """

    path: Path
    family: StoredFamily
    config: dict[str, Any]
    shards: dict[str, Shard]
    index: dict[str, Any] | None
    tensors: dict[str, StoredTensor]
    depths: dict[str, int]
    others: dict[str, Path]
    stamps: dict[str, Stamp]
    left_out: tuple[str, ...]
    plan_record: dict[str, Any] | None

    @functools.cached_property
    def identity(self) -> str:
        """The fingerprint when it was first asked for, compared with the manifest's where there is one.

        Raises:
          InputError: the manifest has another.
        """
        found = fingerprint_folder(self)
        check_identity(self.folder, found)
        return found

    @property
    def folder(self) -> epath.Path:
        """Where the files are that say what shapes do not."""
        return epath.Path(self.path)

    @property
    def assets(self) -> epath.Path:
        """Where statistics and tokenizer are."""
        return epath.Path(self.path)

    @property
    def kind(self) -> str:
        """Kind of the model."""
        return self.family.kind

    @property
    def towers(self) -> tuple[StoredTower, ...]:
        """The towers, in data-flow order."""
        return self.family.towers(self.config)

    @property
    def shape(self) -> Shape:
        """What a plan must fit."""
        towers = tuple(
            Tower(tower.name, self.depths[tower.name], tower.period, optional=tower.uncuttable is not None)
            for tower in self.towers
        )
        alone = tuple((tower.name,) for tower in towers if tower.optional)
        return Shape(self.kind, towers, (*self.groups, *alone))

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the towers that keep the same blocks."""
        return self.family.groups

    def block_of(self, tensor: str) -> tuple[str, int, str] | None:
        """The tower and block of a tensor, and its name with ``{block}`` for the number; None outside of towers."""
        return block_of(self.towers, tensor)


def read_folder(path: str | os.PathLike[str]) -> FolderSpec:
    """Reads what a folder of safetensors files holds; no tensor is read.

    Every contradiction within the folder is an error: between the index and the files, between the headers and the
    sizes of the files, and between the tensors and the depths in ``config.json``.

    Args:
      path: local folder with ``config.json`` and the weights. A snapshot of the hub's cache, whose files are symbolic
        links into its ``blobs``, is one too.

    Returns:
      Names, shapes, dtypes and places of the tensors, and what lies beside them.

    Raises:
      InputError: it is no folder of a family that is known, or it is damaged, with one line that says what to do.
    """
    if is_remote(path):
        raise InputError(f"{os.fspath(path)} is remote: copy this folder of safetensors files to a local disk first")
    folder = Path(path).expanduser().absolute()
    files = list_files(folder)
    config = _config(folder, files)
    family = _family(folder, config)
    with blamed_on(folder / CONFIG_FILE, verb="cannot be used"):
        if (reason := family.why_not(config)) is not None:
            raise InputError(f"{folder} {reason}")
        family.towers(config)
    shards, index = read_shards(folder, files)
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.tensors.items()}
    used = {CONFIG_FILE, INDEX_FILE, RECORD_FILE, MANIFEST, *shards}
    if (listed := listed_arrays(epath.Path(folder))) is not None:
        found = {name: Listed(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        check_arrays(epath.Path(folder), listed, found)
    stamps = {name: stamp_of(place) for name, place in files.found.items() if name not in shards}
    record = files.found.get(RECORD_FILE)
    return FolderSpec(
        path=folder,
        family=family,
        config=config,
        shards=shards,
        index=index,
        tensors=tensors,
        depths=_depths(folder, family, config, tensors),
        others={name: place for name, place in files.found.items() if name not in used},
        stamps=stamps,
        left_out=files.left_out,
        plan_record=None if record is None else read_record(epath.Path(record)),
    )


def stored_shapes(spec: FolderSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of all tensors by name.

    Raises:
      InputError: a tensor is of a dtype that no model has.
    """
    found = {}
    for name, tensor in spec.tensors.items():
        if tensor.dtype not in _FLOATS:
            raise InputError(f"{name} of {spec.path} is stored as {tensor.dtype}; a model needs {', '.join(_FLOATS)}.")
        found[name] = jax.ShapeDtypeStruct(tensor.shape, _FLOATS[tensor.dtype])
    return found


def is_safetensors_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path looks like a folder of safetensors files, for who must choose between `read_folder` and others.

    Looks are all that is asked for: `read_folder` says what is wrong with a folder that is damaged.
    """
    if is_remote(path):
        return False
    folder = Path(path).expanduser()
    return (folder / CONFIG_FILE).is_file() or (folder.is_dir() and any(folder.glob("*.safetensors*")))


def fingerprint_folder(spec: FolderSpec) -> str:
    """Returns a short identity of a checkpoint that stays the same when its folder is copied.

    It covers the config, the names, dtypes, shapes and places of all tensors, and the bytes at both ends of each: any
    training step changes those. Tensors are not read whole, so it does not prove that a checkpoint is undamaged. The
    processors and the model card are not covered.

    Args:
      spec: the checkpoint; the files are read again.

    Returns:
      SHA-256 as 64 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(spec.config, sort_keys=True).encode())
    for name, shard in spec.shards.items():
        digest.update(f"{name} {stamp_of(shard.path).size}\n".encode())
        with opened_to_read(shard.path) as descriptor:
            for tensor_name, tensor in shard.tensors.items():
                digest.update(f"{tensor_name} {tensor.dtype}{list(tensor.shape)} {tensor.begin}\n".encode())
                count = min(tensor.size, _END_BYTES)
                ends = bytearray(2 * count)
                first, last = memoryview(ends)[:count], memoryview(ends)[count:]
                read_exactly(descriptor, first, shard.data + tensor.begin, shard.path)
                read_exactly(descriptor, last, shard.data + tensor.end - count, shard.path)
                digest.update(ends)
    return digest.hexdigest()


def check_stamps(spec: FolderSpec) -> None:
    """Raises an `InputError` if a file of a folder is no longer the one that was there when it was listed."""
    stamps = {spec.path / name: stamp for name, stamp in spec.stamps.items()}
    stamps |= {spec.path / name: shard.stamp for name, shard in spec.shards.items()}
    if changed := [path for path, stamp in stamps.items() if stamp_of(path) != stamp]:
        raise InputError(f"{changed[0]} changed while it was read; let what writes it finish, then try again")


def block_of(towers: Iterable[StoredTower], tensor: str) -> tuple[str, int, str] | None:
    """The tower and block of a tensor, and its name with ``{block}`` for the number; None outside of towers."""
    for tower in towers:
        if (found := tower.block_of(tensor)) is not None:
            return tower.name, *found
    return None


def _config(folder: Path, files: Files) -> dict[str, Any]:
    if CONFIG_FILE not in files.found:
        if (folder / "pretrained_model").is_dir():
            raise InputError(f"{folder} is a training step of lerobot; give its folder {folder / 'pretrained_model'}")
        held = ", ".join(sorted(files.found)[:3]) or "no files"
        raise InputError(f"{folder} has no {CONFIG_FILE}; it holds {held}: give a policy folder of lerobot or NVIDIA's")
    return read_json_object(files.found[CONFIG_FILE])


def _family(folder: Path, config: Mapping[str, Any]) -> StoredFamily:
    """The family whose config this is."""
    families = stored_families()
    for family in families:
        if family.recognises(config):
            return family
    says = {key: config[key] for key in ("type", "model_type", "architectures") if key in config}
    found = ", ".join(f"{key} {value!r}" for key, value in says.items()) or f"only the keys {sorted(config)[:5]}"
    known = ", ".join(family.kind for family in families)
    raise InputError(f"{folder / CONFIG_FILE} has {found}; folders of safetensors that clp_jax can cut are {known}")


def _depths(
    folder: Path, family: StoredFamily, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> dict[str, int]:
    """Depths by the names of the tensors, checked for gaps and against the config."""
    towers = family.towers(config)
    blocks: dict[str, dict[str, dict[int, StoredTensor]]] = {tower.name: {} for tower in towers}
    for name, tensor in tensors.items():
        if (found := block_of(towers, name)) is not None:
            tower, block, template = found
            blocks[tower].setdefault(template, {})[block] = tensor
    depths = {tower.name: _depth(folder, tower, blocks[tower.name]) for tower in towers}
    for name, said in family.depths(config).items():
        if said != depths[name]:
            raise InputError(
                f"{folder / CONFIG_FILE} says {said} blocks of tower {name!r}, but the weights hold {depths[name]}; "
                "they are not of one checkpoint: copy both again"
            )
    return depths


def _depth(folder: Path, tower: StoredTower, templates: Mapping[str, Mapping[int, StoredTensor]]) -> int:
    """Depth of a tower: every block from 0 on has every tensor, with the shape that its kind of block has."""
    numbers = sorted({block for found in templates.values() for block in found})
    if not numbers:
        raise InputError(f"{folder} holds no tensors of tower {tower.name!r}; copy or save it again")
    depth = len(numbers)
    if numbers[-1] != depth - 1:
        missing = next(block for block, number in enumerate(numbers) if block != number)
        raise InputError(
            f"tower {tower.name!r} of {folder} has block {numbers[-1]}, but not block {missing}; copy or save it again"
        )
    for template, found in templates.items():
        for block in range(depth):
            if block not in found:
                raise InputError(
                    f"block {block} of tower {tower.name!r} lacks {template.replace('{block}', str(block))}, which "
                    f"other blocks have; {folder} is incomplete: copy or save it again"
                )
            shape, first = found[block].shape, found[block % tower.period].shape
            if shape != first:
                raise InputError(
                    f"{template} of tower {tower.name!r} has shape {list(first)} in block {block % tower.period}, but "
                    f"{list(shape)} in block {block}; {folder / CONFIG_FILE} does not describe these weights"
                )
    return depth
