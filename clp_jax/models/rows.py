"""Where the observations of a batch are while the blocks run."""

import jax

from clp_jax.aliases import Leaf

Rows = jax.sharding.NamedSharding | None
"""Sharding of the first axis of every activation; None leaves it to the compiler."""


def pinned(tree: Leaf, rows: Rows) -> Leaf:
    """The same arrays, split over the devices by observations; so are their cotangents.

    Left alone, XLA's partitioner lets the split of the parameters spread into the activations: it gathers the images
    of all devices on each of them and runs the encoder as a tensor-parallel one.
    """
    return tree if rows is None else jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, rows), tree)
