"""Parameters and floating-point operations of a model, counted in the programs that run it, traced on shapes alone.

One multiply-add is two operations. Counted are the matrix products (projections, attention, feed-forward, embeddings of
patches, heads); norms, activations and softmax are left out, below one per cent at full size.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clp_jax.models import Architecture, Gates, Lengths, abstract_params, build, family_of, views
from clp_jax.operations import count_operations
from clp_jax.trees import flatten


def parameter_count(architecture: Architecture) -> int:
    """Parameters of the model.

    >>> from clp_jax.models.pi0 import PI0
    >>> parameter_count(PI0)
    3238048528
    """
    return sum(math.prod(leaf.shape) for leaf in flatten(abstract_params(architecture)).values())


@functools.lru_cache(maxsize=64)
def forward_flops(architecture: Architecture, lengths: Lengths, *, cameras: int, action_samples: int = 1) -> int:
    """One forward pass on one observation, as in training.

    Args:
      architecture: of the model.
      lengths: chunk and prompt.
      cameras: images of an observation.
      action_samples: draws of noise and time that share what does not depend on them.
    """
    family, model = family_of(architecture), build(architecture)
    batch = _one_observation(architecture, lengths, cameras)

    def forward(params: Any, batch: Any) -> Any:
        inputs, _ = family.draw(architecture, jax.random.key(0), batch, action_samples)
        return family.forward(model, params, inputs, gates=Gates())[0]

    return _count(forward, architecture, batch)


@functools.lru_cache(maxsize=64)
def sample_flops(architecture: Architecture, lengths: Lengths, *, cameras: int, num_steps: int | None = None) -> int:
    """Sampling one action chunk; with the model's own number of steps if none is given."""
    family, model = family_of(architecture), build(architecture)
    batch = _one_observation(architecture, lengths, cameras)
    noise = batch.pop("actions")
    steps = family.num_steps(architecture) if num_steps is None else num_steps

    def sample(params: Any, batch: Any) -> Any:
        inputs, noise = batch
        return family.sample(model, params, inputs, noise=noise, num_steps=steps, gates=Gates())

    return _count(sample, architecture, (batch, noise))


def _one_observation(architecture: Architecture, lengths: Lengths, cameras: int) -> dict[str, jax.ShapeDtypeStruct]:
    family = family_of(architecture)
    inputs = family.inputs(architecture, lengths, views(architecture, cameras))
    return {key: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype) for key, leaf in inputs.items()}


def _count(function: Callable[..., Any], architecture: Architecture, batch: Any) -> int:
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), abstract_params(architecture))
    traced = jax.jit(function).trace(params, batch)
    leaves = len(jax.tree.leaves((params, batch)))
    return count_operations(traced.jaxpr, [False] * leaves).flops
