"""Time and memory of pruning a full-size checkpoint on disk, against copying the bytes that stay.

The checkpoint holds random weights in the shapes of a real model. It is written and pruned in processes of their own,
so that each one's peak memory is its own. Pages that the kernel caches for files are not part of it: nothing is mapped.
"""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import zstandard
from etils import epath

from clp_jax import checkpoint
from clp_jax.aliases import Tree
from clp_jax.checkpoint.orbax import spec as orbax_spec
from clp_jax.checkpoint.orbax.writer import COMPRESSOR, ArrayForm, ItemWriter
from clp_jax.trees import flatten

Layout = Literal["leaf", "orbax", "layer"]
"""Chunks of the source: one a leaf; as Orbax saves a model (halved until at most 2 GiB); one a row of axis 0."""

ORBAX_CHUNK_BYTES = 2**31


@dataclasses.dataclass(frozen=True)
class CheckpointIoConfig:
    """Prune a checkpoint of random weights on disk and measure it.

    Attributes:
      scratch: existing folder to work in; needs room for the checkpoint and twice the pruned one, freed afterwards.
      layouts: chunk layouts of the source to measure.
      stack: beginning of the paths whose axis 0 is the depth to halve.
      bfloat16_exact: weights that bfloat16 holds exactly, stored as float32; they compress to half.
    """

    scratch: Path
    layouts: tuple[Layout, ...] = ("orbax", "leaf", "layer")
    stack: str = "PaliGemma/llm/layers/"
    bfloat16_exact: bool = False


@dataclasses.dataclass(frozen=True)
class CheckpointIoResult:
    """One measurement; sizes in bytes, times in seconds.

    Attributes:
      layout: chunk layout of the source.
      source_bytes: size of the source's arrays, decoded.
      largest_leaf: size of the largest array.
      kept_bytes: size of the arrays that stay, decoded.
      stored_bytes: size of the output folder's files.
      prune_seconds: wall time of `rewrite`, which leaves writing back to the kernel, as ``cp`` does.
      prune_cpu_seconds: processor time of `rewrite`, user and system, which other load on the machine hardly changes.
      prune_peak_bytes: peak resident memory of the pruning process.
      copy_seconds: wall time of ``cp -r`` of the output folder.
      copy_sync_seconds: the same, and ``sync`` of the copy.
    """

    layout: Layout
    source_bytes: int
    largest_leaf: int
    kept_bytes: int
    stored_bytes: int
    prune_seconds: float
    prune_cpu_seconds: float
    prune_peak_bytes: int
    copy_seconds: float
    copy_sync_seconds: float


def run(config: CheckpointIoConfig, tree: Tree) -> list[CheckpointIoResult]:
    """Measures every layout, one after another, and deletes what it wrote.

    Args:
      config: what to measure.
      tree: shapes and dtypes of the parameters.

    Returns:
      One result a layout.
    """
    return [_measure(config, flatten(tree), layout) for layout in config.layouts]


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


def _measure(
    config: CheckpointIoConfig, shapes: Mapping[str, jax.ShapeDtypeStruct], layout: Layout
) -> CheckpointIoResult:
    source, out, copy = (config.scratch / f"clp_checkpoint_io_{name}" for name in ("source", "pruned", "copy"))
    try:
        in_own_process(make_checkpoint, source, shapes, layout=layout, bfloat16_exact=config.bfloat16_exact)
        os.sync()
        report, cpu, peak = in_own_process(_prune, source, out, config.stack)
        os.sync()
        started = time.perf_counter()
        subprocess.run(["cp", "-r", out, copy], check=True)
        copied = time.perf_counter() - started
        subprocess.run(["sync", "-f", copy], check=True)
        synced = time.perf_counter() - started
        return CheckpointIoResult(
            layout=layout,
            source_bytes=report.bytes_in,
            largest_leaf=max(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in shapes.values()),
            kept_bytes=report.bytes_out,
            stored_bytes=sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
            prune_seconds=report.seconds,
            prune_cpu_seconds=cpu,
            prune_peak_bytes=peak,
            copy_seconds=copied,
            copy_sync_seconds=synced,
        )
    finally:
        for folder in (source, out, copy):
            shutil.rmtree(folder, ignore_errors=True)


def _prune(source: Path, out: Path, stack: str) -> tuple[checkpoint.RewriteReport, float, int]:
    """Keeps every second layer; returns the report, and this process's processor time and peak resident memory."""
    spec = orbax_spec.read_spec(source)
    keep = {path: range(0, leaf.shape[0], 2) for path, leaf in flatten(spec.tree).items() if path.startswith(stack)}
    started = time.process_time()
    report = checkpoint.rewrite(spec, out, take=keep)
    return report, time.process_time() - started, peak_memory()


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
