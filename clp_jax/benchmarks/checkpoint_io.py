"""Time and memory of pruning, exporting and loading a checkpoint on disk, beside their floors, ``cp`` and Orbax.

The checkpoints hold random weights in the shapes of models. Everything is measured in a process of its own, so that
peak memory is its own, and imports are not counted. Pages that the kernel caches for files are not part of the peak:
nothing is mapped. Files that are read were written just before, so reads are warm; writing back is left to the kernel,
as ``cp`` does, and waited for before the next measurement.
"""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from clp_jax.aliases import Tree
from clp_jax.benchmarks import checkpoint_floors as floors
from clp_jax.benchmarks.made_checkpoints import make_checkpoint, make_folder
from clp_jax.checkpoint.orbax import spec as orbax_spec
from clp_jax.checkpoint.orbax.chunks import stored_arrays
from clp_jax.checkpoint.orbax.params import read_params
from clp_jax.checkpoint.orbax.slicing import columns, copy_columns, rewrite
from clp_jax.checkpoint.orbax.writer import ItemWriter
from clp_jax.checkpoint.safetensors.folder import read_folder
from clp_jax.checkpoint.safetensors.slicing import slice_folder
from clp_jax.models import pi0, smolvla
from clp_jax.models.layers.siglip import SiglipSizes
from clp_jax.models.pi0 import GemmaSizes
from clp_jax.trees import flatten

MODEL = pi0.Architecture(
    kind="pi0",
    vision=SiglipSizes(width=576, depth=27, mlp_dim=2152, num_heads=8, patch_size=14, num_tokens=256),
    vlm=GemmaSizes(width=1024, depth=18, mlp_dim=8192, num_heads=8, num_kv_heads=1, head_dim=128),
    action=GemmaSizes(width=512, depth=18, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=128),
    vocab_size=65536,
    action_dim=32,
    dtype="float32",
)
"""A π0 of half the width: as many arrays, 3 GB of float32, so that Orbax can hold it, too."""

POLICY = smolvla.SMOLVLA
"""The released SmolVLA, here 1.8 GB of float32."""

Work = Literal["prune", "prune tensors", "export", "load"]
"""What is done: with Orbax's form, with a folder of safetensors (where ``cp`` is the floor), or with Orbax's again."""

Name = Literal["floor", "cp", "clp", "orbax"]


@dataclasses.dataclass(frozen=True)
class CheckpointIoConfig:
    """Prune, export and load checkpoints of random weights on disk, and measure it.

    Attributes:
      scratch: existing folder to work in; needs room for both checkpoints and twice the larger, freed afterwards.
      stack: beginning of the paths whose axis 0 is the depth to halve.
      rounds: how often everything is measured, one after another, so that other load falls on all alike.
    """

    scratch: Path
    stack: str = "PaliGemma/llm/layers/"
    rounds: int = 3


class _Cost(NamedTuple):
    """Of one run: seconds of wall and of processor, user and system; peak resident memory in bytes."""

    wall: float
    cpu: float
    peak: int


@dataclasses.dataclass(frozen=True)
class CheckpointIoResult:
    """One row of the table; sizes in bytes, times in seconds.

    Attributes:
      work: what is done.
      by: the least that it can cost, ``cp`` of what stays, we, or Orbax by itself.
      seconds: wall time, median of the rounds.
      cpu_seconds: processor time, user and system, median; other load on the machine hardly changes it.
      over_floor: wall time by the floor's of the same round, median.
      cpu_over_floor: the same of processor time.
      peak_bytes: peak resident memory of its process, the largest.
      decoded_bytes: size of the arrays that come out.
    """

    work: Work
    by: Name
    seconds: float
    cpu_seconds: float
    over_floor: float
    cpu_over_floor: float
    peak_bytes: int
    decoded_bytes: int


def run(config: CheckpointIoConfig, tree: Tree, policy: smolvla.Architecture) -> list[CheckpointIoResult]:
    """Measures pruning, exporting and loading, and deletes what it wrote.

    Args:
      config: what to measure.
      tree: shapes and dtypes of the parameters of the checkpoint in Orbax's form.
      policy: whose folder of safetensors is pruned.
    """
    step, pruned_step, folder, pruned_folder, out = (
        config.scratch / f"clp_checkpoint_io_{name}"
        for name in ("step", "pruned_step", "folder", "pruned_folder", "out")
    )
    shapes = flatten(tree)
    rows = {path: range(0, leaf.shape[0], 2) for path, leaf in shapes.items() if path.startswith(config.stack)}
    blocks = {name: [block for block in range(policy.depths[name]) if block % 4 < 2] for name in policy.groups[0]}
    measured: dict[tuple[Work, Name], list[_Cost]] = defaultdict(list)
    try:
        in_own_process(make_checkpoint, step, shapes, layout="orbax")
        in_own_process(make_folder, folder, policy)
        _prune(step, rows, pruned_step)
        _prune_tensors(folder, blocks, pruned_folder)
        tensors = sum(tensor.size for tensor in read_folder(pruned_folder).tensors.values())
        sizes = {
            "prune": _decoded(pruned_step),
            "prune tensors": tensors,
            "export": _decoded(step),
            "load": _decoded(step),
        }
        for _ in range(config.rounds):
            for (work, by), function in _STEPS.items():
                os.sync()
                whole, smaller, keep = (
                    (folder, pruned_folder, blocks) if work == "prune tensors" else (step, pruned_step, rows)
                )
                cost = in_own_process(_measured, function, smaller if by == "cp" else whole, keep, out)
                measured[work, by].append(cost)
                shutil.rmtree(out, ignore_errors=True)
    finally:
        for made in (step, pruned_step, folder, pruned_folder, out):
            shutil.rmtree(made, ignore_errors=True)
    floor = {work: costs for (work, by), costs in measured.items() if by == _floor_of(work)}
    return [_row(work, by, costs, floor[work], sizes[work]) for (work, by), costs in measured.items()]


