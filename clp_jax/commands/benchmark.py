"""``clp benchmark``: our parts beside their peers, measured in one run."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from rich.console import Console

from clp_jax.benchmarks import analysis_overhead, checkpoint_io, cka_peers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Measure one part: cka (against other packages), checkpoint (pruning a full-size π0), analysis (its overhead)."""

    part: Literal["cka", "checkpoint", "analysis"]
    """What to measure."""
    out: str | None = None
    """Also write the numbers to this JSON file."""
    folder: str | None = None
    """checkpoint: where to put about 30 GB for a while; the system's temporary folder if absent."""
    chunks: Literal["leaf", "layer"] = "leaf"
    """checkpoint: one chunk per leaf, as Orbax saves a model on one device, or one per layer, as clp prune writes."""


def run(config: Benchmark) -> None:
    """Run the command."""
    console = Console()
    if config.part == "cka":
        result = cka_peers.run()
        cka_peers.show(result, console)
    elif config.part == "analysis":
        result = analysis_overhead.run()
        analysis_overhead.show(result, console)
    else:
        result = checkpoint_io.run(folder=config.folder, chunks=config.chunks)
        checkpoint_io.show(result, console)
    if config.out is not None:
        Path(config.out).write_text(json.dumps(result, indent=2) + "\n")
