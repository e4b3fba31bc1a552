"""Read a whole checkpoint and compare every byte with the checksums in its manifest."""

import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from clp_jax.checkpoint.manifest import check_identity, listed_arrays
from clp_jax.checkpoint.opening import Spec
from clp_jax.checkpoint.orbax.chunks import Span, chunk_name, stored_arrays
from clp_jax.checkpoint.orbax.spec import fingerprint, translated
from clp_jax.checkpoint.safetensors.copying import SPAN_BYTES
from clp_jax.checkpoint.safetensors.folder import FolderSpec, fingerprint_folder
from clp_jax.checkpoint.safetensors.tensorfile import read_tensors
from clp_jax.errors import InputError
from clp_jax.outputs import MANIFEST

_SHOWN = 5


class Verified(NamedTuple):
    """What was compared: arrays and bytes."""

    arrays: int
    bytes: int


def verify(spec: Spec, report: Callable[[int], None]) -> Verified:
    """Compare all stored bytes of a checkpoint with its manifest; memory holds one part at a time.

    Args:
      spec: the checkpoint.
      report: called with the bytes of every part.

    Raises:
      InputError: there are no checksums, or arrays differ from them; the first are named.
    """
    folder = spec.folder if isinstance(spec, FolderSpec) else spec.path.parent
    listed = listed_arrays(folder) or {}
    if not any(array.crc32 for array in listed.values()):
        raise InputError(
            f"{folder} has no checksums of its arrays; outputs of clp prune and of clp export --to openpi have them"
        )
    wrong, size = {}, 0
    for name, part, content in _of_tensors(spec) if isinstance(spec, FolderSpec) else _of_chunks(spec):
        if zlib.crc32(content) != listed[name].crc32.get(part):
            wrong[name] = part
        size += len(content)
        report(len(content))
    if wrong:
        raise InputError(
            f"{len(wrong)} of {len(listed)} arrays in {folder} are not what was written there: "
            f"{', '.join(list(wrong)[:_SHOWN])}{', ...' if len(wrong) > _SHOWN else ''}; copy the checkpoint again, or "
            f"remove its {MANIFEST} if they were changed on purpose"
        )
    check_identity(folder, fingerprint_folder(spec) if isinstance(spec, FolderSpec) else fingerprint(spec))
    return Verified(len(listed), size)


def _of_chunks(spec: Spec) -> Iterator[tuple[str, str, bytes]]:
    """Name of the array, name of the part and its bytes, of Orbax's form."""
    with translated(spec.path):
        for name, array in stored_arrays(spec.path).items():
            for index, place in array.chunks.items():
                yield name, chunk_name(index), place.read() if isinstance(place, Span) else place


def _of_tensors(spec: FolderSpec) -> Iterator[tuple[str, str, memoryview]]:
    """The same of a folder of safetensors."""
    for shard in spec.shards.values():
        for name, content in read_tensors(shard.path, raw=True).items():
            for start in range(0, content.size, SPAN_BYTES):
                yield name, str(start // SPAN_BYTES), content[start : start + SPAN_BYTES].data
