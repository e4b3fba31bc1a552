"""Checksums of the bytes that Orbax stored: taken once they lie there, and compared before Orbax reads them again.

Orbax hands the encoded bytes to nobody, so they are read back. It costs no more than reading the files (mostly from the
memory in which the system still has them) and is done beside the training.
"""

from collections.abc import Iterator

import jax
from etils import epath

from clp_jax.checkpoint.manifest import Listed, check_part, checksum
from clp_jax.checkpoint.orbax.chunks import Span, StoredArray, chunk_name, stored_arrays
from clp_jax.checkpoint.threads import run_in_threads
from clp_jax.distributed import together
from clp_jax.errors import InputError

_BLOCK_BYTES = 2**20


def listed_with_checksums(item: epath.Path) -> dict[str, Listed]:
    """What a manifest is to say of the arrays of an item, all of whose bytes are read.

    Args:
      item: a complete item of a step, on whichever hosts it was written.
    """
    arrays = stored_arrays(item)
    sums: dict[str, dict[str, int]] = {name: {} for name in arrays}

    def add(array: StoredArray) -> Iterator[int]:
        for part, crc32, size in checksums(array):
            sums[array.name][part] = crc32
            yield size

    run_in_threads([add(array) for array in arrays.values()], lambda _: None)
    return {name: Listed(array.shape, array.dtype.name, sums[name]) for name, array in arrays.items()}


def check_item(item: epath.Path) -> None:
    """Compare the bytes of an item with the checksums in the manifest of its step; without any, nothing is read.

    Several hosts share the arrays among them.

    Args:
      item: of a step.

    Raises:
      InputError: bytes differ or are missing, here or on another host.
    """
    arrays = [array for array in stored_arrays(item).values() if array.crc32]
    mine = arrays[jax.process_index() :: jax.process_count()]

    def check(array: StoredArray) -> Iterator[int]:
        for part, crc32, size in checksums(array):
            check_part(f"chunk {part} of {array.name} in {item}", array.crc32.get(part), crc32)
            yield size

    together(lambda: run_in_threads([check(array) for array in mine], lambda _: None), f"read {item}")


def checksums(array: StoredArray) -> Iterator[tuple[str, int, int]]:
    """Yields name, CRC-32 and size of every encoded chunk of an array.

    Raises:
      InputError: a chunk that the manifest lists is missing.
    """
    missing = array.crc32.keys() - {chunk_name(index) for index in array.chunks}
    if missing:
        raise InputError(f"{array.name} lacks chunk {min(missing)}, so the checkpoint is incomplete; copy it again")
    for index, place in sorted(array.chunks.items()):
        crc32 = size = 0
        for block in [place] if isinstance(place, bytes) else _blocks(place):
            crc32, size = checksum(block, crc32), size + len(block)
        yield chunk_name(index), crc32, size


def _blocks(place: Span) -> Iterator[bytes]:
    """The bytes of a range, a few at a time; those that a cut file lacks give another checksum."""
    left = place.length
    with place.open() as file:
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            left -= len(block)
            yield block
