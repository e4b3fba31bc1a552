"""Episodes that people keep or leave out by number: ``0:100,120`` or ``!17,23``."""

import re
from collections.abc import Collection

from clp_jax.errors import InputError


def chosen(text: str, numbers: Collection[int]) -> frozenset[int]:
    """The episodes that stay.

    Args:
      text: numbers and ranges whose second number is one past the last, with commas between; with ``!`` in front those
        that go. Either end of a range may be left away.
      numbers: of all episodes.

    Raises:
      InputError: it is written otherwise, names an episode that there is not, or nothing stays.

    >>> sorted(chosen("1:3,7", range(9))), sorted(chosen("!2:", range(9)))
    ([1, 2, 7], [0, 1])
    """
    named: set[int] = set()
    for word in text.removeprefix("!").split(","):
        match = re.fullmatch(r"\s*(?:(\d+)|(\d*):(\d*))\s*", word)
        if match is None:
            raise InputError(
                f"--episodes {text!r} cannot be read; write numbers and ranges as 0:100,120 (the second number is one "
                "past the last), or '!17,23' to leave some out."
            )
        one, start, stop = (int(number) if number else None for number in match.groups())
        span = range(start or 0, max(numbers) + 1 if stop is None else stop) if one is None else range(one, one + 1)
        found = {number for number in numbers if number in span}
        if not found:
            raise InputError(
                f"--episodes {text!r}: there is no episode {word.strip()}; there are {len(numbers)}, {min(numbers)} to "
                f"{max(numbers)}."
            )
        named |= found
    stay = frozenset(numbers) - named if text.startswith("!") else frozenset(named)
    if not stay:
        raise InputError(f"--episodes {text!r} leaves no episode.")
    return stay
