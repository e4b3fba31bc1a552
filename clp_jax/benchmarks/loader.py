"""Samples per second that a data set with videos gives, beside lerobot's own reader in PyTorch's loader.

A sample is the pictures of all cameras at one row and a chunk of actions from there, in random order: what training
reads. Rounds alternate, so that a busy machine disturbs both alike.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from clp_jax.benchmarks.peers import optional
from clp_jax.data.lerobot import LeRobotData
from clp_jax.data.lerobot_meta import find_folder, read_meta
from clp_jax.data.loader import BatchIterator
from clp_jax.errors import InputError, blamed_on
from clp_jax.models import RELEASED, Architecture, family_of, views
from clp_jax.training.throughput import PEAK_FLOPS, step_flops

_ACTION = "action"
_UTILISATION = 0.4
"""Of the peak of a chip that is kept busy: a good run's."""

Loader = Callable[[], Iterator[Any]]


def run(
    source: str,
    *,
    batch_size: int = 16,
    workers: int | None = None,
    horizon: int = 50,
    batches: int = 8,
    rounds: int = 5,
) -> dict[str, Any]:
    """Read a LeRobot data set in random order, by turns with both loaders.

    Args:
      source: folder or hub id.
      batch_size: samples of a batch.
      workers: threads of ours, processes of PyTorch's; as many as there are cores if None.
      horizon: actions of a sample.
      batches: of a round at least, after one of each worker that are not timed.
      rounds: of each loader.

    Returns:
      ``samples_per_second`` per loader (the median of its rounds; None where lerobot is not installed), ``ratio``,
      ``needed``: samples per second that 8 H100 read when they train each released model at 40 % of their peak; and the
      conditions.

    Raises:
      InputError: the data set cannot be read, or has too few rows or no pictures.
    """
    folder = find_folder(source)
    meta = read_meta(folder)
    cameras = [key for key, feature in meta.features.items() if feature.get("dtype") in ("image", "video")]
    if not cameras:
        raise InputError(f"{source} has no pictures; this measures how fast they are read.")
    data = LeRobotData(meta)
    if len(data) < 2 * batch_size:
        raise InputError(f"{source} has {len(data)} rows; {2 * batch_size} are needed for batches of {batch_size}.")
    workers = os.cpu_count() or 1 if workers is None else workers
    loaders: dict[str, Loader] = {"clp_jax": _ours(data, cameras, batch_size, workers, horizon)}
    if (peer := _lerobots(folder, data.meta.fps, batch_size, workers, horizon)) is not None:
        loaders["lerobot"] = peer
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, loader in loaders.items():
            rates[name].append(batch_size * _batches_per_second(loader(), batches, workers))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    ours, theirs = medians["clp_jax"], medians.get("lerobot")
    return {
        "samples_per_second": {"clp_jax": ours, "lerobot": theirs},
        "ratio": None if theirs is None else ours / theirs,
        "needed": {name: _needed(architecture) for name, architecture in RELEASED.items()},
        "conditions": {
            "cameras": {key: _film(meta.features[key]) for key in cameras},
            "rows": len(data),
            "batch_size": batch_size,
            "workers": workers,
            "cores": os.cpu_count(),
            "horizon": horizon,
            "rounds": rounds,
        },
    }


def _ours(data: LeRobotData, cameras: list[str], batch_size: int, workers: int, horizon: int) -> Loader:
    (actions,) = data.numbers(_ACTION)

    def read(rows: np.ndarray) -> dict[str, np.ndarray]:
        chunks = [data.chunk(int(row), horizon) for row in rows]
        pictures = {key: np.stack([data.image(key, int(row)) for row in rows]) for key in cameras}
        return pictures | {
            _ACTION: np.stack([actions[chunk] for chunk, _ in chunks]),
            "action_is_pad": np.stack([is_pad for _, is_pad in chunks]),
        }

    return lambda: BatchIterator(read, np.arange(len(data)), batch_size, seed=0, workers=workers)


def _lerobots(folder: Any, fps: float, batch_size: int, workers: int, horizon: int) -> Loader | None:
    """PyTorch's loader of lerobot's data set; None if they are not installed."""
    torch, lerobot = (optional(name) for name in ("torch.utils.data", "lerobot.datasets.lerobot_dataset"))
    if torch is None or lerobot is None:
        return None
    chunk = {_ACTION: [step / fps for step in range(horizon)]}
    with blamed_on(f"the data set {folder}", verb="cannot be opened by lerobot's own reader"):
        data = lerobot.LeRobotDataset(
            "local/local", root=folder, delta_timestamps=chunk, video_backend="pyav", return_uint8=True
        )
    return lambda: _without_end(
        torch.DataLoader(data, batch_size=batch_size, shuffle=True, num_workers=workers, drop_last=True)
    )


def _without_end(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _batches_per_second(batches: Iterator[Any], count: int, workers: int) -> float:
    """Over so many batches at least, in whole turns of the workers, who begin together and are ready together.

    The first turn is not timed.
    """
    turn = max(workers, 1)
    for _ in range(turn):
        next(batches)
    count = turn * math.ceil(count / turn)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count / (time.perf_counter() - start)


def _needed(architecture: Architecture) -> float:
    """Samples per second of a full fine-tune on eight H100."""
    lengths = family_of(architecture).lengths(architecture)
    flops = step_flops(architecture, 1.0, lengths, cameras=len(views(architecture, 3)))
    return 8 * _UTILISATION * PEAK_FLOPS["NVIDIA H100"] / flops


def _film(feature: dict[str, Any]) -> str:
    info = feature.get("info") or {}
    codec = info.get("video.codec", feature.get("dtype"))
    return f"{'x'.join(str(size) for size in feature['shape'])} {codec}"


def show(result: dict[str, Any], console: Console) -> None:
    """Print what `run` found."""
    conditions, rates = result["conditions"], result["samples_per_second"]
    films = ", ".join(sorted(set(conditions["cameras"].values())))
    console.print(
        f"{len(conditions['cameras'])} cameras ({films}), batches of {conditions['batch_size']}, "
        f"{conditions['workers']} workers on {conditions['cores']} cores"
    )
    table = Table()
    table.add_column("loader")
    table.add_column("samples/s", justify="right")
    for name, rate in rates.items():
        table.add_row(name, "not installed" if rate is None else f"{rate:.0f}")
    console.print(table)
    if result["ratio"] is not None:
        console.print(f"clp_jax reads {result['ratio']:.2f} times as fast as lerobot.")
    needed = ", ".join(f"{name} {rate:.0f}" for name, rate in result["needed"].items())
    console.print(
        f"Training all of a model on 8 H100 at {_UTILISATION:.0%} of their peak reads, in samples/s: {needed}."
    )
