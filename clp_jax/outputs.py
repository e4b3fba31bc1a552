"""Output folders that are complete or absent."""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from clp_jax.errors import InputError

_NEW = ".unfinished-"
_OLD = ".replaced-"


@contextlib.contextmanager
def staged(
    out: str | os.PathLike, *, overwrite: bool = False, sources: Sequence[str | os.PathLike] = ()
) -> Iterator[epath.Path]:
    """Yields a temporary sibling of `out` that becomes `out` when the block ends without an exception.

    A local folder is renamed, so `out` is complete or absent whenever the process is killed; what a killed run left
    beside it is removed by the next run for the same `out`. With `overwrite`, the old folder stays until the new one
    is complete. (Files are not synced one by one: after a loss of power, check what was written in the last
    seconds.) A remote address knows no rename: the block writes to `out` itself and must write the file by which
    readers recognise a complete folder last; on failure everything there is removed.

    Args:
      out: folder to create; its parents are created as needed.
      overwrite: replace an existing folder.
      sources: what the block reads; `out` must not be, hold or lie in any of them.

    Yields:
      The folder to write to, which exists and is empty.

    Raises:
      InputError: `out` exists and `overwrite` is false, or it overlaps with a source.
    """
    for source in sources:
        _check_apart(out, source)
    with (_staged_remote if is_remote(out) else _staged_local)(out, overwrite=overwrite) as folder:
        yield folder


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is an address such as gs://bucket/folder."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def _staged_local(out: str | os.PathLike, *, overwrite: bool) -> Iterator[epath.Path]:
    target = Path(out).expanduser().absolute()
    with contextlib.ExitStack() as lifetime:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(target.parent):
                _clean(target)
                _refuse_existing(target, overwrite=overwrite)
                folder = target.with_name(f".{target.name}{_NEW}{secrets.token_hex(4)}")
                folder.mkdir()
                lifetime.enter_context(_locked(folder))
        except OSError as error:
            raise InputError(f"cannot create {target}: {error.strerror}; choose another output folder") from error
        lifetime.callback(_remove, folder)
        yield epath.Path(folder)
        _publish(folder, target, overwrite=overwrite)


@contextlib.contextmanager
def _staged_remote(out: str | os.PathLike, *, overwrite: bool) -> Iterator[epath.Path]:
    target = epath.Path(out)
    _refuse_existing(target, overwrite=overwrite)
    if target.exists():
        target.rmtree()
    try:
        target.mkdir(parents=True, exist_ok=True)
        yield target
    except BaseException:
        target.rmtree(missing_ok=True)
        raise


def _publish(folder: Path, target: Path, *, overwrite: bool) -> None:
    """Renames the finished folder; between the two renames of an overwrite the old one lies beside, see `_clean`."""
    replaced = target.with_name(f".{target.name}{_OLD}{secrets.token_hex(4)}")
    with _locked(target.parent):
        _refuse_existing(target, overwrite=overwrite)
        if target.exists():
            target.rename(replaced)
        folder.rename(target)
    _remove(replaced)


def _clean(target: Path) -> None:
    """Removes what killed runs left beside `target`; a live run holds a lock on its folder."""
    for replaced in target.parent.glob(f".{target.name}{_OLD}*"):
        if target.exists():
            _remove(replaced)
        else:
            replaced.rename(target)
    for folder in target.parent.glob(f".{target.name}{_NEW}*"):
        with _locked(folder, wait=False) as alone:
            if alone:
                _remove(folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds an exclusive lock on a folder, which the kernel releases however the process ends.

    Yields whether there is a lock: some network file systems have none for folders, and with `wait` false another
    process may hold it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)


def _refuse_existing(target: Path | epath.Path, *, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists already; choose another output folder or pass --overwrite")


def _check_apart(out: str | os.PathLike, source: str | os.PathLike) -> None:
    a, b = (str(p).rstrip("/") if is_remote(p) else os.path.realpath(Path(p).expanduser()) for p in (out, source))
    if f"{a}/".startswith(f"{b}/") or f"{b}/".startswith(f"{a}/"):
        raise InputError(f"the output {a} overlaps with the input {b}; choose an output folder outside of it")
