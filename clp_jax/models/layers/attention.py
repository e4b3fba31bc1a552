"""Who sees whom, and where: attention masks, positions and their rotary embedding."""

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from clp_jax.aliases import AnyArray, Array


def attention_mask(valid: Bool[AnyArray, "b s"], starts: Bool[AnyArray, "b s"]) -> Bool[Array, "b s s"]:
    """Who sees whom: valid tokens see valid tokens of their own block and of earlier ones.

    Args:
      valid: True where a token is real.
      starts: True where a token opens a new block; tokens of a block see each other in both directions.

    >>> attention_mask(jnp.ones((1, 3), bool), jnp.array([[False, False, True]]))[0].astype(int).tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """
    block = jnp.cumsum(starts, axis=1)
    return (block[:, None, :] <= block[:, :, None]) & valid[:, None, :] & valid[:, :, None]


def token_positions(valid: Bool[AnyArray, "b s"]) -> Array:
    """RoPE positions: valid tokens count from 0, padding repeats the position before it."""
    return jnp.cumsum(valid, axis=1) - 1


def rotate(x: Float[Array, "b t n h"], positions: Int[Array, "b t"], base: float = 10_000.0) -> Float[Array, "b t n h"]:
    """Rotary position embedding over split halves, in float32."""
    half = x.shape[-1] // 2
    wavelength = base ** ((2.0 / x.shape[-1]) * jnp.arange(half, dtype=jnp.float32))
    angle = positions[..., None].astype(jnp.float32) / wavelength[None, None, :]
    sin, cos = jnp.sin(angle)[:, :, None, :], jnp.cos(angle)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
