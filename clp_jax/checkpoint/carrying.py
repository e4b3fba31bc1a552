"""Carry the files of a checkpoint that nobody reads into an output: what they take is known first, holes stay holes."""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from etils import epath

from clp_jax.checkpoint.orbax.writer import writing
from clp_jax.checkpoint.safetensors.header import opened_to_read, read_exactly
from clp_jax.folders import files_below, is_remote
from clp_jax.progress import in_megabytes, stage

_BLOCK_BYTES = 2**20
"""Bytes that one call reads or writes."""

AnyPath = str | os.PathLike[str]


def side_files(folder: epath.Path | None) -> dict[str, AnyPath]:
    """All files below a folder, if there is one, by their path in it."""
    return {} if folder is None else {str(file.relative_to(folder)): file for file in files_below(folder)}


def size_to_copy(file: AnyPath) -> int:
    """Bytes of a file, those in its holes not counted."""
    if is_remote(file):
        return epath.Path(file).stat().length
    with opened_to_read(Path(file)) as descriptor:
        return sum(end - begin for begin, end in _stretches(descriptor))


def check_room(out: AnyPath, files: Iterable[AnyPath], *, weights: int = 0) -> int:
    """See that an output fits on its disk before anything of it is written.

    Args:
      out: folder to create; a remote one has no known end.
      files: to be copied into it.
      weights: bytes of its tensors; 0 where compression decides.

    Returns:
      Bytes of the files to copy.

    Raises:
      OSError: says what needs how much, and how much there is.
    """
    sizes = {os.fspath(file): size_to_copy(file) for file in files}
    others = sum(sizes.values())
    if is_remote(out):
        return others
    place = Path(out).expanduser().absolute()
    # The topmost folder has none above it, and is refused where outputs are begun.
    disk = next((folder for folder in place.parents if folder.is_dir()), place)
    free = shutil.disk_usage(disk).free
    if weights + others > free:
        largest = max(sizes, key=sizes.__getitem__, default=None)
        named = "" if largest is None else f" (the largest: {largest}, {_gigabytes(sizes[largest])})"
        raise OSError(
            errno.ENOSPC,
            f"it needs {_gigabytes(weights)} for weights and {_gigabytes(others)} for {len(sizes)} other files"
            f"{named}, and its disk has {_gigabytes(free)} left; free some space, take away "
            "files that no loader needs, or choose an output on another disk",
            os.fspath(place),
        )
    return others


def copy_all(files: Mapping[str, AnyPath], folder: AnyPath, report: Callable[[int], None] | None = None) -> None:
    """Copy files into a folder, under these names.

    Args:
      files: what to copy, by the path in the folder.
      folder: to write to; it and the files may be remote.
      report: called with the bytes of each part; None shows progress of its own where somebody listens.

    Raises:
      InputError: a file cannot be read.
      OSError: one cannot be written.
    """
    if report is not None:
        for name, file in files.items():
            for size in _copy(epath.Path(file), epath.Path(folder) / name):
                report(size)
        return
    megabytes = sum(map(size_to_copy, files.values())) // 10**6
    with stage("copying other files", total=megabytes, unit="MB") as advance:
        copy_all(files, folder, in_megabytes(advance))


def _copy(source: epath.Path, target: epath.Path) -> Iterator[int]:
    """Copies one file; yields the size of each part as it is written."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(source) or is_remote(target):
        with source.open("rb") as reader, writing(target), target.open("wb") as writer:
            while part := reader.read(_BLOCK_BYTES):
                writer.write(part)
                yield len(part)
        return
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    with opened_to_read(Path(source)) as descriptor, writing(target), Path(target).open("wb", 0) as writer:
        for begin, end in _stretches(descriptor):
            writer.seek(begin)
            for start in range(begin, end, _BLOCK_BYTES):
                part = buffer[: min(_BLOCK_BYTES, end - start)]
                read_exactly(descriptor, part, start, Path(source))
                done = 0
                while done < len(part):
                    done += writer.write(part[done:])
                yield len(part)
        writer.truncate(os.fstat(descriptor).st_size)


def _stretches(descriptor: int) -> Iterator[tuple[int, int]]:
    """Where an open file has data; all of it where the file system knows no holes."""
    end, size = 0, os.fstat(descriptor).st_size
    while end < size:
        try:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # nothing but a hole is left
        end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        yield begin, end


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
