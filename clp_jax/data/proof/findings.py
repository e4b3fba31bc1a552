"""What a proof finds."""

import dataclasses
from collections.abc import Iterable

import numpy as np

_LISTED = 20
"""Findings of one kind that are listed; of the others only the number is told."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One sentence about a data set; ``fatal`` if it has to be repaired before anything is trained on the data."""

    text: str
    fatal: bool = True


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at, or was to be.

    Attributes:
      name: what it was.
      amount: how much of it.
      findings: what was found.
      digest: identity of what was read, for cameras.
      sizes: heights and widths of a camera's pictures, as far as they were looked at.
      unmade: why it was not looked at; None if it was.
    """

    name: str
    amount: str
    findings: tuple[Finding, ...] = ()
    digest: str | None = None
    sizes: frozenset[tuple[int, int]] = frozenset()
    unmade: str | None = None


def limited(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The first findings, and how many more there are."""
    listed = tuple(findings)
    if len(listed) <= _LISTED:
        return listed
    rest = listed[_LISTED:]
    return (*listed[:_LISTED], Finding(f"and {len(rest)} more of this kind.", any(f.fatal for f in rest)))


def first_of_each(groups: np.ndarray, members: np.ndarray) -> list[tuple[int, int, int]]:
    """Per group that has members: the group, its first member, and how many it has.

    Args:
      groups: group of each item, ascending [n].
      members: ascending indices of items [m].

    >>> first_of_each(np.array([0, 0, 1, 1, 1]), np.array([2, 4]))
    [(1, 2, 2)]
    """
    own, firsts, counts = np.unique(groups[members], return_index=True, return_counts=True)
    return list(zip(own.tolist(), members[firsts].tolist(), counts.tolist(), strict=True))
