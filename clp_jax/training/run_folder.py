"""The folder of a run: whose it is, and that one run at a time writes to it."""

import contextlib
import os
import re
from collections.abc import Iterator

from etils import epath

from clp_jax.distributed import on_first
from clp_jax.outputs import resumable
from clp_jax.training.saving import DELETED

_BY = "clp finetune"
_NAMES = (
    r"\d+(\.orbax-checkpoint-tmp.*)?|(metrics\.jsonl|report\.html)(\.partial)?|metrics\.new|tensorboard|wandb|"
    r"wandb_id\.txt|" + re.escape(DELETED)
)
"""What a run writes: steps, saves that were cut off, steps on their way out, logs, its report; metrics.new is of an
earlier version."""


@contextlib.contextmanager
def run_folder(out: str | os.PathLike[str], *, resume: bool, overwrite: bool) -> Iterator[epath.Path]:
    """The folder of a run for this run alone, on all its processes, until the block ends.

    The first process holds a lock of the kernel on the folder's manifest, which a killed process loses. Remote folders
    have no locks: there, two runs must be kept apart by whoever starts them.

    Args:
      out: the folder; created if absent.
      resume: it may hold a run to go on with.
      overwrite: remove the run that it holds.

    Raises:
      InputError: it is not empty and neither was said, it is not a run of ours, or another run is writing to it.
    """
    folder = epath.Path(out).expanduser()
    with contextlib.ExitStack() as lifetime:
        held = resumable(
            folder, by=_BY, what=f"writing a run to {folder}", resume=resume, overwrite=overwrite, names=_NAMES
        )
        on_first(lambda: lifetime.enter_context(held), "take the folder of the run")
        yield folder
