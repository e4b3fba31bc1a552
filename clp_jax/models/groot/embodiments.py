"""Embodiments: robots by the tags that upstream gives them, and the weights of their own that they have."""

from clp_jax.errors import InputError

TAGS = {"new_embodiment": 31, "oxe_droid": 17, "agibot_genie1": 26, "gr1": 24, "so100": 2, "unitree_g1": 3}
"""Number of the weights by tag: NVIDIA's release n1.5, and lerobot's so100 and unitree_g1."""


def number_of(embodiment: str | None, count: int) -> int:
    """Which of its robots' weights a model uses.

    Args:
      embodiment: a tag, or the number itself as text.
      count: robots that the model has weights for.

    Raises:
      InputError: it is not said, unknown, or beyond the model's robots.

    >>> number_of("gr1", 32), number_of("7", 32)
    (24, 7)
    """
    choice = f"one of {', '.join(TAGS)}, or a number from 0 to {count - 1}"
    if embodiment is None:
        raise InputError(f"nothing says which of the model's embodiments the robot is; give --embodiment {choice}.")
    number = int(embodiment) if embodiment.isdecimal() else TAGS.get(embodiment)
    if number is None:
        raise InputError(f"there is no embodiment {embodiment!r}; give --embodiment {choice}.")
    if number >= count:
        raise InputError(
            f"embodiment {embodiment!r} has number {number}, the model has weights for {count}; give --embodiment "
            f"{choice}."
        )
    return number