def _floor_of(work: Work) -> Name:
    return "cp" if work == "prune tensors" else "floor"


def show(rows: list[CheckpointIoResult], console: Console) -> None:
    """Print the table."""
    table = Table(
        title="A π0 of half the width in Orbax's form and SmolVLA's tensors, random float32, half of the blocks go; "
        f"warm reads, {os.cpu_count()} cores"
    )
    for column in ("work", "by", "wall", "x floor", "CPU", "x floor", "MB/s", "peak memory"):
        table.add_column(column, justify="left" if column in ("work", "by") else "right")
    for row in rows:
        table.add_row(
            row.work,
            {"clp": f"clp {row.work}", "orbax": "Orbax alone", "cp": "cp of the output"}.get(row.by, row.by),
            f"{row.seconds:.1f} s",
            f"{row.over_floor:.2f}",
            f"{row.cpu_seconds:.1f} s",
            f"{row.cpu_over_floor:.2f}",
            f"{row.decoded_bytes / row.seconds / 1e6:.0f}",
            f"{row.peak_bytes / 1e6:.0f} MB",
        )
    console.print(table)


def _row(work: Any, by: Name, costs: list[_Cost], floor: list[_Cost], size: int) -> CheckpointIoResult:
    pairs = list(zip(costs, floor, strict=True))
    return CheckpointIoResult(
        work=work,
        by=by,
        seconds=statistics.median(cost.wall for cost in costs),
        cpu_seconds=statistics.median(cost.cpu for cost in costs),
        over_floor=statistics.median(cost.wall / least.wall for cost, least in pairs),
        cpu_over_floor=statistics.median(cost.cpu / least.cpu for cost, least in pairs),
        peak_bytes=max(cost.peak for cost in costs),
        decoded_bytes=size,
    )


def _floor_of_pruning(source: Path, keep: floors.Rows, out: Path) -> None:
    floors.prune(orbax_spec.read_spec(source), keep, out)


def _copy(source: Path, keep: floors.Rows, out: Path) -> None:
    del keep
    subprocess.run(["cp", "-r", source, out], check=True)


def _prune(source: Path, keep: floors.Rows, out: Path) -> None:
    rewrite(orbax_spec.read_spec(source), out, take=keep)


def _prune_tensors(source: Path, keep: floors.Rows, out: Path) -> None:
    slice_folder(read_folder(source), keep, out)


def _floor_of_exporting(source: Path, keep: floors.Rows, out: Path) -> None:
    del keep
    floors.export(orbax_spec.read_spec(source), out)


def _export(source: Path, keep: floors.Rows, out: Path) -> None:
    """What ``clp export --to openpi --check bits`` does of weights that stay as they are."""
    del keep
    arrays = stored_arrays(orbax_spec.read_spec(source).path).values()
    with ItemWriter(epath.Path(out) / "params", read_back=True) as writer:
        copy_columns([column for array in arrays for column in columns(array, None, writer)], lambda _: None)


def _prune_by_orbax(source: Path, keep: floors.Rows, out: Path) -> None:
    floors.prune_by_orbax(orbax_spec.read_spec(source), keep, out)


def _floor_of_loading(source: Path, keep: floors.Rows, out: Path) -> None:
    del keep, out
    floors.load(orbax_spec.read_spec(source))


def _load(source: Path, keep: floors.Rows, out: Path) -> None:
    del keep, out
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    jax.block_until_ready(read_params(orbax_spec.read_spec(source), sharding=device))


def _load_by_orbax(source: Path, keep: floors.Rows, out: Path) -> None:
    del keep, out
    floors.restore_by_orbax(orbax_spec.read_spec(source))


_STEPS: Mapping[tuple[Work, Name], Callable[[Path, floors.Rows, Path], None]] = {
    ("prune", "floor"): _floor_of_pruning,
    ("prune", "cp"): _copy,
    ("prune", "clp"): _prune,
    ("prune", "orbax"): _prune_by_orbax,
    ("prune tensors", "cp"): _copy,
    ("prune tensors", "clp"): _prune_tensors,
    ("export", "floor"): _floor_of_exporting,
    ("export", "clp"): _export,
    ("load", "floor"): _floor_of_loading,
    ("load", "clp"): _load,
    ("load", "orbax"): _load_by_orbax,
}


def _measured(step: Callable[[Path, floors.Rows, Path], None], source: Path, keep: floors.Rows, out: Path) -> _Cost:
    """Runs a step in this process, whose imports are done, with its devices found."""
    jax.devices()
    cpu, started = _processor_time(), time.perf_counter()
    step(source, keep, out)
    return _Cost(time.perf_counter() - started, _processor_time() - cpu, peak_memory())


def _processor_time() -> float:
    """Seconds of this process and of the commands that it ran, user and system."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def _decoded(step: Path) -> int:
    leaves = flatten(orbax_spec.read_spec(step).tree).values()
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def peak_memory() -> int:
    """Peak resident memory of this process image in bytes (Linux; ``ru_maxrss`` would include the parent's)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def in_own_process(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Returns what a function returns in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()
