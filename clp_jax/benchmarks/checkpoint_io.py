"""Time and memory of pruning and loading a checkpoint on disk, beside their floors, ``cp`` and Orbax.

The checkpoint holds random weights in the shapes of a model. Everything is measured in a process of its own, so that
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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import zstandard
from etils import epath
from rich.console import Console
from rich.table import Table

from clp_jax.aliases import Tree
from clp_jax.benchmarks import checkpoint_floors as floors
from clp_jax.checkpoint.orbax import spec as orbax_spec
from clp_jax.checkpoint.orbax.params import read_params
from clp_jax.checkpoint.orbax.slicing import rewrite
from clp_jax.checkpoint.orbax.writer import COMPRESSOR, ArrayForm, ItemWriter
from clp_jax.models import pi0
from clp_jax.models.layers.siglip import SiglipSizes
from clp_jax.models.pi0 import GemmaSizes
from clp_jax.trees import flatten

Layout = Literal["leaf", "orbax", "layer"]
"""Chunks of a checkpoint: one a leaf; as Orbax saves a model (halved until at most 2 GiB); one a row of axis 0."""

ORBAX_CHUNK_BYTES = 2**31

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

Name = Literal["floor", "cp", "clp", "orbax"]


@dataclasses.dataclass(frozen=True)
class CheckpointIoConfig:
    """Prune and load a checkpoint of random weights on disk, as Orbax saves it, and measure it.

    Attributes:
      scratch: existing folder to work in; needs room for the checkpoint and twice the pruned one, freed afterwards.
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

    work: Literal["prune", "load"]
    by: Name
    seconds: float
    cpu_seconds: float
    over_floor: float
    cpu_over_floor: float
    peak_bytes: int
    decoded_bytes: int


def run(config: CheckpointIoConfig, tree: Tree) -> list[CheckpointIoResult]:
    """Measures pruning and loading, and deletes what it wrote.

    Args:
      config: what to measure.
      tree: shapes and dtypes of the parameters.
    """
    source, pruned, out = (config.scratch / f"clp_checkpoint_io_{name}" for name in ("source", "pruned", "out"))
    shapes = flatten(tree)
    keep = {path: range(0, leaf.shape[0], 2) for path, leaf in shapes.items() if path.startswith(config.stack)}
    measured: dict[tuple[str, Name], list[_Cost]] = defaultdict(list)
    try:
        in_own_process(make_checkpoint, source, shapes, layout="orbax")
        _prune(source, keep, pruned)
        sizes = {"load": _decoded(source), "prune": _decoded(pruned)}
        for _ in range(config.rounds):
            for (work, by), step in _STEPS.items():
                os.sync()
                measured[work, by].append(in_own_process(_measured, step, pruned if by == "cp" else source, keep, out))
                shutil.rmtree(out, ignore_errors=True)
    finally:
        for folder in (source, pruned, out):
            shutil.rmtree(folder, ignore_errors=True)
    return [_row(work, by, costs, measured[work, "floor"], sizes[work]) for (work, by), costs in measured.items()]


def show(rows: list[CheckpointIoResult], console: Console) -> None:
    """Print the table."""
    table = Table(
        title=f"Half of the blocks of a π0 of half the width, random float32; warm reads, {os.cpu_count()} cores"
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


def make_checkpoint(
    folder: os.PathLike,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    *,
    layout: Layout,
    bfloat16_exact: bool = False,
    seed: int = 0,
) -> None:
    """Writes a checkpoint of random weights, one chunk in memory at a time.

    Args:
      folder: step folder to create.
      shapes: shape and dtype by path; dtypes of two bytes or more.
      layout: how the arrays are cut into chunks.
      bfloat16_exact: round every value to what bfloat16 holds.
      seed: of the random weights.
    """
    random = np.random.default_rng(seed)
    pool = random.standard_normal(2**24, np.float32) * 0.02
    if bfloat16_exact:
        pool = (pool.view(np.uint32) & 0xFFFF0000).view(np.float32)
    with ItemWriter(epath.Path(folder) / "params") as writer:
        for path, leaf in shapes.items():
            name, dtype = ".".join(["params", *path.split("/")]), np.dtype(leaf.dtype)
            chunk = _chunk_shape(leaf.shape, dtype.itemsize, layout)
            writer.add(name, ArrayForm(leaf.shape, chunk, dtype))
            values = pool.astype(dtype)
            for index in np.ndindex(*(math.ceil(n / c) for n, c in zip(leaf.shape, chunk, strict=True))):
                with writer.open_chunk(name, index) as file:
                    encoder = zstandard.ZstdCompressor(COMPRESSOR["level"]).compressobj(
                        size=math.prod(chunk) * dtype.itemsize
                    )
                    for block in _random_blocks(random, values, math.prod(chunk)):
                        file.write(encoder.compress(block.view(np.uint8).data))
                    file.write(encoder.flush())


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


_STEPS: Mapping[tuple[Literal["prune", "load"], Name], Callable[[Path, floors.Rows, Path], None]] = {
    ("prune", "floor"): _floor_of_pruning,
    ("prune", "cp"): _copy,
    ("prune", "clp"): _prune,
    ("prune", "orbax"): _prune_by_orbax,
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


def _chunk_shape(shape: tuple[int, ...], itemsize: int, layout: Layout) -> tuple[int, ...]:
    """Returns the shape of a chunk.

    >>> _chunk_shape((18, 2, 2048, 16384), 4, "orbax")
    (18, 2, 2048, 4096)
    """
    if layout == "layer" and len(shape) > 2:
        return (1, *shape[1:])
    chunk = list(shape)
    while layout == "orbax" and math.prod(chunk) * itemsize > ORBAX_CHUNK_BYTES:
        chunk[int(np.argmax(chunk))] //= 2
    return tuple(chunk)


def _random_blocks(random: np.random.Generator, pool: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Yields elements: stretches of a pool far longer than what zstd looks back on, so none seems repeated."""
    while count:
        start = int(random.integers(pool.size - pool.size // 4))
        block = pool[start : start + min(count, pool.size // 4)]
        count -= block.size
        yield block
