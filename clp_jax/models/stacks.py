"""Which leaves of a parameter tree belong to the blocks of which tower, and which of them write into its stream."""

import re
from collections.abc import Iterable, Sequence

from clp_jax.models.family import Architecture
from clp_jax.models.towers import Projection, Stack, Tower


def stack_of(stacks: Sequence[Stack], path: str) -> Stack | None:
    """The stack that a leaf belongs to, or None for a leaf without a layer axis; the first match wins."""
    return next((stack for stack in stacks if re.fullmatch(stack.pattern, path)), None)


def blocks_of(stacks: Sequence[Stack], path: str, rows: int) -> range | None:
    """The block in each row of a leaf; None for a leaf without a layer axis."""
    stack = stack_of(stacks, path)
    return None if stack is None else stack.blocks(rows)


def rows_kept(blocks: range, keep: Sequence[int]) -> tuple[int, ...]:
    """The rows of a leaf that hold kept blocks.

    >>> rows_kept(range(1, 8, 2), (0, 3, 4, 7))
    (1, 3)
    """
    kept = set(keep)
    return tuple(row for row, block in enumerate(blocks) if block in kept)


def towers_measured(architecture: Architecture, *, optional: bool = False) -> tuple[Tower, ...]:
    """The towers that an analysis measures, those that are measured on request alone included or not."""
    return tuple(tower for tower in architecture.towers if optional or not tower.optional)


def kernels_of(writes: Sequence[Projection], paths: Iterable[str], tower: str, branch: str) -> list[str]:
    """The last weights of a branch of a tower's blocks: one leaf, or one for each kind of block.

    >>> writes = [Projection("dit", "mlp", "dit/(cross|self)/ff/down/kernel")]
    >>> kernels_of(writes, ["dit/cross/ff/down/kernel", "dit/cross/ff/up/kernel"], "dit", "mlp")
    ['dit/cross/ff/down/kernel']
    """
    (write,) = (write for write in writes if (write.tower, write.branch) == (tower, branch))
    return [path for path in paths if re.fullmatch(write.kernel, path)]


def bias_of(kernel: str, paths: Iterable[str]) -> str | None:
    """The bias beside a kernel, if there is one."""
    bias = re.sub(r"/kernel$", "/bias", kernel)
    return bias if bias != kernel and bias in paths else None
