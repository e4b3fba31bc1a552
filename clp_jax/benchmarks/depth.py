"""What fewer blocks save: training step, memory and latency at several depths, beside the share of FLOPs that stay.

Depths alternate in one process, so that a busy machine disturbs all alike: read the ratios. Parameters are random;
speed does not depend on them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clp_jax.benchmarks.small import SMALL, random_observations
from clp_jax.benchmarks.steps import alternating, training_step
from clp_jax.data import CalibrationData
from clp_jax.errors import InputError
from clp_jax.flops import forward_flops, sample_flops
from clp_jax.models import Architecture, Gates, build, family_of, init_params
from clp_jax.training import StepSettings

DEPTHS = (18, 12, 9)
NUM_STEPS = 10


@dataclasses.dataclass(frozen=True)
class Row:
    """One depth.

    Attributes:
      name: of the model.
      depth: blocks of the language stack.
      step_seconds: a training step.
      step_bytes: state and temporary memory of the step on one device, as the compiler plans it.
      prefix_seconds: all of a chunk that is no integration step: images and prompt.
      sample_seconds: a whole action chunk.
      train_flops: of the forward pass, relative to the first row's.
      sample_flops: of sampling, relative to the first row's.
    """

    name: str
    depth: int
    step_seconds: float
    step_bytes: int
    prefix_seconds: float
    sample_seconds: float
    train_flops: float
    sample_flops: float


def models_at_depths() -> dict[str, Architecture]:
    """The small model at full depth and pruned."""
    return {f"{depth} blocks": SMALL.with_depths({"vlm": depth, "action": depth}) for depth in DEPTHS}


def run(models: Mapping[str, Architecture], *, batch_size: int = 4, repeats: int = 7) -> list[Row]:
    """Measure models, the first of which is what the others are compared with.

    Raises:
      InputError: a model that samples no actions.
    """
    for architecture in models.values():
        if (reason := family_of(architecture).why_no_actions(architecture)) is not None:
            raise InputError(f"the depth benchmark measures the sampling of actions: {reason}")
    calls, memory = {}, {}
    for name, architecture in models.items():
        lengths = family_of(architecture).lengths(architecture)
        data = random_observations(architecture, batch_size * jax.device_count(), lengths)
        calls[name, "step"], memory[name] = training_step(architecture, data, StepSettings(augment=False))
        calls[name, "one step"], calls[name, "sample"] = _inference(architecture, data.take([0]))
    seconds = alternating(calls, repeats)
    first = next(iter(models.values()))
    return [
        Row(
            name,
            architecture.depths[architecture.groups[0][0]],
            seconds[name, "step"],
            memory[name],
            _prefix_seconds(seconds[name, "one step"], seconds[name, "sample"]),
            seconds[name, "sample"],
            _share(forward_flops, architecture, first),
            _share(functools.partial(sample_flops, num_steps=NUM_STEPS), architecture, first),
        )
        for name, architecture in models.items()
    ]


def _share(count: Callable[..., int], architecture: Architecture, first: Architecture) -> float:
    """Operations relative to the first model's."""
    lengths = family_of(first).lengths(first)
    cameras = sum(key.startswith("image/") for key in family_of(first).inputs(first, lengths))
    return count(architecture, lengths, cameras=cameras) / count(first, lengths, cameras=cameras)


def _prefix_seconds(one_step: float, all_steps: float) -> float:
    """What a chunk takes beside its integration steps, from chunks of 1 and of `NUM_STEPS` steps."""
    return max(0.0, one_step - (all_steps - one_step) / (NUM_STEPS - 1))


def _inference(architecture: Architecture, data: CalibrationData) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Calls that sample one chunk in one step, and in `NUM_STEPS`."""
    family, model = family_of(architecture), build(architecture)
    params = jax.jit(functools.partial(init_params, architecture))(jax.random.key(0))
    inputs, noise = data.arrays, data.arrays["noise"]

    def call(num_steps: int) -> Callable[[], Any]:
        sample = jax.jit(
            lambda params, inputs, noise: family.sample(
                model, params, inputs, noise=noise, num_steps=num_steps, gates=Gates()
            )
        )
        return lambda: sample(params, inputs, noise)

    return call(1), call(NUM_STEPS)


def show(rows: list[Row], console: Console) -> None:
    """Print the rows: measured, and in brackets the share of the first row beside its share of FLOPs."""
    table = Table(
        title=f"Depth, measured on {jax.devices()[0].device_kind}: ratio to the first row (share of FLOPs that stay)"
    )
    table.add_column("model")
    for column in ("training step", "", "memory", "", "sampling", "", "prefix", f"{NUM_STEPS} denoising steps"):
        table.add_column(column, justify="right")
    first = rows[0]
    for row in rows:
        table.add_row(
            escape(row.name),
            f"{row.step_seconds * 1e3:.0f} ms",
            f"{row.step_seconds / first.step_seconds:.2f} ({row.train_flops:.2f})",
            f"{row.step_bytes / 1e6:.0f} MB",
            f"{row.step_bytes / max(first.step_bytes, 1):.2f}",
            f"{row.sample_seconds * 1e3:.0f} ms",
            f"{row.sample_seconds / first.sample_seconds:.2f} ({row.sample_flops:.2f})",
            f"{row.prefix_seconds * 1e3:.0f} ms",
            f"{(row.sample_seconds - row.prefix_seconds) * 1e3:.0f} ms",
        )
    console.print(table)
