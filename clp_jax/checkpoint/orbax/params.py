"""Whole parameter trees between checkpoints and memory."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from clp_jax.aliases import Tree
from clp_jax.checkpoint.carrying import copy_all, side_files
from clp_jax.checkpoint.manifest import list_files
from clp_jax.checkpoint.orbax.checksums import check_item
from clp_jax.checkpoint.orbax.chunks import stored_arrays
from clp_jax.checkpoint.orbax.decoding import BLOCK_BYTES, read_array, read_slabs
from clp_jax.checkpoint.orbax.spec import RECORD_FILE, CheckpointSpec, translated
from clp_jax.checkpoint.orbax.writer import ArrayForm, ItemWriter, rows_per_chunk, writing
from clp_jax.checkpoint.threads import run_in_threads
from clp_jax.errors import InputError
from clp_jax.folders import files_below
from clp_jax.outputs import staged
from clp_jax.progress import in_megabytes, stage
from clp_jax.trees import check_same_structure, flatten, unflatten


def read_params(
    spec: CheckpointSpec,
    *,
    expected: Tree | None = None,
    sharding: jax.sharding.Sharding | Mapping[str, Any] | None = None,
    dtype: Any = None,
) -> dict[str, Any]:
    """Reads the parameters of a checkpoint.

    Args:
      spec: the checkpoint.
      expected: tree of arrays or ``jax.ShapeDtypeStruct`` whose paths and shapes the checkpoint must have exactly.
      sharding: one sharding, or a tree of them; None returns NumPy arrays on the host.
      dtype: cast every leaf to this; None keeps what is stored.

    Returns:
      Nested dict like ``spec.tree``.

    Raises:
      InputError: the checkpoint differs from `expected` (every differing path is listed), or cannot be read.
    """
    if expected is not None:
        check_same_structure(expected, spec.tree, what=f"the parameters of {spec.path}")
    leaves = flatten(spec.tree)
    shardings = flatten(sharding) if isinstance(sharding, Mapping) else dict.fromkeys(leaves, sharding)
    if shardings.keys() != leaves.keys():
        raise InputError(f"shardings and parameters differ at {sorted(shardings.keys() ^ leaves.keys())}")
    if sharding is not None and dtype is None and jax.process_count() > 1:
        return _read_shards(spec, shardings)
    with translated(spec.path):
        arrays = stored_arrays(spec.path)
    values: dict[str, Any] = {}

    def read(path: str) -> Iterator[int]:
        array = read_array(arrays[spec.stored_name(path)])
        if dtype is not None:
            array = array.astype(dtype)
        if (placement := shardings[path]) is not None:
            array = jax.make_array_from_callback(array.shape, placement, array.__getitem__)
        values[path] = array
        yield array.nbytes

    longest_first = sorted(leaves, key=lambda path: math.prod(leaves[path].shape), reverse=True)
    with stage("reading", total=None, unit="MB") as advance:
        run_in_threads([read(path) for path in longest_first], in_megabytes(advance))
    return unflatten({path: values[path] for path in leaves})


def _read_shards(spec: CheckpointSpec, shardings: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters on several hosts, each of which decodes only what its devices hold."""
    import orbax.checkpoint as ocp

    ending = "/value" if spec.value_suffix else ""
    leaves = {
        f"params/{path}{ending}": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
        for path, leaf in flatten(spec.tree).items()
    }
    with translated(spec.path):
        check_item(spec.path)
    tree = unflatten(leaves)
    restore = ocp.args.PyTreeRestore(item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
    with translated(spec.path), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = flatten(reader.restore(_absolute(spec.path), args=restore)["params"])
    return unflatten({path.removesuffix(ending): leaf for path, leaf in found.items()})


class LeafReader:
    """Reads parameters of a checkpoint one at a time, so that the model is never held.

    Args:
      spec: the checkpoint.
    """

    def __init__(self, spec: CheckpointSpec):
        self._spec = spec
        with translated(spec.path):
            self._arrays = stored_arrays(spec.path)

    def whole(self, path: str) -> np.ndarray:
        """Reads one parameter.

        Args:
          path: path of the leaf.
        """
        return read_array(self._arrays[self._spec.stored_name(path)])

    def layers(self, path: str) -> Iterator[np.ndarray]:
        """Yields the rows of axis 0 of one parameter, one after another.

        Args:
          path: path of the leaf.
        """
        for slab in read_slabs(self._arrays[self._spec.stored_name(path)], 1):
            yield slab[0]


def write_params(
    out: str | os.PathLike,
    params: Tree,
    *,
    assets: str | os.PathLike | None = None,
    record: Mapping[str, Any] | None = None,
    value_suffix: bool = False,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> None:
    """Writes a tree of arrays as an openpi checkpoint, complete or not at all.

    Args:
      out: step folder to write: ``params``, ``assets`` and ``clp.json``.
      params: nested mapping of arrays that this process can read in full.
      assets: folder to copy as ``assets``.
      record: content of ``clp.json``.
      value_suffix: end stored names in "value", the form that openpi's training writes.
      overwrite: replace an existing `out`.
      allow_nonfinite: accept NaN and infinity.

    Raises:
      InputError: a leaf is not finite or not readable here, or `out` exists.
    """
    leaves = flatten(params)
    for path, leaf in leaves.items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise InputError(f"{path} is spread over several hosts; gather it before writing")
    suffix = ["value"] * value_suffix
    with staged(
        out, by="clp_jax.write_params", overwrite=overwrite, sources=[] if assets is None else [assets]
    ) as folder:
        with ItemWriter(folder / "params", allow_nonfinite=allow_nonfinite) as writer:
            names = {path: ".".join(["params", *path.split("/"), *suffix]) for path in leaves}
            run_in_threads([_put_array(writer, names[path], leaf) for path, leaf in leaves.items()], lambda _: None)
        write_beside(folder, assets=None if assets is None else epath.Path(assets), record=record)
        list_files(folder, files_beside(folder))


def put_parts(writer: ItemWriter, name: str, leaf: jax.ShapeDtypeStruct, parts: Iterable[np.ndarray]) -> Iterator[int]:
    """Writes an array that comes in parts; yields the size of each chunk.

    Args:
      writer: the output.
      name: of the array, keys joined by dots.
      leaf: its shape and dtype.
      parts: the rows of axis 0 one after another, or the whole array alone.
    """
    dtype, shape = np.dtype(leaf.dtype), tuple(leaf.shape)
    for number, part in enumerate(parts):
        whole = part.shape == shape
        rows = part.reshape(shape or (1,)) if whole else part[None]
        height = rows_per_chunk(rows[:1].nbytes, len(rows))
        if number == 0:
            writer.add(name, ArrayForm(shape, (height, *shape[1:]) if shape else (), dtype))
        yield from _put_rows(writer, name, rows, height, first=number)


def write_beside(
    folder: epath.Path,
    *,
    assets: epath.Path | None,
    record: Mapping[str, Any] | None,
    report: Callable[[int], None] | None = None,
) -> None:
    """Copies the assets into a step folder and writes ``clp.json``, the last file of every output.

    Args:
      folder: the step folder.
      assets: folder to copy, if any.
      record: content of ``clp.json``, if any.
      report: as of `copy_all`.
    """
    with writing(folder):
        if assets is not None:
            copy_files(assets, folder / "assets", report)
        if record is not None:
            (folder / RECORD_FILE).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


def files_beside(folder: epath.Path) -> list[epath.Path]:
    """The files of a step folder that hold no arrays: its assets and ``clp.json``."""
    record = [folder / RECORD_FILE] if (folder / RECORD_FILE).exists() else []
    return [*record, *(files_below(folder / "assets") if (folder / "assets").is_dir() else ())]


def copy_files(source: epath.Path, target: epath.Path, report: Callable[[int], None] | None = None) -> None:
    """Copies all files below a folder; either side may be remote."""
    target.mkdir(parents=True, exist_ok=True)
    copy_all(side_files(source), target, report)


def _put_array(writer: ItemWriter, name: str, leaf: Any) -> Iterator[int]:
    """Writes one array; yields the size of each chunk."""
    array: np.ndarray = np.asarray(leaf)
    shape: tuple[int, ...] = array.shape or (1,)
    rows = np.ascontiguousarray(array).reshape(shape)
    height = rows_per_chunk(rows[:1].nbytes, len(rows))
    writer.add(name, ArrayForm(array.shape, (height, *shape[1:]) if array.shape else (), array.dtype))
    yield from _put_rows(writer, name, rows, height)


def _put_rows(writer: ItemWriter, name: str, rows: np.ndarray, height: int, *, first: int = 0) -> Iterator[int]:
    """Writes rows of axis 0 in chunks of a height, from chunk number `first` on; yields the size of each."""
    step = BLOCK_BYTES // rows.dtype.itemsize
    for number, start in enumerate(range(0, len(rows), height), first):
        flat = np.ascontiguousarray(rows[start : start + height]).reshape(-1)
        blocks = (flat[begin : begin + step] for begin in range(0, flat.size, step))
        writer.write_chunk(name, (number, *[0] * (rows.ndim - 1)), blocks)
        yield flat.nbytes


def _absolute(path: epath.Path) -> epath.Path:
    """Orbax takes absolute paths only; the paths of etils have no ``absolute`` in every version that we support."""
    text = os.fspath(path)
    return path if "://" in text else epath.Path(os.path.abspath(text))  # noqa: PTH100
