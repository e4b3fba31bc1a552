"""Float64 NumPy references for the tests of CKA and of distances, straight from the definitions and nothing else.

HSIC_0 as in Kornblith et al. 2019 with an explicit H K H; HSIC_1 as in Song et al. 2012 with the diagonal of K and L
removed. Nothing here is fast and nothing is shared with clp_jax.
"""

import numpy as np


def hsic_biased(x, y):
    """tr(K H L H) / (n - 1)^2."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n
    return np.trace(x @ x.T @ h @ y @ y.T @ h) / (n - 1) ** 2


def hsic_debiased(x, y):
    """[tr(K' L') + 1'K'1 1'L'1 / ((n-1)(n-2)) - 2/(n-2) 1'K'L'1] / (n (n-3)), K' and L' without diagonals."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n, one = len(x), np.ones(len(x))
    # HSIC_1 does not change with the origin; near most of the rows float64 has more digits left.
    x, y = x - np.median(x, axis=0), y - np.median(y, axis=0)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0.0)
    np.fill_diagonal(m, 0.0)
    total = (
        np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    )
    return total / (n * (n - 3))


def matrix(states, function):
    """``function(x, y)`` for all pairs of layers of states [l, n, d]."""
    return np.array([[function(x, y) for y in states] for x in states])


def cka_matrix(states, *, debiased):
    """CKA of all pairs of layers of states [l, n, d]."""
    values = matrix(states, hsic_debiased if debiased else hsic_biased)
    return values / np.sqrt(np.outer(np.diagonal(values), np.diagonal(values)))


def rms_normalise(states):
    """Tokens of unit root mean square."""
    states = np.asarray(states, np.float64)
    return states / np.sqrt(np.mean(states**2, axis=-1, keepdims=True))


def pair_means(states):
    """Mean cosine, angle in half turns, relative squared residual and mean squared difference of [l, n, d]."""
    states = np.asarray(states, np.float64)

    def cosines(a, b):
        return np.clip((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1), -1, 1)

    def angles(a, b):
        u, v = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (a, b))
        return 2 * np.arctan2(np.linalg.norm(u - v, axis=-1), np.linalg.norm(u + v, axis=-1)) / np.pi

    pairs = {
        "cosine": cosines,
        "angle": angles,
        "residual": lambda a, b: ((b - a) ** 2).sum(-1) / (a**2).sum(-1),
        "squared": lambda a, b: ((b - a) ** 2).mean(-1),
    }
    return {name: matrix(states, lambda a, b, f=f: f(a, b).mean()) for name, f in pairs.items()}
