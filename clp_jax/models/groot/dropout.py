"""Dropout of the action head's transformers: what training leaves out at random, as diffusers' blocks have it.

A mask belongs to a row and a block, and is drawn from a number that comes with the row. So neither the devices over
which a batch is split nor the parts in which it is run change it.
"""

import enum
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, UInt32

from clp_jax.aliases import AnyArray, Array
from clp_jax.models.layers.gating import repeated

SEED = "dropout_seed"
"""Key of the numbers among a batch's inputs, [b] uint32; without them nothing is left out."""


class Site(enum.IntEnum):
    """Where in a block values are left out; the output of attention passes two of them, adapters' inputs the last."""

    ATTENTION = 0
    AGAIN = 1
    HIDDEN = 2
    FEED_FORWARD = 3
    QUERY = 4
    KEY = 5
    VALUE = 6


def block_keys(seeds: UInt32[AnyArray, " b"] | None, tower: int, depth: int, rows: int) -> Any:
    """A random key per block and row [depth, rows], or None where nothing is left out.

    Args:
      seeds: one per observation.
      tower: a number of its own for each stack of blocks.
      depth: of the stack.
      rows: of its stream, several neighbours per observation where it has several draws of noise.
    """
    if seeds is None:
        return None
    draws = jnp.arange(rows) % (rows // seeds.shape[0])
    of_row = jax.vmap(lambda seed, draw: _folded(jax.random.key(seed), tower, draw))(repeated(seeds, rows), draws)
    return jax.vmap(lambda block: jax.vmap(lambda key: jax.random.fold_in(key, block))(of_row))(jnp.arange(depth))


def dropped(x: Float[Array, "r t d"], keys: Any, rate: float, *sites: Site) -> Float[Array, "r t d"]:
    """The values with a share of them set to zero and the others enlarged, so that the mean stays.

    Args:
      x: values.
      keys: of the block [r]; None leaves the values as they are.
      rate: the share.
      sites: one after another, each with a mask of its own.
    """
    if keys is None or rate == 0.0:
        return x
    shape = x.shape[1:]
    for site in sites:
        of_site = jax.vmap(jax.random.fold_in, (0, None))(keys, int(site))
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(of_site)
        x = jnp.where(kept, x / (1 - rate), 0)
    return x


def _folded(key: Any, *numbers: Any) -> Any:
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
