"""The least that pruning, exporting and loading a checkpoint can cost, and what Orbax alone takes for the same.

Floors check nothing: no checksums, no look for NaN, no fingerprints. Decoding and writing are the calls that we use,
too, in as many threads as there are cores, so what lies between a floor and us is what our promises cost.
"""

import concurrent.futures
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import zstandard

from clp_jax.checkpoint.orbax.chunks import StoredArray, stored_arrays
from clp_jax.checkpoint.orbax.decoding import BLOCK_BYTES
from clp_jax.checkpoint.orbax.spec import CheckpointSpec
from clp_jax.trees import flatten, unflatten

Rows = Mapping[str, Sequence[int]]
"""The rows of axis 0 that stay, by path; leaves that are not named stay whole."""


def prune(spec: CheckpointSpec, keep: Rows, out: Path) -> None:
    """Read and decode every chunk up to the last row that stays, and write the bytes of these rows."""
    out.mkdir()

    def one(array: StoredArray, index: tuple[int, ...], rows: Sequence[int] | None) -> None:
        size = _bytes(array)
        row = size // array.chunk[0] if array.chunk else size
        first = index[0] * array.chunk[0] if index else 0
        stay = range(size // row) if rows is None else [r - first for r in rows if 0 <= r - first < size // row]
        block = np.empty(BLOCK_BYTES, np.uint8)
        with (out / f"{array.name}.{index}").open("wb", buffering=0) as file, _decoder(array, index) as stream:
            for number in range(max(stay, default=-1) + 1):
                for start in range(0, row, BLOCK_BYTES):
                    part = block[: min(BLOCK_BYTES, row - start)].data
                    _fill(stream, part)
                    if number in stay:
                        file.write(part)

    names = {spec.stored_name(path): rows for path, rows in keep.items()}
    _in_threads(spec, lambda array, index: one(array, index, names.get(array.name)))


def export(spec: CheckpointSpec, out: Path) -> None:
    """Read and decode every chunk, write its bytes, and read what was written once."""
    prune(spec, {}, out)

    def read(file: Path) -> None:
        block = bytearray(BLOCK_BYTES)
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(block):
                pass

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(read, out.iterdir()))


def load(spec: CheckpointSpec) -> list[np.ndarray]:
    """Read and decode every chunk into memory."""
    chunks = []

    def one(array: StoredArray, index: tuple[int, ...]) -> None:
        chunk = np.empty(_bytes(array), np.uint8)
        with _decoder(array, index) as stream:
            _fill(stream, chunk.data)
        chunks.append(chunk)

    _in_threads(spec, one)
    return chunks


def restore_by_orbax(spec: CheckpointSpec) -> dict[str, Any]:
    """Orbax's own restore, onto the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = unflatten(
        {
            f"params/{path}": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
            for path, leaf in flatten(spec.tree).items()
        }
    )
    restore = ocp.args.PyTreeRestore(item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return jax.block_until_ready(reader.restore(Path(spec.path).absolute(), args=restore)["params"])


def prune_by_orbax(spec: CheckpointSpec, keep: Rows, out: Path) -> None:
    """What one would write without us: restore the model, slice the stacks, save it."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        params = flatten(checkpointer.restore(Path(spec.path).absolute())["params"])
        smaller = {path: leaf[np.asarray(keep[path])] if path in keep else leaf for path, leaf in params.items()}
        checkpointer.save(out.absolute(), args=ocp.args.PyTreeSave({"params": unflatten(smaller)}))


def _in_threads(spec: CheckpointSpec, one: Any) -> None:
    """Calls a function with every chunk, the longest first."""
    work = [(array, index) for array in stored_arrays(spec.path).values() for index in array.chunks]
    work.sort(key=lambda item: _bytes(item[0]), reverse=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda item: one(*item), work))


def _bytes(array: StoredArray) -> int:
    """Size of a decoded chunk."""
    return int(np.prod(array.chunk, dtype=np.int64)) * array.dtype.itemsize


def _decoder(array: StoredArray, index: tuple[int, ...]) -> Any:
    place = array.place(index)
    file = place if isinstance(place, bytes) else place.open()
    return zstandard.ZstdDecompressor().stream_reader(file, BLOCK_BYTES, closefd=True)


def _fill(stream: Any, target: memoryview) -> None:
    done = 0
    while done < len(target):
        read = stream.readinto(target[done : done + BLOCK_BYTES])
        if not read:
            raise EOFError(f"a chunk ends after {done} of {len(target)} bytes")
        done += read
