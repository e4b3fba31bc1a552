"""Around a scanned block: what its backward pass computes again, and where its activations are."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from clp_jax.aliases import Leaf

_POLICIES = {
    "all": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialised(block: Any, remat: str) -> Any:
    """A block class for a scan, or a function of a block.

    "all" keeps its input alone, "dots" also its products with weights, "none" all.
    """
    return block if remat == "none" else nn.remat(block, prevent_cse=False, policy=_POLICIES[remat])


def checkpointed(step: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """The same for the function of a `jax.lax.scan` whose parameters are among what it scans."""
    return step if remat == "none" else jax.checkpoint(step, prevent_cse=False, policy=_POLICIES[remat])


Rows = jax.sharding.NamedSharding | None
"""Sharding of the first axis of every activation; None leaves it to the compiler."""


def pinned(tree: Leaf, rows: Rows) -> Leaf:
    """The same arrays, split over the devices by observations; so are their cotangents.

    Left alone, XLA's partitioner lets the split of the parameters spread into the activations: it gathers the images
    of all devices on each of them and runs the encoder as a tensor-parallel one.
    """
    return tree if rows is None else jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, rows), tree)
