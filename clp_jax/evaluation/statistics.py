"""How sure a success rate is."""

import math
import statistics
from typing import NamedTuple

from clp_jax.errors import InputError


class Interval(NamedTuple):
    """A share with the limits of its confidence interval."""

    rate: float
    low: float
    high: float


def wilson(successes: int, episodes: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a success rate, which is right for few episodes and at 0 and 1 too.

    Args:
      successes: how many of them.
      episodes: at least one.
      confidence: in (0, 1).

    Raises:
      InputError: counts or a confidence that cannot be.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).

    >>> [round(x, 3) for x in wilson(20, 20)]
    [1.0, 0.839, 1.0]
    """
    if not 0 <= successes <= episodes or episodes < 1 or not 0 < confidence < 1:
        raise InputError(f"{successes} successes in {episodes} episodes at confidence {confidence} cannot be.")
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    rate, weight = successes / episodes, z * z / episodes
    centre = (rate + weight / 2) / (1 + weight)
    reach = z / (1 + weight) * math.sqrt(rate * (1 - rate) / episodes + weight / (4 * episodes))
    # At 0 and 1 the limit is the rate itself, which rounding would miss.
    low = 0.0 if successes == 0 else centre - reach
    high = 1.0 if successes == episodes else centre + reach
    return Interval(rate, low, high)
