"""The folder of a run: whose it is, and that one run at a time writes to it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from clp_jax.distributed import on_first
from clp_jax.errors import InputError
from clp_jax.folders import is_remote
from clp_jax.outputs import MANIFEST, alone, check_own, sign

_NAMES = r"\d+(\.orbax-checkpoint-tmp.*)?|metrics\.(jsonl|new)|tensorboard|wandb|wandb_id\.txt"
"""What a run writes: steps, saves that were cut off, logs."""


@contextlib.contextmanager
def run_folder(
    out: str | os.PathLike[str], *, resume: bool, overwrite: bool, by: str = "clp finetune", names: str = _NAMES
) -> Iterator[epath.Path]:
    """The folder of a run for this run alone, on all its processes, until the block ends.

    The first process holds a lock of the kernel on the folder's manifest, which a killed process loses. Remote folders
    have no locks: there, two runs must be kept apart by whoever starts them.

    Args:
      out: the folder; created if absent.
      resume: it may hold a run to go on with.
      overwrite: remove the run that it holds.
      by: the command that writes it, for the manifest.
      names: regular expression of what that command writes there.

    Raises:
      InputError: it is not empty and neither was said, it is not a run of ours, or another run is writing to it.
    """
    folder = epath.Path(out).expanduser()
    with contextlib.ExitStack() as lifetime:
        on_first(
            lambda: _take(folder, lifetime, by, names, resume=resume, overwrite=overwrite), "take the folder of the run"
        )
        yield folder


def _take(
    folder: epath.Path, lifetime: contextlib.ExitStack, by: str, names: str, *, resume: bool, overwrite: bool
) -> None:
    if resume and overwrite:
        raise InputError("give --resume or --overwrite, not both.")
    if folder.exists() and overwrite:
        check_own(folder, by, names=names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{folder} is no folder; choose another --out.") from None
    held = [child for child in folder.iterdir() if child.name != MANIFEST]
    if held and not (resume or overwrite):
        raise InputError(f"{folder} is not empty; go on with --resume, or delete it with --overwrite.")
    if not (folder / MANIFEST).exists():
        sign(folder, by)
    if not is_remote(folder):
        lifetime.enter_context(alone(Path(folder / MANIFEST), f"writing a run to {folder}"))
    for child in held if overwrite else []:
        child.rmtree() if child.is_dir() else child.unlink()
