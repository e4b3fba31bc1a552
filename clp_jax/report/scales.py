"""Scales for numbers that matter close to 1: twins differ in how many nines their CKA has."""

import math

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

SMALLEST = 1e-6
"""Closer to 1 than this, float32 CKA is rounding."""


def distance(alike: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """1 - CKA or 1 - cosine, at least `SMALLEST` so that it has a logarithm; NaN stays.

    >>> distance(np.array([0.75, 1.0]))
    array([2.5e-01, 1.0e-06])
    """
    return np.maximum(1.0 - alike, SMALLEST)


def limits(values: Float[np.ndarray, "..."]) -> tuple[float, float]:
    """Smallest and largest finite number, apart by a factor of 2 at least; (0.01, 1) if there is none."""
    known = values[np.isfinite(values)]
    if not len(known):
        return 0.01, 1.0
    low, high = float(known.min()), float(known.max())
    return low, max(high, 2 * low)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high: powers of ten, and 2 and 5 times those if the range is short.

    >>> ticks(0.0009, 1.1), ticks(0.04, 0.3)
    ([0.001, 0.01, 0.1, 1.0], [0.05, 0.1, 0.2])
    """
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if high / low > 1000 else (1, 2, 5)
    return [float(f"{step}e{e}") for e in exponents for step in steps if low <= float(f"{step}e{e}") <= high]


def alike_label(distance: float) -> str:
    """What a distance means as CKA or cosine.

    >>> alike_label(0.001), alike_label(0.2)
    ('0.999', '0.8')
    """
    return f"{1 - distance:.6g}"


def logarithmic(axes: Axes, low: float, high: float, *, alike: bool, room_below: float = 0.08) -> None:
    """Makes the y axis logarithmic over this range.

    Args:
      axes: to change.
      low: smallest value to show, above 0.
      high: largest.
      alike: values are distances; put small ones on top and label them as what they mean, 0.9, 0.99, ...
      room_below: free share below the lowest curve.
    """
    span = high / low
    bottom, top = (high * span**room_below, low / span**0.08) if alike else (low / span**room_below, high * span**0.08)
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    at = ticks(low / span**0.05, high * span**0.05)
    axes.yaxis.set_major_locator(FixedLocator(at))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: alike_label(value) if alike else f"{value:g}")
