"""Folders of a user: the files below one, and names that may not lead out of it."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from etils import epath

from clp_jax.errors import InputError


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is an address such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def leads_out(name: str) -> bool:
    """Whether a name is no path of something below whatever folder it is put into.

    >>> [leads_out(name) for name in ("my_org/my_robot", "../my_robot", "/etc", "")]
    [False, True, True, True]
    """
    odd = not name.isprintable() or "\\" in name or PurePosixPath(name).is_absolute()
    return odd or bool({"", ".", ".."} & set(name.split("/")))


def check_inside(name: str, what: str) -> str:
    """A name from a flag or a file, if it is a path below whatever folder it is put into.

    Args:
      name: perhaps with "/" in it.
      what: says in messages where the name is from.

    Raises:
      InputError: it is empty, absolute, or leads out of the folder.
    """
    if leads_out(name):
        raise InputError(f"{what} {name!r} leads out of its folder; give a name such as my_org/my_robot")
    return name


def check_open(path: str | os.PathLike) -> None:
    """Raise where permissions forbid to look into a local folder, which looks as if nothing were there.

    Args:
      path: a folder, a file, or nothing at all, of which others say what is wrong.

    Raises:
      InputError: names the folder.
    """
    if is_remote(path):
        return
    local = Path(path).expanduser()
    for folder in (*reversed(local.absolute().parents), local):
        try:
            closed = not os.access(folder, os.X_OK | (os.R_OK if folder == local else 0)) and folder.is_dir()
        except PermissionError:
            closed = True
        if closed:
            raise InputError(f"{folder} cannot be read: Permission denied; ask whoever owns it, or copy what is in it")


def files_below(folder: epath.Path) -> list[epath.Path]:
    """All files below a folder, sorted by their path.

    Args:
      folder: may be remote, where there are no links.

    Raises:
      InputError: it holds a pipe, a device, or a link to a folder or to something outside of it.
    """
    if is_remote(folder):
        parts = [files_below(child) if child.is_dir() else [child] for child in folder.iterdir()]
        return sorted(file for part in parts for file in part)
    return sorted(map(epath.Path, _walk(Path(folder), Path(folder).resolve())))


def _walk(folder: Path, real: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            yield from _walk(path, real)
            continue
        if stat.S_ISLNK(mode):
            mode = linked_file(path, real).stat().st_mode
        if not stat.S_ISREG(mode):
            raise InputError(f"{path} is no file (a pipe, a device, or a link to a folder); remove it")
        yield path


def linked_file(link: Path, top: Path) -> Path:
    """What a link leads to: something in the same folder, or in the ``blobs`` of the hub's cache around it.

    Args:
      link: a symbolic link.
      top: the folder that it may not lead out of, itself without links.

    Raises:
      InputError: it leads elsewhere or nowhere.
    """
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise InputError(f"{link} is a link to {link.readlink()}, which is not there; download it again") from error
    blobs = [parent / "blobs" for parent in (top.parent, top.parent.parent)]
    blobs += [parent.parent / "blobs" for parent in top.parents if parent.name == "snapshots"]
    if not any(target.is_relative_to(place) for place in [top, *blobs]):
        raise InputError(
            f"{link} is a link to {target}, outside of the checkpoint; put the file in its place, or make the folder "
            "anew without links"
        )
    return target
