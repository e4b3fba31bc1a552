"""How sure a success rate is, and the difference of two."""

import math
import statistics
from typing import NamedTuple

from clp_jax.errors import InputError

_TINY = 1e-9


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


def paired_difference(only_first: int, only_second: int, pairs: int, *, confidence: float = 0.95) -> Interval:
    """Tango's score interval of the difference of two success rates over the same episodes, first minus second.

    Unlike the interval of a bootstrap it has a width where both policies solve the same episodes.

    Args:
      only_first: episodes that the first alone solved.
      only_second: episodes that the second alone solved.
      pairs: episodes that both played, at least one.
      confidence: in (0, 1).

    Raises:
      InputError: counts or a confidence that cannot be.

    Source: T. Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
      design, Statistics in Medicine 17 (1998).

    >>> [round(x, 3) for x in paired_difference(5, 1, 20)]
    [0.2, -0.049, 0.437]
    """
    possible = min(only_first, only_second) >= 0 and max(1, only_first + only_second) <= pairs
    if not possible or not 0 < confidence < 1:
        raise InputError(f"{only_first} and {only_second} of {pairs} pairs at confidence {confidence} cannot be.")
    from scipy.optimize import brentq

    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    difference = (only_first - only_second) / pairs

    def beyond(limit: float, sign: int) -> float:
        """Above zero where the score test rejects this difference."""
        b = (2 * pairs - only_first + only_second) * limit - only_first - only_second
        c = -only_second * limit * (1 - limit)
        second = (math.sqrt(max(b * b - 8 * pairs * c, 0.0)) - b) / (4 * pairs)  # the likeliest rate of only_second
        variance = pairs * (2 * second + limit * (1 - limit))
        return sign * (pairs * limit - only_first + only_second) - z * math.sqrt(max(variance, 0.0))

    # Where no pair differs the score test has no variance at the difference itself.
    low = -1.0 if only_second == pairs else brentq(beyond, -1.0, difference - _TINY, args=(-1,))
    high = 1.0 if only_first == pairs else brentq(beyond, difference + _TINY, 1.0, args=(1,))
    return Interval(difference, low, high)


def sign_test(only_first: int, only_second: int) -> float:
    """McNemar's exact test: how likely episodes so unevenly divided are, if both policies are equally good.

    >>> sign_test(5, 1), sign_test(0, 0)
    (0.21875, 1.0)
    """
    from scipy.stats import binomtest

    together = only_first + only_second
    return 1.0 if together == 0 else float(binomtest(only_first, together).pvalue)
