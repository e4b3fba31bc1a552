"""Write a folder of safetensors files with fewer blocks: bytes are copied, blocks renumbered, nothing else changes."""

import contextlib
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from clp_jax.checkpoint.beside import is_read
from clp_jax.checkpoint.carrying import check_room, copy_all
from clp_jax.checkpoint.manifest import list_arrays, list_files, listed_arrays
from clp_jax.checkpoint.opening import unchanged
from clp_jax.checkpoint.orbax.params import write_beside
from clp_jax.checkpoint.orbax.slicing import RewriteReport
from clp_jax.checkpoint.orbax.writer import writing
from clp_jax.checkpoint.safetensors.copying import FileToWrite
from clp_jax.checkpoint.safetensors.folder import CONFIG_FILE, FolderSpec, check_stamps, fingerprint_folder, read_folder
from clp_jax.checkpoint.safetensors.header import StoredTensor, header_of
from clp_jax.checkpoint.safetensors.listing import INDEX_FILE
from clp_jax.checkpoint.safetensors.tensorfile import DTYPE_CODES
from clp_jax.checkpoint.threads import run_in_threads
from clp_jax.errors import InputError
from clp_jax.folders import files_below, is_remote
from clp_jax.models.stored import numbered
from clp_jax.outputs import staged
from clp_jax.plan import check_period

_EXPORT, _OF_EXPORT = "export.json", re.compile(r"export\.json|README\.md|check\.npz|check_\w+\.py")
"""What `clp export` says of the weights that it wrote: answers, what was compared, and the card."""


