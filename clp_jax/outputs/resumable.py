"""Output folders that grow while a program runs, and with which it goes on after it was killed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from clp_jax.errors import InputError
from clp_jax.folders import is_remote
from clp_jax.machine import full_disk_named
from clp_jax.outputs.locks import alone
from clp_jax.outputs.ownership import MANIFEST, check_begun, check_own, sign, writable


@contextlib.contextmanager
def resumable(
    folder: epath.Path, *, by: str, what: str, resume: bool, overwrite: bool, names: str | None = None
) -> Iterator[None]:
    """Takes a folder for this process alone until the block ends.

    The lock is one of the kernel on the folder's manifest, which a killed process loses. Remote folders have no locks:
    there, two runs must be kept apart by whoever starts them.

    Args:
      folder: created if absent.
      by: what writes it, such as "clp finetune"; the manifest will say so.
      what: what only one process may do, for the message.
      resume: it may hold something to go on with.
      overwrite: remove what it holds.
      names: as for `check_own` and `check_begun`.

    Raises:
      InputError: it is not empty and neither was said, it is not an output of `by`, or another process has it.
      OSError: the disk is full; it names the folder.
    """
    if resume and overwrite:
        raise InputError("give --resume or --overwrite, not both.")
    if folder.exists() and overwrite:
        check_own(folder, by, names=names)
    with writable(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"{folder} is no folder; choose another --out.") from None
        held = [child for child in folder.iterdir() if child.name != MANIFEST]
        if held and not overwrite:
            check_begun(folder, by, names=names)
        if held and not (resume or overwrite):
            raise InputError(f"{folder} is not empty; go on with --resume, or delete it with --overwrite.")
        if not (folder / MANIFEST).exists():
            sign(folder, by)
    lock = contextlib.nullcontext() if is_remote(folder) else alone(Path(folder / MANIFEST), what)
    with lock, full_disk_named(folder):
        for child in held if overwrite else []:
            child.rmtree() if child.is_dir() else child.unlink()
        yield
