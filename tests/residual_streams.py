"""Made-up states of residual streams, for the tests of what is measured on states."""

import jax
import jax.numpy as jnp
import numpy as np


def walk(layers, n, d, *, seed=0, step=0.5, mean=0.0):
    """States of a residual stream: each layer adds a little to a layer before it; float32 [l, n, d]."""
    rng = np.random.default_rng(seed)
    start, steps = rng.standard_normal((1, n, d)), step * rng.standard_normal((layers - 1, n, d))
    states = np.cumsum(np.concatenate([start, steps]), axis=0) + mean * rng.standard_normal((layers, 1, d))
    return jnp.asarray(states, jnp.float32)


def everything(n):
    return jnp.ones(n, bool)


def some(n, share, seed):
    return jnp.asarray(np.random.default_rng(seed).random(n) < share)


def rotation(d):
    return jnp.linalg.qr(jax.random.normal(jax.random.key(2), (d, d)))[0]
