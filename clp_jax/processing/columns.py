"""Columns of a data set, or some of their dimensions, as a robot's mapping names them: ``action[0:7]``."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from clp_jax.errors import InputError


class Part(NamedTuple):
    """Some dimensions of a column, or all of them.

    Attributes:
      key: of the column.
      start: the first dimension.
      stop: one past the last; None stands for the end of the column.
    """

    key: str
    start: int = 0
    stop: int | None = None

    @property
    def width(self) -> int | None:
        """How many dimensions these are; None up to the end of the column."""
        return None if self.stop is None else self.stop - self.start

    def width_in(self, widths: Mapping[str, int]) -> int | None:
        """How many dimensions these are where columns have these widths; None if nothing says it."""
        if self.stop is not None or self.key not in widths:
            return self.width
        return widths[self.key] - self.start

    def of(self, column: Shaped[np.ndarray, "*n d"]) -> Shaped[np.ndarray, "*n e"]:
        """These dimensions of the column.

        Raises:
          InputError: the column has fewer dimensions.
        """
        d = column.shape[-1]
        if d < (self.start + 1 if self.stop is None else self.stop):
            raise InputError(f"{self.key} has {d} dimensions, too few for {self}.")
        return column[..., self.start : self.stop]

    def __str__(self) -> str:
        if self == Part(self.key):
            return self.key
        return f"{self.key}[{self.start}]" if self.width == 1 else f"{self.key}[{self.start}:{self.stop or ''}]"


def part(text: str) -> Part:
    """The part of a column that a text names, counted from 0: ``key``, ``key[6]``, ``key[0:6]``, ``key[7:]``.

    Raises:
      InputError: brackets that hold something else, or choose nothing.

    >>> part("action"), part("action[6]"), part("action[:6]")
    (Part(key='action', start=0, stop=None), Part(key='action', start=6, stop=7), Part(key='action', start=0, stop=6))
    """
    key, bracket, inside = text.partition("[")
    chosen = re.fullmatch(r"(?:(\d+)|(\d*):(\d*))\]", inside)
    if not key or (bracket and chosen is None):
        raise InputError(f"{text!r} names no column; write key, key[6] or key[0:6] with dimensions from 0.")
    if chosen is None:
        return Part(key)
    one, start, stop = (int(number) if number else None for number in chosen.groups())
    found = Part(key, start or 0, stop) if one is None else Part(key, one, one + 1)
    if found.stop is not None and found.stop <= found.start:
        raise InputError(f"{text!r} chooses no dimension; the second number is one past the last.")
    return found


def keys(*texts: str) -> tuple[str, ...]:
    """The columns that parts are of, each once.

    >>> keys("action[0:7]", "gripper", "action[14]")
    ('action', 'gripper')
    """
    return tuple(dict.fromkeys(part(text).key for text in texts))


def join(texts: Sequence[str], columns: Mapping[str, Shaped[np.ndarray, "*n _"]]) -> Shaped[np.ndarray, "*n d"]:
    """Parts of columns side by side; without a part, zero dimensions of each row.

    Raises:
      InputError: a column has fewer dimensions than a part of it needs.
    """
    rows = next(iter(columns.values())).shape[:-1]
    none = np.empty((*rows, 0), np.float32)
    return np.concatenate([none, *(part(text).of(columns[part(text).key]) for text in texts)], axis=-1)