def slice_folder(
    spec: FolderSpec,
    keep: Mapping[str, Sequence[int]],
    out: str | os.PathLike[str],
    *,
    given: Mapping[str, np.ndarray] | None = None,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> RewriteReport:
    """Writes the checkpoint that keeps the given blocks of every tower, with the same files, complete or not at all.

    Tensors keep their bytes, their order and their files; blocks are numbered anew, ``config.json`` gets the new
    depths, the index its new names and total. A shard that loses all its tensors is left out; the others keep their
    names, also if these count it ("-of-00003"). Every other file is copied as it is, but for a ``clp.json``, which
    `record` replaces, the folders in `FolderSpec.left_out`, and what an export says of its weights. Memory does not
    grow with the model.

    Args:
      spec: the checkpoint to read.
      keep: by tower the blocks that stay, 0-based and increasing; a tower that is not named keeps all.
      out: local folder to create.
      given: tensors by their new names whose values are these, of the same shape and dtype, and not the source's.
      record: content of ``clp.json``.
      overwrite: replace an existing `out`.
      allow_nonfinite: accept NaN and infinity in tensors of floats. Dtypes below eight bits cannot hold any, and those
        that clp_jax does not know are not looked into.
      progress: called with the bytes written so far and in all, other files included.

    Returns:
      Sizes and time; `RewriteReport.sliced` counts the tensors of shortened towers, and its notes name what was added
      or left out.

    Raises:
      InputError: the blocks do not fit the model, the source is damaged, not finite or changes meanwhile, or `out`
        exists.
      OSError: it does not fit on its disk.
    """
    started = time.perf_counter()
    if is_remote(out):
        raise InputError(f"{os.fspath(out)} is remote: write this folder of safetensors files to a local disk first")
    kept = _kept_blocks(spec, keep)
    files = _files_to_write(spec, kept, given or {})
    total = sum(file.data_bytes for file in files)
    outdated = _outdated(spec)
    others = {name: place for name, place in spec.others.items() if name not in outdated}
    to_copy = check_room(out, others.values(), weights=total)
    done = 0

    def report(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total + to_copy)

    check_stamps(spec)
    sources = [spec.path, spec.path.resolve()]
    with staged(out, by="clp prune", overwrite=overwrite, sources=sources) as staging, unchanged(spec):
        folder = Path(staging)
        with contextlib.ExitStack() as opened:
            spans = [span for file in files for span in file.open(folder, opened, check=not allow_nonfinite)]
            run_in_threads([span.copy() for span in spans], report)
        copy_all(others, folder, report)
        _write_around(spec, kept, files, folder)
        write_beside(epath.Path(folder), assets=None, record=record)
        arrays = {name: array for file in files for name, array in file.listed().items()}
        shards = {file.name for file in files}
        others_there = [file for file in files_below(epath.Path(folder)) if file.name not in shards and is_read(file)]
        list_files(epath.Path(folder), others_there)
        list_arrays(epath.Path(folder), arrays=arrays, fingerprint=fingerprint_folder(read_folder(folder)))
    return RewriteReport(
        leaves=sum(len(file.tensors) for file in files),
        sliced=sum(file.sliced for file in files),
        bytes_in=sum(tensor.size for tensor in spec.tensors.values()),
        bytes_out=total,
        seconds=time.perf_counter() - started,
        notes=_notes(spec, files),
    )


def _kept_blocks(spec: FolderSpec, keep: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Checks and returns the blocks that stay, of every tower."""
    if unknown := sorted(keep.keys() - spec.depths.keys()):
        raise InputError(f"{spec.path} has no tower {unknown[0]!r}; its towers are {', '.join(spec.depths)}")
    kept = {name: tuple(int(block) for block in keep.get(name, range(depth))) for name, depth in spec.depths.items()}
    for tower in spec.towers:
        blocks, depth = kept[tower.name], spec.depths[tower.name]
        if not blocks or blocks[0] < 0 or blocks[-1] >= depth or any(a >= b for a, b in itertools.pairwise(blocks)):
            raise InputError(
                f"cannot keep blocks {list(blocks)} of tower {tower.name!r}: give increasing numbers from 0 to "
                f"{depth - 1}"
            )
        if tower.uncuttable is not None and len(blocks) < depth:
            raise InputError(f"tower {tower.name!r} must keep its {depth} blocks: {tower.uncuttable}")
        check_period(blocks, tower.period, tower.name, depth=depth)
    for group in spec.groups:
        for name in group[1:]:
            if kept[name] != kept[group[0]]:
                raise InputError(
                    f"towers {group[0]!r} and {name!r} share one stack and must keep the same blocks, not "
                    f"{list(kept[group[0]])} and {list(kept[name])}; give both the same list"
                )
    return kept


def _files_to_write(
    spec: FolderSpec, kept: Mapping[str, tuple[int, ...]], given: Mapping[str, np.ndarray]
) -> list[FileToWrite]:
    """The files to write; one without tensors is left out."""
    places = {name: {block: place for place, block in enumerate(blocks)} for name, blocks in kept.items()}
    aliases: dict[str, list[str]] = {}
    for new, stored in spec.family.aliases(spec.tensors).items():
        aliases.setdefault(stored, []).append(new)
    files, listed = [], listed_arrays(spec.folder) or {}
    for file_name, shard in spec.shards.items():
        names: dict[str, StoredTensor] = {}
        known: dict[str, Mapping[str, int]] = {}
        sliced = 0
        for name, tensor in shard.tensors.items():
            if (found := spec.block_of(name)) is None:
                called = [name, *aliases.get(name, [])]
            elif (place := places[found[0]].get(found[1])) is not None:
                called = [numbered(found[2], place)]
                sliced += len(places[found[0]]) < spec.depths[found[0]]
            else:
                continue
            names |= dict.fromkeys(called, tensor)
            if name in listed:
                known |= dict.fromkeys(called, listed[name].crc32)
        if names:
            tensors = _placed(names)
            header = header_of({name: new for name, (_, new) in tensors.items()}, shard.metadata)
            added = {new: name for name in shard.tensors for new in aliases.get(name, [])}
            own = {name: _bytes_of(given[name], name, new) for name, (_, new) in tensors.items() if name in given}
            known = {name: sums for name, sums in known.items() if name not in own}
            files.append(FileToWrite(file_name, shard.path, shard.data, header, tensors, sliced, added, known, own))
    if unknown := sorted(given.keys() - {name for file in files for name in file.tensors}):
        raise InputError(f"the pruned checkpoint has no tensor {unknown[0]!r} whose values could be replaced")
    return files


def _bytes_of(values: np.ndarray, name: str, tensor: StoredTensor) -> memoryview:
    """The bytes of given values, which must fill the place of the tensor."""
    if values.shape != tuple(tensor.shape) or DTYPE_CODES.get(values.dtype.name) != tensor.dtype:
        raise InputError(f"{name} is {tensor.dtype}{list(tensor.shape)}, not {values.dtype}{list(values.shape)}")
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _placed(names: Mapping[str, StoredTensor]) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Every tensor with its new place: bytes follow each other in the order that they have in the source."""
    order = {name: number for number, name in enumerate(names)}
    begin, placed = 0, {}
    for name, old in sorted(names.items(), key=lambda item: (item[1].begin, item[1].end, order[item[0]])):
        placed[name] = (old, old._replace(begin=begin, end=begin + old.size))
        begin += old.size
    return {name: placed[name] for name in names}


def _write_around(
    spec: FolderSpec, kept: Mapping[str, tuple[int, ...]], files: Sequence[FileToWrite], folder: Path
) -> None:
    """Writes the index and the config."""
    depths = {name: len(blocks) for name, blocks in kept.items()}
    if depths == spec.depths:
        copy_all({CONFIG_FILE: spec.path / CONFIG_FILE}, folder)
    else:
        _write_json(spec, folder, CONFIG_FILE, spec.family.config_with_depths(spec.config, depths))
    if spec.index is not None:
        _write_json(spec, folder, INDEX_FILE, _index(spec.index, files))


def _outdated(spec: FolderSpec) -> list[str]:
    """Files of an export that speak of weights which a cut no longer has."""
    return [name for name in spec.others if _OF_EXPORT.fullmatch(name)] if _EXPORT in spec.others else []


def _index(index: Mapping[str, Any], files: Sequence[FileToWrite]) -> dict[str, Any]:
    """The index of the new files; what else its metadata says stays."""
    tensors = {name: (file.name, new) for file in files for name, (_, new) in file.tensors.items()}
    metadata = {**index.get("metadata", {}), "total_size": sum(new.size for _, new in tensors.values())}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(new.shape) for _, new in tensors.values())
    return {**index, "metadata": metadata, "weight_map": {name: file for name, (file, _) in sorted(tensors.items())}}


def _write_json(spec: FolderSpec, folder: Path, name: str, value: Any) -> None:
    """Writes a JSON file indented like the one of the source."""
    try:
        text = (spec.path / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{spec.path / name} changed while it was read ({error}); try again") from error
    second = text.strip().partition("\n")[2]
    indent = len(second) - len(second.lstrip(" ")) or None
    text = json.dumps(value, indent=indent, ensure_ascii=text.isascii()) + "\n" * text.endswith("\n")
    with writing(folder / name):
        (folder / name).write_text(text, encoding="utf-8")


def _notes(spec: FolderSpec, files: Sequence[FileToWrite]) -> tuple[str, ...]:
    """What was added and left out, a phrase each."""
    notes = [
        f"{new} was added with the bytes of {stored}, because stock loaders need it"
        for file in files
        for new, stored in file.added.items()
    ]
    gone = spec.shards.keys() - {file.name for file in files}
    notes += [f"{name} was left out: none of its tensors stay" for name in spec.shards if name in gone]
    notes += [f"{name} was left out: it describes where the source comes from" for name in spec.left_out]
    notes += [f"{name} was left out: it describes the export as it was" for name in _outdated(spec)]
    return tuple(notes)
