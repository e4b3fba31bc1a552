"""What every family's low-rank adapters share: their names, and merging a whole tree."""

import re
from collections.abc import Callable
from typing import Any

from clp_jax.aliases import Tree
from clp_jax.errors import InputError
from clp_jax.trees import flatten, unflatten


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
