"""Who sees whom, and where: attention masks, positions and their rotary embedding; and what is read from those seen."""

import functools

import jax
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


def attend(
    q: Float[Array, "b t n h"],
    keys: Float[Array, "b s k h"],
    values: Float[Array, "b s k h"],
    mask: Bool[Array, "b t s"],
    *,
    masked: float,
    scale: float | None = None,
    blind_read_nothing: bool = False,
) -> Float[Array, "b t n h"]:
    """Grouped-query attention with a float32 softmax; neighbouring query heads share a key head.

    Args:
      q: queries, in the dtype in which they meet the keys.
      keys: of the tokens that may be seen.
      values: of the same.
      mask: who sees whom.
      masked: logit of who is not seen, finite: a token that sees nobody sees all alike.
      scale: of the logits; None where the queries have it.
      blind_read_nothing: a token that sees nobody reads zeros instead.
    """
    grouped = q.reshape(*q.shape[:2], keys.shape[2], -1, q.shape[3])
    in_order = functools.partial(_attend, masked=masked, scale=scale, blind_read_nothing=blind_read_nothing)
    # XLA on CPU lays logits out as they are written and would transpose them; XLA on TPU chooses itself, and finds more
    # to fuse where a head's tokens are neighbours.
    read = jax.lax.platform_dependent(
        grouped,
        keys.astype(q.dtype),
        values,
        mask,
        cpu=functools.partial(in_order, order="BKTGS"),
        default=functools.partial(in_order, order="BKGTS"),
    )
    return read.reshape(q.shape)


def _attend(
    q: Float[Array, "b t k g h"],
    keys: Float[Array, "b s k h"],
    values: Float[Array, "b s k h"],
    mask: Bool[Array, "b t s"],
    *,
    order: str,
    masked: float,
    scale: float | None,
    blind_read_nothing: bool,
) -> Float[Array, "b t k g h"]:
    """With logits whose axes are in this order."""
    logits = jnp.einsum(f"BTKGH,BSKH->{order}", q, keys, preferred_element_type=jnp.float32)
    logits = logits if scale is None else logits * scale
    seen = jnp.expand_dims(mask, (order.index("K"), order.index("G")))
    weights = jax.nn.softmax(jnp.where(seen, logits, masked), axis=-1)
    if blind_read_nothing:
        weights = jnp.where(seen.any(axis=-1, keepdims=True), weights, 0.0)
    return jnp.einsum(f"{order},BSKH->BTKGH", weights.astype(values.dtype), values)
