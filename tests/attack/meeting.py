"""Processes that meet: two that begin one output at the same moment, and a run that is killed at any moment."""

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import toys
from attack.running import Silent, Target, content_of, judged
from etils import epath

from clp_jax.checkpoint import read_spec, write_params
from clp_jax.checkpoint.orbax.chunks import PARAMS, TRAIN_STATE, stored_arrays
from clp_jax.checkpoint.orbax.decoding import read_array
from clp_jax.checkpoint.verifying import verify
from clp_jax.errors import InputError
from clp_jax.plan import PrunePlan

_SECONDS, _ROUNDS = 600.0, 5
_STEPS, _KILLS = 6, 3
_MOMENTS = "moments.json"


def race_prune(folder: Path) -> Target:
    """Two prunings."""
    return _race(folder, lambda source, out: ["prune", *_paths(source, out), "--keep", "0,1"], content_of)


def race_export(folder: Path) -> Target:
    """Two exports."""
    return _race(
        folder, lambda source, out: ["export", *_paths(source, out), "--to", "openpi", "--check", "bits"], content_of
    )


def race_analyse(folder: Path) -> Target:
    """Two analyses."""

    def words(source: Path, out: Path) -> list[str]:
        return ["analyse", *_paths(source, out), "--data", str(source / "data.npz"), "--keep-layers", "2"]

    return _race(folder, words, lambda out: PrunePlan.load(out / "plan.json"))


def race_finetune(folder: Path) -> Target:
    """Two trainings."""
    return _race(folder, _finetune, _content_of_run)


def killed_finetune(folder: Path) -> Target:
    """A training that is killed a few times and resumed ends with the bits of one that was not."""
    unbroken: dict[str, str] = {}
    seconds: list[float] = []
    compiled = folder.parent / "compiled"

    def use(source: Path, out: Path) -> None:
        words, begun = [*_finetune(source, out), "--resume"], time.monotonic()
        for moment in json.loads((source / _MOMENTS).read_text()):
            with _started(words, compiled) as process, contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment * seconds[0])
            for step in out.iterdir() if out.exists() else ():
                if step.name.isdigit():
                    verify(read_spec(step), lambda _: None)
        with _started(words, compiled) as process:
            _end(process)
        seconds.append(time.monotonic() - begun)
        found = _content_of_run(out)
        if unbroken.setdefault("run", found) != found:
            raise Silent("the run that was killed ended with other bits than the one that was not")

    def draw(rng: random.Random, source: Path) -> str:
        (source / _MOMENTS).write_text(json.dumps(moments := [rng.random() for _ in range(_KILLS)]))
        return "killed after {} of its time".format(", ".join(f"{moment:.0%}" for moment in moments))

    return Target(_inputs(folder), use, damage=draw, seconds=_SECONDS * _KILLS, rounds=_ROUNDS)


def _race(folder: Path, words: Callable[[Path, Path], list[str]], read: Callable[[Path], object]) -> Target:
    """One of the two writes the whole output, the other is refused."""
    compiled = folder.parent / "compiled"

    def use(source: Path, out: Path) -> None:
        refusals = []
        with _started(words(source, out), compiled) as one, _started(words(source, out), compiled) as other:
            for process in (one, other):
                try:
                    _end(process)
                except InputError as error:
                    refusals.append(str(error))
        if len(refusals) != 1:
            raise Silent(f"{len(refusals)} of two processes were refused: {refusals}")
        read(out)

    return Target(_inputs(folder), use, damage=lambda rng, source: "two at once", seconds=_SECONDS, rounds=_ROUNDS)


@contextlib.contextmanager
def _started(words: list[str], compiled: Path) -> Iterator[subprocess.Popen]:
    """A process that the end of the block kills; what is compiled is kept for the next one."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(compiled)}
    command = [sys.executable, "-m", "clp_jax", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def _end(process: subprocess.Popen) -> None:
    stdout, stderr = process.communicate()
    judged(process.returncode, stdout, stderr)


def _inputs(folder: Path) -> Path:
    architecture = toys.architecture()
    write_params(folder / "checkpoint", toys.params(architecture))
    np.savez(folder / "data.npz", **toys.data(architecture, 24).arrays)
    (folder / _MOMENTS).write_text("[]")
    return folder


def _paths(source: Path, out: Path) -> list[str]:
    return ["--checkpoint", str(source / "checkpoint"), "--out", str(out)]


def _finetune(source: Path, out: Path) -> list[str]:
    numbers = ["--steps", str(_STEPS), "--batch-size", "8", "--save-every", "1", "--evaluate-every", "0"]
    return ["finetune", *_paths(source, out), "--data", str(source / "data.npz"), *numbers, "--no-augment"]


def _content_of_run(out: Path) -> str:
    """A digest of all numbers that the run ended with."""
    digest = hashlib.sha256()
    for item in (PARAMS, TRAIN_STATE):
        for name, array in sorted(stored_arrays(epath.Path(out) / str(_STEPS - 1) / item).items()):
            digest.update(f"{item} {name}".encode() + np.ascontiguousarray(read_array(array)).tobytes())
    return digest.hexdigest()
