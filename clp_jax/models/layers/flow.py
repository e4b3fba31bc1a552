"""What flow-matching models share: times and their embedding."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from clp_jax.aliases import AnyArray, Array

_MIN_PERIOD, _MAX_PERIOD = 4e-3, 4.0


def time_embedding(time: Float[AnyArray, " b"], width: int) -> Float[Array, "b d"]:
    """Sine, then cosine of the time at ``width / 2`` periods from 4e-3 to 4, in float32."""
    fraction = jnp.linspace(0.0, 1.0, width // 2)
    period = _MIN_PERIOD * (_MAX_PERIOD / _MIN_PERIOD) ** fraction
    angle = time[:, None] * (1.0 / period * 2 * jnp.pi)[None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def noisy_actions(
    actions: Float[AnyArray, "b horizon adim"],
    noise: Float[AnyArray, "b *k horizon adim"],
    time: Float[AnyArray, "b *k"],
) -> Float[Array, "b *k horizon adim"]:
    """x_t where time runs from 1 (noise) to 0 (action); noise and times may have an axis of draws behind the batch."""
    t = jnp.asarray(time)[..., None, None]
    return t * noise + (1 - t) * per_draw(actions, time)


def velocity_at(
    actions: Float[AnyArray, "b horizon adim"],
    noise: Float[AnyArray, "b *k horizon adim"],
    time: Float[AnyArray, "b *k"],
) -> Float[AnyArray, "b *k horizon adim"]:
    """The derivative of `noisy_actions` by time, which a model learns: noise - actions."""
    return noise - per_draw(actions, time)


def per_draw(
    actions: Float[AnyArray, "b horizon adim"], time: Float[AnyArray, "b *k"]
) -> Float[AnyArray, "b *_k horizon adim"]:
    """Actions with an axis of length one for every axis of draws that the times have."""
    return actions.reshape(actions.shape[0], *(1 for _ in time.shape[1:]), *actions.shape[1:])


def spread(count: int) -> Float[np.ndarray, " count"]:
    """Points in [0, 1), of which any stretch covers the interval evenly: a golden-ratio sequence.

    >>> spread(3).round(3).tolist()
    [0.5, 0.118, 0.736]
    """
    return (0.5 + (np.sqrt(5.0) - 1.0) / 2.0 * np.arange(count)) % 1.0


def fixed_noise(shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Normal noise, the same for the same shape, so that runs compare."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
