"""``clp benchmark``: our parts beside their peers, measured in one run."""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from clp_jax.benchmarks import action_samples, analysis_overhead, checkpoint_io, cka_peers, depth, loader
from clp_jax.checkpoint import read_spec
from clp_jax.commands.model_flags import ModelFlags
from clp_jax.commands.results import print_json
from clp_jax.commands.unused import refuse_unused
from clp_jax.editable_json import write_json
from clp_jax.errors import InputError
from clp_jax.loading import default_dtype, read_architecture
from clp_jax.models import Architecture, abstract_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark(ModelFlags):
    """Measure one part.

    cka: against other packages; checkpoint: pruning, exporting and loading beside their floors, cp and Orbax;
    analysis: its overhead; depth: training step, memory and latency at 18, 12 and 9 blocks, or of your checkpoints;
    serving: latency and requests per second of your checkpoints; action-samples: step time and gradient noise with
    several draws per observation; full-size: time and memory of analysing, pruning, sampling and exporting a π0 of
    random weights; loader: samples per second of your data set, beside lerobot's own reader where it is installed.
    """

    part: Literal["cka", "checkpoint", "analysis", "depth", "serving", "action-samples", "full-size", "loader"]
    """Part to measure."""
    checkpoint: str | None = None
    """depth and serving: your pruned checkpoint; depth takes a small random model if absent."""
    against: str | None = None
    """depth and serving: the checkpoint that it was made from."""
    data: str | None = None
    """loader: a LeRobot data set with videos, folder or hub id."""
    workers: int | None = None
    """loader: threads that read; as many as there are cores if absent."""
    shape: tuple[int, int, int] = (18, 2048, 512)
    """cka: states, samples of each, and their width."""
    out: str | None = None
    """Also write the numbers to this JSON file, which must not exist."""
    json: bool = False
    """Print the numbers as JSON instead of tables."""
    scratch: str | None = None
    """checkpoint and full-size: a folder with 12 and 25 GB of room, freed afterwards; the system's temporary one if
    absent."""


_OF_MODELS = [field.name for field in dataclasses.fields(ModelFlags)]

_READ_BY = {
    **dict.fromkeys((*_OF_MODELS, "checkpoint", "against"), ("depth", "serving")),
    **dict.fromkeys(("data", "workers"), ("loader",)),
    "shape": ("cka",),
    "scratch": ("checkpoint", "full-size"),
}
"""Parts that a flag is for, where it is not for all."""


def run(config: Benchmark) -> None:
    """Run the command."""
    _refuse_unused(config)
    if config.shape[1] < 4:
        raise InputError(f"--shape has {config.shape[1]} samples of each state; CKA needs four.")
    if config.out is not None:
        _check_free(Path(config.out))
    result = _measured(config, Console(quiet=config.json))
    if config.json:
        print_json(result)
    if config.out is not None:
        write_json(config.out, result)


def _check_free(out: Path) -> None:
    """Raise where the numbers could not be written, before minutes are spent on measuring them."""
    if os.path.lexists(out):
        raise InputError(f"{out} exists already; choose another --out, or remove it.")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} for --out {out}; make it first, or choose another --out.")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"cannot write {out}: its folder permits no new file; choose another --out.")


def _refuse_unused(config: Benchmark) -> None:
    others = [name for name, parts in _READ_BY.items() if config.part not in parts]
    refuse_unused(config, others, f"nothing in --part {config.part} depends on {{it}}")
    if config.part == "depth" and config.checkpoint is None and config.against is None:
        reason = "nothing in the small random model depends on {it}"
        refuse_unused(config, _OF_MODELS, reason, instead="give --checkpoint and --against, too")


def _measured(config: Benchmark, console: Console) -> Any:
    """Measures the part and shows its table; returns the numbers as JSON values."""
    scratch = Path(config.scratch or tempfile.gettempdir())
    if config.part == "cka":
        result: Any = cka_peers.run(*config.shape)
        console.print(cka_peers.table(result))
        return result
    if config.part == "analysis":
        result = analysis_overhead.run()
        analysis_overhead.show(result, console)
        return result
    if config.part == "depth":
        rows = depth.run(_models(config))
        depth.show(rows, console)
    elif config.part == "action-samples":
        rows = action_samples.run()
        action_samples.show(rows, console)
    elif config.part == "serving":
        if config.checkpoint is None or config.against is None:
            raise InputError("--part serving compares two checkpoints: give --checkpoint and --against.")
        from clp_jax.benchmarks import serving  # websockets: only here

        result = serving.run(config.checkpoint, config.against, settings=config.model_settings())
        serving.show(result, console)
        return result
    elif config.part == "loader":
        if config.data is None:
            raise InputError("--part loader reads a data set: give --data.")
        result = loader.run(config.data, workers=config.workers)
        loader.show(result, console)
        return result
    elif config.part == "full-size":
        from clp_jax.benchmarks import full_size

        rows = full_size.run(scratch, console)
        full_size.show(rows, console)
    else:
        tree, settings = abstract_params(checkpoint_io.MODEL), checkpoint_io.CheckpointIoConfig(scratch)
        rows = checkpoint_io.run(settings, tree, checkpoint_io.POLICY)
        checkpoint_io.show(rows, console)
    return [dataclasses.asdict(row) for row in rows]


def _models(config: Benchmark) -> dict[str, Architecture]:
    if config.checkpoint is None and config.against is None:
        return depth.models_at_depths()
    if config.checkpoint is None or config.against is None:
        raise InputError("give --checkpoint and --against together: the pruned one and the full one.")
    names = (config.against, config.checkpoint)
    settings = config.model_settings()
    return {name: read_architecture(read_spec(name), dtype=default_dtype(), **settings) for name in names}
