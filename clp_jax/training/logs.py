"""Numbers of a run, where people look for them: ``metrics.jsonl``, TensorBoard, and wandb if asked."""

import importlib
import json
import operator
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from clp_jax.errors import InputError
from clp_jax.folders import is_remote
from clp_jax.outputs import write_whole

LOG_FILE = "metrics.jsonl"
BOARD = "tensorboard"


class Logs:
    """Writes scalars by step, from the first process alone; ``metrics.jsonl`` holds one line for each call.

    Args:
      folder: of the run. A remote one has no TensorBoard files, and its ``metrics.jsonl`` is written anew each time.
      start: first step to come; lines from there on, of a run that was killed later than it was saved, are dropped.
      wandb_project: also log there; the run keeps its identity when it is resumed.
      config: settings to show in wandb.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, start: int, wandb_project: str | None, config: Mapping[str, Any]
    ):
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / LOG_FILE
        self._lines = _lines_before(self._file, start)
        self._rewrite()
        self._board = None
        if not is_remote(folder):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(os.fspath(folder / BOARD), purge_step=start)
        self._wandb = None if wandb_project is None else _wandb_run(folder, wandb_project, config)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log values after a step; safe against a kill at any moment once it returns."""
        self._lines.append(json.dumps({"step": step, **values}) + "\n")
        if self._board is None:
            self._rewrite()
        else:
            with self._file.open("a") as stream:
                stream.write(self._lines[-1])
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Close the files."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _rewrite(self) -> None:
        write_whole(self._file, "".join(self._lines))


class Curve(NamedTuple):
    """What one scalar was in the course of a run.

    Attributes:
      steps: after which it was logged, ascending.
      values: one for each.
    """

    steps: Int[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]


def read_log(folder: str | os.PathLike[str]) -> dict[str, Curve]:
    """The curves of a run by the names of their scalars; lines that a kill or a bad disk damaged are left out.

    Args:
      folder: of the run, which may be going on; no curves without a log.
    """
    found: dict[str, dict[int, float]] = {}
    for line in _lines_before(epath.Path(folder) / LOG_FILE, None):
        entry = json.loads(line)
        step = entry.pop("step")
        for name, value in entry.items():
            if isinstance(value, float | int):
                found.setdefault(name, {})[step] = value
    return {
        name: Curve(np.array(sorted(curve), np.int64), np.array([curve[step] for step in sorted(curve)], np.float64))
        for name, curve in found.items()
    }


def import_wandb() -> Any:
    """The package, which few want and so nothing else needs.

    Raises:
      InputError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise InputError("--wandb needs the package wandb: pip install wandb, or leave the flag out.") from None


def _lines_before(file: epath.Path, start: int | None) -> list[str]:
    """The lines of steps before one, or all; what a kill cut short or a bad disk damaged is left out, wherever."""
    kept = []
    for line in file.read_bytes().decode(errors="replace").split("\n") if file.exists() else []:
        try:
            step = operator.index(json.loads(line)["step"])
            if start is None or step < start:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def _wandb_run(folder: epath.Path, project: str, config: Mapping[str, Any]) -> Any:
    wandb = import_wandb()
    identity = folder / "wandb_id.txt"
    known = identity.read_text().strip() if identity.exists() else None
    run = wandb.init(project=project, id=known, resume="allow", name=folder.name, config=dict(config))
    identity.write_text(run.id)
    return run
