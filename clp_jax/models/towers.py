"""Towers, stacks of blocks that can be made shorter: what is known of them, their streams, and their leaves."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from jaxtyping import Bool, Float

from clp_jax.aliases import AnyArray, Array

Gates = dict[str, Float[AnyArray, "_depth _b"]]
"""Per tower and block 1 (keep) or 0 (remove), for each observation or, with a last axis of 1, for the whole batch.

A tower that is not named runs as it is; ``Gates()`` is the full model. A gate g replaces a block's output y by
``(1 - g) x + g y``: 0 removes the block exactly, and the derivative is the block's whole update.
"""

Capture = Literal[False, True, "writes"]
"""What a forward pass gives beside its output: nothing, the residual streams, or also what is written into them."""


class Write(NamedTuple):
    """One branch of all blocks of a tower, up to its last product with weights: the stream gets ``gate * (x W + b)``.

    Attributes:
      x: [depth, b, s, f].
      gate: [depth, b, 1, d]; None for 1.
    """

    x: Float[Array, "depth b s f"]
    gate: Float[Array, "depth b 1 d"] | None = None


class TowerStates(NamedTuple):
    """Residual streams of one tower for a batch.

    Attributes:
      states: [depth + 1, b, s, d]; index 0 is the tower's input, i the stream after block i - 1.
      valid: True where a token is real, False for padding and absent cameras [b, s].
      writes: by the names of ``WRITES`` what its blocks add to the stream; empty if it was not captured.
    """

    states: Float[Array, "l b s d"]
    valid: Bool[Array, "b s"]
    writes: Mapping[str, Write] = {}


class Tower(NamedTuple):
    """A stack of blocks that can be made shorter.

    Attributes:
      name: in plans, records and reports.
      depth: number of blocks.
      period: blocks alternate between so many kinds, which follow from their place: kept block j must be of the kind
        of place j, ``kept[j] % period == j % period``.
      protected: blocks that must stay.
      incomparable: states (0 is the input, i follows block i - 1) that say nothing about redundancy: nothing reads
        them, or they are of another scale than the others.
      optional: measured and cut only on request.
    """

    name: str
    depth: int
    period: int = 1
    protected: frozenset[int] = frozenset()
    incomparable: tuple[int, ...] = ()
    optional: bool = False


class OfTowers:
    """What follows from the towers and the groups of an architecture, for the dataclass of every family."""

    towers: Any
    groups: Any

    @property
    def depths(self) -> dict[str, int]:
        """Blocks per tower, in data-flow order."""
        return {tower.name: tower.depth for tower in self.towers}

    @property
    def coupled(self) -> tuple[tuple[str, ...], ...]:
        """The groups of several towers, which must keep the same blocks."""
        return tuple(group for group in self.groups if len(group) > 1)


@dataclasses.dataclass(frozen=True)
class Shape(OfTowers):
    """What a plan must fit: as much of an architecture as the names of tensors tell, without a model.

    Attributes:
      kind: of the model.
      towers: in data-flow order.
      groups: names of the towers that keep the same blocks, the most important group first.
    """

    kind: str
    towers: tuple[Tower, ...]
    groups: tuple[tuple[str, ...], ...]


class Stack(NamedTuple):
    """Leaves of a parameter tree whose axis 0 counts blocks of a tower.

    Attributes:
      pattern: regular expression over the whole path of a leaf.
      tower: whose blocks.
      first: the block in row 0.
      step: from one row's block to the next: 2 where two kinds of blocks alternate, each in leaves of its own.
    """

    pattern: str
    tower: str
    first: int = 0
    step: int = 1

    def blocks(self, rows: int) -> range:
        """The block in each row.

        >>> list(Stack("layers/odd/.*", "vlm", first=1, step=2).blocks(3))
        [1, 3, 5]
        """
        return range(self.first, self.first + self.step * rows, self.step)


class Projection(NamedTuple):
    """The last weights of a branch of a tower's blocks, through which it adds to the residual stream.

    Attributes:
      tower: whose blocks.
      branch: name of the branch in `TowerStates.writes`; in a block they run in the order of ``WRITES``.
      kernel: regular expression over the whole path of the leaves: blocks on axis 0, the stream's channels on the last.
        The bias of a ``.../kernel`` is the leaf ``.../bias`` beside it, if there is one.
    """

    tower: str
    branch: str
    kernel: str
