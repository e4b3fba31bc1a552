"""What a checkpoint of ours holds, array by array and under checksums, in the manifest of its folder.

The forms themselves do not say whose bytes are whose: two arrays of one shape that were exchanged, or a shape that was
edited everywhere, would load. CRC-32 is taken of bytes that pass through memory anyway, at about 50 GB/s on one core by
ISA-L and 4 GB/s by zlib; it finds accidents, not forgeries. Checkpoints without a manifest load as they are.
"""

from collections.abc import Iterable, Mapping
from typing import IO, NamedTuple

from etils import epath

from clp_jax.errors import InputError
from clp_jax.outputs import MANIFEST, read_manifest, write_manifest

try:
    from isal.isal_zlib import crc32 as checksum
except ImportError:  # it has no wheel for this kind of processor
    from zlib import crc32 as checksum

LISTED_BYTES = 2**26
"""Bytes of the largest file that is listed: tokenizers are smaller, and what is larger may be all holes."""

_DAMAGED = "copy the checkpoint again, or remove that file if the arrays were changed on purpose"


class Listed(NamedTuple):
    """An array as a manifest lists it.

    Attributes:
      shape: of the array.
      dtype: its name in the stored form.
      crc32: checksum of every stored part by the part's name; empty where an older version wrote the manifest.
    """

    shape: tuple[int, ...]
    dtype: str
    crc32: Mapping[str, int] = {}


class Summed:
    """An open file, with the checksum of what is written to it; without a file, the checksum alone.

    Attributes:
      crc32: of all bytes so far.
    """

    def __init__(self, file: IO[bytes] | None = None):
        self._file = file
        self.crc32 = 0

    def write(self, content: bytes | memoryview) -> None:
        """Write some more bytes."""
        self.crc32 = checksum(content, self.crc32)
        if self._file is not None:
            self._file.write(content)


def list_arrays(folder: epath.Path, *, fingerprint: str | None = None, **items: Mapping[str, Listed]) -> None:
    """Put the arrays of a checkpoint into its manifest.

    Args:
      folder: of the step, or of the tensors.
      fingerprint: of the finished checkpoint; None if it is still being written.
      items: arrays by their stored names: ``arrays`` are the parameters, ``train_state`` is what training needs beside.
    """
    lists = {
        item: {name: {**array._asdict(), "shape": list(array.shape)} for name, array in sorted(arrays.items())}
        for item, arrays in items.items()
    }
    write_manifest(folder, fingerprint=fingerprint, **lists)


def list_files(folder: epath.Path, files: Iterable[epath.Path]) -> None:
    """Put files beside the arrays of a checkpoint, such as statistics, into its manifest.

    Args:
      folder: of the step, or of the tensors.
      files: below it; those above `LISTED_BYTES`, which no loader reads, are passed over.
    """
    sums = {str(file.relative_to(folder)): _sum_of(file) for file in files if file.stat().length <= LISTED_BYTES}
    write_manifest(folder, files=dict(sorted(sums.items())))


def changed_files(folder: epath.Path) -> tuple[int, list[str]]:
    """How many files the manifest of a folder lists, and those of them that are gone or hold other bytes.

    Raises:
      InputError: the manifest is damaged.
    """
    listed = read_manifest(folder).get("files", {})
    if not isinstance(listed, dict):
        raise InputError(f"{folder / MANIFEST} lists files in a form that we do not write; {_DAMAGED}")
    return len(listed), [name for name, crc32 in listed.items() if not _holds(folder / name, crc32)]


def listed_arrays(folder: epath.Path, item: str = "arrays") -> dict[str, Listed] | None:
    """The arrays in the manifest of a folder; None if it lists none.

    Args:
      folder: of the step, or of the tensors.
      item: as in `list_arrays`.

    Raises:
      InputError: the manifest is damaged.
    """
    listed = read_manifest(folder).get(item)
    if listed is None:
        return None
    try:
        return {
            name: Listed(
                tuple(int(size) for size in entry["shape"]),
                str(entry["dtype"]),
                {str(part): int(crc) for part, crc in entry["crc32"].items()},
            )
            for name, entry in listed.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise InputError(f"{folder / MANIFEST} lists arrays in a form that we do not write; {_DAMAGED}") from None


def check_arrays(folder: epath.Path, listed: Mapping[str, Listed], found: Mapping[str, Listed]) -> None:
    """Raise unless names, shapes and dtypes are as the manifest of a folder lists them.

    Raises:
      InputError: names the first array that differs.
    """
    for name in sorted(listed.keys() | found.keys()):
        old, new = (_described(arrays.get(name)) for arrays in (listed, found))
        if old != new:
            raise InputError(f"{name} is {new} in {folder}, but {old} in its {MANIFEST}; {_DAMAGED}")


def check_identity(folder: epath.Path, fingerprint: str) -> None:
    """Raise if the manifest of a folder has another fingerprint than its checkpoint.

    Raises:
      InputError: says how to find out what changed.
    """
    if read_manifest(folder).get("fingerprint", fingerprint) not in (fingerprint, None):
        raise InputError(
            f"{folder} does not hold the bytes that were written there, says its {MANIFEST}: arrays were changed or "
            f"exchanged (`clp inspect --verify` names them); {_DAMAGED}"
        )


def check_part(what: str, expected: int | None, found: int) -> None:
    """Raise if the checksum of a part that was read is not the one in the manifest.

    Args:
      what: the part, in messages.
      expected: of the manifest; None where there is none.
      found: of the bytes that were read.

    Raises:
      InputError: they differ.
    """
    if expected is not None and expected != found:
        raise InputError(
            f"{what} holds other bytes than were written there ({MANIFEST} has another checksum): it is damaged, or "
            f"was exchanged with another; {_DAMAGED}"
        )


def _holds(file: epath.Path, crc32: int) -> bool:
    # `is_file` of some versions of etils is true of what is not there.
    return file.exists() and not file.is_dir() and _sum_of(file) == crc32


def _sum_of(file: epath.Path) -> int:
    with file.open("rb") as reader:
        found = Summed()
        while part := reader.read(2**20):
            found.write(part)
    return found.crc32


def _described(array: Listed | None) -> str:
    return "absent" if array is None else f"{array.dtype}{list(array.shape)}"
