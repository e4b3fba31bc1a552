"""Numbers that a user gives, in a flag or in a configuration file, and the limits within which they make sense."""

import dataclasses
import math
from typing import Any

from clp_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Limits:
    """Finite numbers from the least (itself excluded if ``above``) to the most, or below another.

    Attributes:
      least: smallest number, or what all must be above.
      below: what all must be below.
      above: whether the least is excluded.
      most: largest number.
      whole: only whole numbers, written as such.

    >>> str(Limits(1, most=16384, whole=True)), Limits(0, 1).holds(float("nan"))
    ('a whole number of at least 1 and at most 16384', False)
    """

    least: int | float
    below: int | float = math.inf
    above: bool = False
    most: int | float = math.inf
    whole: bool = False

    def holds(self, value: int | float) -> bool:
        """Whether a number lies within."""
        enough = value > self.least if self.above else value >= self.least
        return enough and value < self.below and value <= self.most  # NaN is nowhere

    def check(self, value: Any, what: str) -> None:
        """Raise unless a value of a configuration file is such a number.

        Args:
          value: as JSON has it; true and false are no numbers.
          what: the file and the key.

        Raises:
          InputError: names the value and the limits.
        """
        kinds = int if self.whole else int | float
        if isinstance(value, bool) or not isinstance(value, kinds) or not self.holds(value):
            raise InputError(f"{what} = {value!r}; give {self}.")

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        least = f"{kind} above {self.least}" if self.above else f"at least {self.least}"
        if self.whole and not self.above:
            least = f"{kind} of {least}"
        least = "a finite number" if math.isinf(self.least) else least
        limits = {"below": self.below, "at most": self.most}
        return " and ".join([least, *(f"{word} {limit}" for word, limit in limits.items() if math.isfinite(limit))])


def check_flag(value: Any, what: str) -> None:
    """Raise unless a value of a configuration file is true or false.

    Raises:
      InputError: it is something else, such as a word.
    """
    if not isinstance(value, bool):
        raise InputError(f"{what} = {value!r}; give true or false.")
