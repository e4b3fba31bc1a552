"""What low-rank adapters of several families share: peft's product, names, and merging a whole tree."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from clp_jax.aliases import Array, Tree
from clp_jax.errors import InputError
from clp_jax.trees import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Low-rank adapters (LoRA) on the queries, keys and values of a transformer, as peft has them.

    Attributes:
      rank: of their product.
      scale: alpha / rank, by which it is multiplied.
      dropout: share of the adapters' inputs that training leaves out.
    """

    rank: int
    scale: float
    dropout: float = 0.0


def adapted(layer: nn.Module, y: Float[Array, "*o"], x: Float[Array, "*b i"], adapters: Adapters) -> Float[Array, "*o"]:
    """A dense layer's outputs with its adapter's product added; the two factors become parameters of the layer.

    Args:
      layer: whose adapter it is.
      y: its outputs [*b, out], or split over heads [*b, heads, channels].
      x: what the adapter reads, in the dtype of activations.
      adapters: rank and scale.
    """
    features = math.prod(y.shape[x.ndim - 1 :])
    a = layer.param("lora_a", _uniform, (x.shape[-1], adapters.rank))
    b = layer.param("lora_b", nn.initializers.zeros_init(), (adapters.rank, features))
    low = jnp.dot(x, jnp.asarray(a).astype(x.dtype))
    return y + jnp.dot(low, jnp.asarray(b).astype(x.dtype)).reshape(y.shape) * adapters.scale


def _uniform(rng: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Float[Array, "i r"]:
    """peft's first factor, Kaiming's with a = sqrt(5); the second is zero, so that the model begins as it was."""
    return jax.random.uniform(rng, shape, dtype, -1.0, 1.0) / shape[0] ** 0.5


def is_adapter(path: str) -> bool:
    """Whether a leaf is a factor of an adapter.

    >>> is_adapter("attn/q_einsum/lora_a"), is_adapter("mlp/linear_lora_b"), is_adapter("mlp/linear")
    (True, True, False)
    """
    return re.search(r"(?:^|[/_])lora_[ab]$", path) is not None


def merged(
    tree: Tree, factors_of: Callable[[str], tuple[str, str]], merge: Callable[[str, Any, Any, Any], Any]
) -> dict:
    """The same model without adapters: every pair of factors is multiplied and added to its weight.

    Args:
      tree: parameters below ``params``; a tree without adapters comes back as it is.
      factors_of: from a weight's path to those that its two factors would have.
      merge: from a weight's path, the weight and its factors to the merged weight.

    Returns:
      The tree without adapters; every leaf that had none is the same object.

    Raises:
      InputError: an adapter has no weight, or only one factor.
    """
    flat, found, used = flatten(tree), {}, set()
    for path, leaf in flat.items():
        first, second = factors_of(path)
        if first in flat and second in flat:
            found[path] = merge(path, leaf, flat[first], flat[second])
            used |= {first, second}
        elif not is_adapter(path):
            found[path] = leaf
    lonely = sorted(path for path in flat if is_adapter(path) and path not in used)
    if lonely:
        raise InputError(f"these adapters have no weight or only one factor: {', '.join(lonely)}.")
    return unflatten(found)
