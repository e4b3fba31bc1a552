"""One gate per block: 1 keeps it, 0 removes it exactly."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Float, Shaped

from clp_jax.aliases import AnyArray, Array


def gated(x: Float[Array, "_b s d"], y: Float[Array, "_b s d"], gate: Float[AnyArray, " _g"]) -> Float[Array, "_b s d"]:
    """``(1 - g) x + g y``: a block with input x and output y under its gates.

    Args:
      x: stream before the block.
      y: stream after it.
      gate: one for the batch, or one per observation; each then serves the neighbouring rows of that observation.
    """
    gate = repeated(jnp.asarray(gate), x.shape[0])[:, None, None].astype(x.dtype)
    return (1 - gate) * x + gate * y


def repeated(x: Shaped[Array, "b *_rest"], rows: Any) -> Shaped[Array, "_rows *_rest"]:
    """Each row as often as it takes to have ``rows`` of them (symbolic in an export); copies are neighbours."""
    return x if x.shape[0] == rows else jnp.repeat(x, rows // x.shape[0], axis=0)
