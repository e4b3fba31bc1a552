"""Numbers of a run, where people look for them: ``metrics.jsonl``, TensorBoard, and wandb if asked."""

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clp_jax.errors import InputError

LOG_FILE = "metrics.jsonl"


class Logs:
    """Writes scalars by step, from the first process alone; ``metrics.jsonl`` holds one line for each call.

    Args:
      folder: of the run.
      start: first step to come; lines from there on, of a run that was killed later than it was saved, are dropped.
      wandb_project: also log there; the run keeps its identity when it is resumed.
      config: settings to show in wandb.
    """

    def __init__(self, folder: os.PathLike[str], *, start: int, wandb_project: str | None, config: Mapping[str, Any]):
        from tensorboardX import SummaryWriter

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / LOG_FILE
        if self._file.exists():
            _drop_from(self._file, start)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)
        self._wandb = None if wandb_project is None else _wandb_run(folder, wandb_project, config)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log values after a step; safe against a kill at any moment once it returns."""
        with self._file.open("a") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Close the files."""
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _drop_from(file: Path, start: int) -> None:
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] < start:
                kept.append(line + "\n")
        except (ValueError, KeyError):  # the line that a kill cut short
            break
    fresh = file.with_suffix(".new")
    fresh.write_text("".join(kept))
    fresh.replace(file)


def import_wandb() -> Any:
    """The package, which few want and so nothing else needs.

    Raises:
      InputError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise InputError("--wandb needs the package wandb: pip install wandb, or leave the flag out.") from None


def _wandb_run(folder: Path, project: str, config: Mapping[str, Any]) -> Any:
    wandb = import_wandb()
    identity = folder / "wandb_id.txt"
    known = identity.read_text().strip() if identity.exists() else None
    run = wandb.init(project=project, id=known, resume="allow", name=folder.name, config=dict(config))
    identity.write_text(run.id)
    return run
