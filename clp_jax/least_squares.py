"""Least squares with regularisation from sums over batches, for errors that a change of weights can take away.

An error [n, d] is to be written as ``gate * (x change)`` with x [n, f]. All that is kept of the data is x' x, x' error
and a few numbers, so data of any length costs the same memory. Sums over held-out data say how well any change does
there, without another look at it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from clp_jax.aliases import Array
from clp_jax.errors import InputError

_EXACT = jax.lax.Precision.HIGHEST


class Sums(NamedTuple):
    """Sums over valid tokens, in float32.

    Attributes:
      gram: x' x [f, f], tokens weighted by the mean square of their gates.
      cross: x' (gate * error) [f, d].
      error: squared norm of the error.
      wanted: squared norm of the state that is wanted.
      weight: of the tokens in ``gram``.
      gates: squared gates [d]; None without gates.
    """

    gram: Float[Array, "f f"]
    cross: Float[Array, "f d"]
    error: Float[Array, ""]
    wanted: Float[Array, ""]
    weight: Float[Array, ""]
    gates: Float[Array, " d"] | None

    @property
    def gated(self) -> bool:
        """Whether gates differ from token to token, so that one `fit` comes close and does not arrive."""
        return self.gates is not None


def sums_of(
    x: Float[Array, "b s f"],
    error: Float[Array, "b s d"],
    wanted: Float[Array, "b s d"],
    valid: Bool[Array, "b s"],
    gate: Float[Array, "b 1 d"] | None,
) -> Sums:
    """The sums over one batch."""
    counted = valid.astype(jnp.float32)[..., None]
    # Invalid tokens may hold anything, infinity included.
    x, error, wanted = (jnp.where(counted > 0, y, 0.0) for y in (x, error, wanted))
    if gate is None:
        weight, pulled, gates = counted, error, None
    else:
        square = jnp.square(gate) * counted
        weight, pulled, gates = square.mean(axis=-1, keepdims=True), error * gate, square.sum(axis=(0, 1))
    return Sums(
        gram=jnp.einsum("bsf,bsg->fg", x * weight, x, precision=_EXACT),
        cross=jnp.einsum("bsf,bsd->fd", x, pulled, precision=_EXACT),
        error=jnp.sum(jnp.square(error)),
        wanted=jnp.sum(jnp.square(wanted)),
        weight=jnp.sum(weight),
        gates=gates,
    )


def fit(
    sums: Sums, held_out: Sums, ridges: Sequence[float]
) -> tuple[float | None, Float[np.ndarray, "f d"], float, float]:
    """The change of weights that does best on held-out data.

    Args:
      sums: to fit on.
      held_out: to choose by.
      ridges: strengths of regularisation to try, in units of each channel's own mean square.

    Returns:
      The strength chosen, None if no change does better than none; the change; and the norm of the held-out error over
      that of what is wanted, before and after. With gates the change is a step towards the optimum: weights of tokens
      are taken as the product of one number a token and one a channel.
    """
    sums, held_out = (_where_it_is_solved(x) for x in (sums, held_out))
    best, ridge, change = float(held_out.error), None, jnp.zeros_like(sums.cross)
    for strength in ridges:
        tried, error = solve(sums, held_out, strength)
        if float(error) < best:  # so NaN, where a matrix cannot be factored, is never chosen
            best, ridge, change = float(error), strength, tried
    wanted = float(held_out.wanted)
    before, after = (max(x, 0.0) / wanted if wanted > 0 else 0.0 for x in (float(held_out.error), best))
    return ridge, np.asarray(change), before**0.5, after**0.5


def solved_on_host(platform: str) -> bool:
    """Whether sums on devices of this platform are solved by the host's LAPACK.

    XLA's factorisation for TPUs takes minutes to compile at thousands of channels, and its solver 16 GB at 16,384.
    """
    return platform == "tpu"


def _where_it_is_solved(sums: Sums) -> Sums:
    (platform,) = {device.platform for device in sums.gram.devices()}
    if not solved_on_host(platform):
        return sums
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise InputError("healing on a TPU solves on its host: let JAX_PLATFORMS be tpu,cpu.") from None
    return jax.device_put(sums, host)


@jax.jit
def solve(sums: Sums, held_out: Sums, ridge: Array) -> tuple[Float[Array, "f d"], Float[Array, ""]]:
    """The change at one strength of regularisation, and the squared norm of what it leaves of the held-out error."""
    diagonal = jnp.diagonal(sums.gram)
    # In units in which every channel has a mean square of 1, which also keeps the matrix well conditioned.
    scale = jnp.where(diagonal > 0, jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1.0)), 0.0)
    matrix = sums.gram * scale[:, None] * scale + ridge * jnp.eye(len(scale))
    factor = jax.scipy.linalg.cho_factor(matrix, lower=True)
    change = jax.scipy.linalg.cho_solve(factor, sums.cross * scale[:, None]) * scale[:, None]
    if sums.gates is not None:
        per_channel = sums.gates / sums.weight
        change = change * jnp.where(per_channel > 0, 1.0 / jnp.where(per_channel > 0, per_channel, 1.0), 0.0)
    moved = jnp.matmul(held_out.gram, change, precision=_EXACT)
    if held_out.gates is not None:
        moved = moved * (held_out.gates / held_out.weight)
    left = held_out.error - 2 * jnp.sum(held_out.cross * change) + jnp.sum(moved * change)
    return change, left
