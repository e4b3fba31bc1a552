"""What several action samples per observation cost and gain: step time, and the noise of the gradient.

Time is measured on the small π0 of the other benchmarks, noise on the embedded example, which was trained. A gradient
is noisy because of the observations that happen to be in its batch and because of the noise and times drawn for them.
k draws divide the second variance by k (measured here with the observations held fixed), not the first.

The gain is that of the time spent: variance times seconds at k = 1 over that at k. A larger batch of observations
divides all variance by what it multiplies the time by, a gain of 1; so above 1 more draws are the better use of a
second.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from clp_jax import example
from clp_jax.aliases import Tree
from clp_jax.benchmarks.small import LENGTHS, SMALL, random_observations
from clp_jax.benchmarks.steps import alternating, training_step
from clp_jax.data import CalibrationData
from clp_jax.flops import forward_flops
from clp_jax.loading import load_model
from clp_jax.models import Architecture, Gates, build, family_of
from clp_jax.models.pi0 import PI0
from clp_jax.training import StepSettings

SAMPLES = (1, 2, 4, 8)
_OBSERVATIONS = 256
"""Of the example, from which batches are drawn."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One number of action samples; ratios are to one sample.

    Attributes:
      samples: draws per observation.
      step_seconds: a training step of the small π0.
      step_bytes: its state and temporary memory on one device, as the compiler plans it.
      step_ratio: time.
      full_size_ratio: FLOPs of a full-size π0, counted.
      draw_noise: variance of the gradient on fixed observations.
      total_noise: variance of the gradient when the observations are drawn too.
      draw_gain: variance of the draws per second of the small π0.
      total_gain: all variance per second of the small π0.
    """

    samples: int
    step_seconds: float
    step_bytes: int
    step_ratio: float
    full_size_ratio: float
    draw_noise: float
    total_noise: float
    draw_gain: float
    total_gain: float


def run(*, batch_size: int = 4, repeats: int = 7, pairs: int = 24) -> list[Row]:
    """Measure all of `SAMPLES`.

    Args:
      batch_size: observations of a step, for time and for noise.
      repeats: timed steps of each.
      pairs: pairs of independent gradients behind each variance.
    """
    data = random_observations(SMALL, batch_size * jax.device_count())
    steps = {k: training_step(SMALL, data, StepSettings(augment=False, action_samples=k)) for k in SAMPLES}
    seconds = alternating({k: call for k, (call, _) in steps.items()}, repeats)
    flops = {k: forward_flops(PI0, LENGTHS, cameras=3, action_samples=k) for k in SAMPLES}
    model = load_model(example.CHECKPOINT, dtype="float32")
    observations = example.observations(_OBSERVATIONS)
    noise = {
        k: gradient_noise(model.architecture, model.params, observations, k, batch_size=batch_size, pairs=pairs)
        for k in SAMPLES
    }

    def row(k: int) -> Row:
        time = seconds[k] / seconds[1]
        draws, total = (noise[k][i] / noise[1][i] for i in range(2))
        return Row(
            samples=k,
            step_seconds=seconds[k],
            step_bytes=steps[k][1],
            step_ratio=time,
            full_size_ratio=flops[k] / flops[1],
            draw_noise=draws,
            total_noise=total,
            draw_gain=1 / (draws * time),
            total_gain=1 / (total * time),
        )

    return [row(k) for k in SAMPLES]


def gradient_noise(
    architecture: Architecture, params: Tree, data: CalibrationData, samples: int, *, batch_size: int, pairs: int
) -> tuple[float, float]:
    """Variance of the gradient, summed over all parameters: of the draws alone, and with the observations drawn too.

    Half the mean squared distance of two independent gradients is an unbiased estimate of it.
    """
    distance = _squared_distance(architecture, params, data, samples)
    rng, fixed, total = np.random.default_rng(0), [], []
    for number in range(pairs):
        one, other = (rng.integers(0, len(data), batch_size) for _ in range(2))
        keys = jax.random.split(jax.random.key(number))
        fixed.append(float(distance(one, one, keys)))
        total.append(float(distance(one, other, keys)))
    return float(np.mean(fixed)) / 2, float(np.mean(total)) / 2


def _squared_distance(
    architecture: Architecture, params: Tree, data: CalibrationData, samples: int
) -> Callable[..., jax.Array]:
    family, model = family_of(architecture), build(architecture)
    arrays = {key: jnp.asarray(x) for key, x in data.arrays.items() if key != "episode_index"}

    def gradient(chosen: jax.Array, key: jax.Array) -> dict:
        rows = jax.tree.map(lambda x: x[chosen], arrays)
        inputs, _ = family.draw(architecture, key, rows, samples)
        return jax.grad(lambda tree: jnp.mean(family.losses(model, tree, inputs, gates=Gates()).each))(params)

    @jax.jit
    def distance(one: jax.Array, other: jax.Array, keys: jax.Array) -> jax.Array:
        # One after the other through one traced gradient: half of the compilation.
        both = jax.lax.map(lambda pair: gradient(*pair), (jnp.stack([one, other]), keys))
        return sum(jnp.sum(jnp.square(x[0] - x[1])) for x in jax.tree.leaves(both))

    return distance


def show(rows: list[Row], console: Console) -> None:
    """Print the rows."""
    table = Table(title=f"Action samples per observation, measured on {jax.devices()[0].device_kind}")
    columns = ("samples", "training step", "memory", "full-size π0: FLOPs", "noise of the draws", "all noise")
    for column in (*columns, "gain (draws)", "gain (all)"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row.samples),
            f"{row.step_seconds * 1e3:.0f} ms ({row.step_ratio:.2f})",
            f"{row.step_bytes / 1e6:.0f} MB",
            f"{row.full_size_ratio:.2f}",
            f"{row.draw_noise:.3f}",
            f"{row.total_noise:.3f}",
            f"{row.draw_gain:.2f}",
            f"{row.total_gain:.2f}",
        )
    console.print(table)
