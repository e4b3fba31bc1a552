"""Output folders that are complete or absent, or say how far they are; deleted only by the command that wrote them."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from clp_jax.errors import InputError
from clp_jax.folders import is_remote
from clp_jax.machine import full_disk_named, is_full
from clp_jax.outputs.lines import append_line, whole_lines
from clp_jax.outputs.locks import alone, locked
from clp_jax.outputs.ownership import MANIFEST, check_own, read_manifest, sign, writable, write_manifest
from clp_jax.outputs.resumable import resumable
from clp_jax.outputs.whole import write_whole

__all__ = [
    "staged",
    "resumable",
    "append_line",
    "whole_lines",
    "write_whole",
    "check_apart",
    "check_free",
    "MANIFEST",
    "check_own",
    "read_manifest",
    "sign",
    "writable",
    "write_manifest",
    "alone",
    "locked",
]

_NEW = ".unfinished-"
_OLD = ".replaced-"


@contextlib.contextmanager
def staged(
    out: str | os.PathLike, *, by: str, overwrite: bool = False, sources: Sequence[str | os.PathLike] = ()
) -> Iterator[epath.Path]:
    """Yields a temporary sibling of `out` that becomes `out` when the block ends without an exception.

    A local folder is renamed, so `out` is complete or absent whenever the process is killed; what a killed run left
    beside it is removed by the next run for the same `out`. With `overwrite`, the old folder stays until the new one
    is complete. (Files are not synced one by one: after a loss of power, check what was written in the last
    seconds.) A remote address knows no rename: the block writes to `out` itself and must write the file by which
    readers recognise a complete folder last; on failure everything there is removed.

    Args:
      out: folder to create; its parents are created as needed.
      by: what writes it, such as "clp prune"; the manifest will say so.
      overwrite: replace an existing folder that `by` wrote.
      sources: what the block reads; `out` must not be, hold or lie in any of them.

    Yields:
      The folder to write to, which exists and is empty.

    Raises:
      OSError: the disk is full; it names `out`.
      InputError: `out` exists, and `overwrite` is false or it is no output of `by`, or it overlaps with a
        source.
    """
    check_apart(out, sources)
    with (_staged_remote if is_remote(out) else _staged_local)(out, by, overwrite=overwrite) as folder:
        yield folder
        sign(folder, by)


def check_apart(out: str | os.PathLike, sources: Sequence[str | os.PathLike], *, may_lie_inside: bool = False) -> None:
    """Raise an `InputError` if an output is, holds or, unless it may, lies in one of the folders that are read."""
    for source in sources:
        a, b = (str(p).rstrip("/") if is_remote(p) else os.path.realpath(Path(p).expanduser()) for p in (out, source))
        inside = f"{a}/".startswith(f"{b}/") and not (may_lie_inside and a != b)
        if inside or f"{b}/".startswith(f"{a}/"):
            raise InputError(f"the output {a} overlaps with the input {b}; choose an output folder outside of it")


def check_free(
    out: str | os.PathLike, *, by: str, overwrite: bool = False, sources: Sequence[str | os.PathLike] = ()
) -> None:
    """Raise where `staged` would: before the work of hours whose result it is to take."""
    check_apart(out, sources)
    _refuse_existing(epath.Path(out) if is_remote(out) else Path(out).expanduser().absolute(), by, overwrite=overwrite)


@contextlib.contextmanager
def _staged_local(out: str | os.PathLike, by: str, *, overwrite: bool) -> Iterator[epath.Path]:
    target = Path(out).expanduser().absolute()
    with contextlib.ExitStack() as lifetime:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with locked(target.parent):
                _clean(target)
                _refuse_existing(target, by, overwrite=overwrite)
                folder = target.with_name(f".{target.name}{_NEW}{secrets.token_hex(4)}")
                folder.mkdir()
                lifetime.enter_context(locked(folder))
        except OSError as error:
            if is_full(error):
                raise
            raise InputError(f"cannot create {target}: {error.strerror}; choose another output folder") from error
        lifetime.callback(_remove, folder)
        with full_disk_named(target, instead_of=folder):
            yield epath.Path(folder)
        _publish(folder, target, by, overwrite=overwrite)


@contextlib.contextmanager
def _staged_remote(out: str | os.PathLike, by: str, *, overwrite: bool) -> Iterator[epath.Path]:
    target = epath.Path(out)
    _refuse_existing(target, by, overwrite=overwrite)
    if target.exists():
        target.rmtree()
    try:
        target.mkdir(parents=True, exist_ok=True)
        yield target
    except BaseException:
        target.rmtree(missing_ok=True)
        raise


def _publish(folder: Path, target: Path, by: str, *, overwrite: bool) -> None:
    """Renames the finished folder; between the two renames of an overwrite the old one lies beside, see `_clean`."""
    replaced = target.with_name(f".{target.name}{_OLD}{secrets.token_hex(4)}")
    with locked(target.parent):
        _refuse_existing(target, by, overwrite=overwrite)
        if target.exists():
            target.rename(replaced)
        folder.rename(target)
    _remove(replaced)


def _clean(target: Path) -> None:
    """Removes what killed runs left beside `target`; a live run holds a lock on its folder."""
    for replaced in _siblings(target, _OLD):
        if target.exists():
            _remove(replaced)
        else:
            replaced.rename(target)
    for folder in _siblings(target, _NEW):
        with locked(folder, wait=False) as alone:
            if alone:
                _remove(folder)


def _siblings(target: Path, kind: str) -> list[Path]:
    """What lies beside `target` under its temporary names; a pattern would read brackets in its name."""
    return [path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}{kind}")]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _refuse_existing(target: Path | epath.Path, by: str, *, overwrite: bool) -> None:
    if not (target.exists() or (isinstance(target, Path) and target.is_symlink())):
        return
    if not overwrite:
        raise InputError(f"{target} exists already; choose another output folder or pass --overwrite")
    check_own(epath.Path(target), by)
