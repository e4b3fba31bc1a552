"""Read a whole checkpoint and compare every byte with the checksums in its manifest."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from etils import epath

from clp_jax.checkpoint.manifest import changed_files, check_identity, checksum, listed_arrays
from clp_jax.checkpoint.opening import Spec
from clp_jax.checkpoint.orbax.checksums import checksums
from clp_jax.checkpoint.orbax.chunks import TRAIN_STATE, stored_arrays
from clp_jax.checkpoint.orbax.spec import CheckpointSpec, fingerprint, translated
from clp_jax.checkpoint.safetensors.copying import SPAN_BYTES
from clp_jax.checkpoint.safetensors.folder import FolderSpec, fingerprint_folder
from clp_jax.checkpoint.safetensors.tensorfile import read_tensors
from clp_jax.errors import InputError
from clp_jax.outputs import MANIFEST

_SHOWN = 5


class Verified(NamedTuple):
    """What was compared: arrays with their bytes, and files beside them."""

    arrays: int
    bytes: int
    files: int


def verify(spec: Spec, report: Callable[[int], None]) -> Verified:
    """Compare all stored bytes of a checkpoint, and the files beside them, with its manifest, a part at a time.

    Args:
      spec: the checkpoint.
      report: called with the bytes of every part.

    Raises:
      InputError: there are no checksums, or arrays or files differ from them, of which the first are named; or what
        training needs beside the parameters is gone.
    """
    folder = spec.folder if isinstance(spec, FolderSpec) else spec.path.parent
    good, size = dict[str, bool](), 0
    for name, expected, found, length in _of_tensors(spec) if isinstance(spec, FolderSpec) else _of_chunks(spec):
        good[name] = good.get(name, True) and found == expected
        size += length
        report(length)
    if not good:
        raise InputError(
            f"{folder} has no checksums of its arrays; outputs of clp prune and clp export --to openpi have them, "
            "and steps of clp finetune"
        )
    _check_none([name for name, equal in good.items() if not equal], f"{len(good)} arrays", folder, f"its {MANIFEST}")
    files, changed = changed_files(epath.Path(folder))
    _check_none(changed, f"{files} files beside the arrays", folder, f'them from "files" of its {MANIFEST}')
    check_identity(folder, fingerprint_folder(spec) if isinstance(spec, FolderSpec) else fingerprint(spec))
    if listed_arrays(folder, TRAIN_STATE) and not (folder / TRAIN_STATE).exists():
        raise InputError(
            f"{folder} holds the parameters as they were written there, but the {TRAIN_STATE} beside them is gone: no "
            "run can be resumed from it; copy the checkpoint again, or go on with the parameters alone"
        )
    return Verified(len(good), size, files)


def _check_none(wrong: Sequence[str], of_what: str, folder: epath.Path | Path, to_remove: str) -> None:
    if wrong:
        raise InputError(
            f"{len(wrong)} of {of_what} in {folder} are not what was written there: "
            f"{', '.join(wrong[:_SHOWN])}{', ...' if len(wrong) > _SHOWN else ''}; copy the checkpoint again, or "
            f"remove {to_remove} if they were changed on purpose"
        )


def _of_chunks(spec: CheckpointSpec) -> Iterator[tuple[str, int | None, int, int]]:
    """Name of the array, checksum in the manifest and of the bytes, and size, of each part of Orbax's items."""
    for item in (spec.path, spec.path.parent / TRAIN_STATE):
        if not item.exists():
            continue
        with translated(item):
            for array in stored_arrays(item).values():
                name = array.name if item == spec.path else f"{item.name}: {array.name}"
                for part, crc32, size in checksums(array) if array.crc32 else ():
                    yield name, array.crc32.get(part), crc32, size


def _of_tensors(spec: FolderSpec) -> Iterator[tuple[str, int | None, int, int]]:
    """The same of a folder of safetensors."""
    listed = listed_arrays(spec.folder) or {}
    for shard in spec.shards.values() if any(array.crc32 for array in listed.values()) else ():
        for name, content in read_tensors(shard.path, raw=True).items():
            for start in range(0, content.size, SPAN_BYTES):
                part = content[start : start + SPAN_BYTES].data
                yield name, listed[name].crc32.get(str(start // SPAN_BYTES)), checksum(part), len(part)
