"""How leaves of a parameter tree and the tensors of a PyTorch file become each other, bit for bit.

A JAX parameter stacks its layers on axis 0; PyTorch has one tensor a layer, linear maps as (out, in), and gate and up
projections, keys and values apart. A family lists one `Rule` per leaf; every rule can be undone, so what was written is
compared with its source bit for bit. Axes: D width, N heads, K key/value heads, H head dim, F hidden channels.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from clp_jax.aliases import Leaf

Blocks = Callable[[str, int], range | None]
"""Path of a leaf and its rows to the block in each row; None for a leaf without a layer axis."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the array of one layer becomes PyTorch's tensors, and back.

    Attributes:
      names: of the tensors, "{i}" is the block.
      split: array to as many tensors.
      join: tensors and the array's shape to the array.
    """

    names: tuple[str, ...]
    split: Callable[[Leaf], tuple[Leaf, ...]]
    join: Callable[[list[np.ndarray], tuple[int, ...]], np.ndarray]


Layout = Mapping[str, Rule]
"""The rule of every leaf, by its path."""


def copy(name: str) -> Rule:
    """The same values; axes of length one or heads may be folded."""
    return Rule((name,), lambda x: (x,), lambda parts, _: parts[0])


def flat(name: str) -> Rule:
    """(N, H) to (N H)."""
    return Rule((name,), lambda x: (x.reshape(-1),), lambda parts, shape: parts[0].reshape(shape))


def drop_first(name: str) -> Rule:
    """(1, T, D) to (T, D)."""
    return Rule((name,), lambda x: (x[0],), lambda parts, _: parts[0][None])


def convolution(name: str) -> Rule:
    """(height, width, in, out) to (out, in, height, width)."""
    return Rule((name,), lambda x: (x.transpose(3, 2, 0, 1),), lambda parts, _: parts[0].transpose(2, 3, 1, 0))


def linear(name: str) -> Rule:
    """(in, out) to (out, in)."""
    return Rule((name,), lambda x: (x.T,), lambda parts, _: parts[0].T)


def to_heads(name: str) -> Rule:
    """(D, N, H) to (N H, D)."""
    return Rule((name,), lambda x: (x.reshape(x.shape[0], -1).T,), lambda parts, shape: parts[0].T.reshape(shape))


def from_heads(name: str) -> Rule:
    """(N, H, D) to (D, N H)."""
    return Rule((name,), lambda x: (x.reshape(-1, x.shape[2]).T,), lambda parts, shape: parts[0].T.reshape(shape))


def projection(name: str) -> Rule:
    """(N, D, H) to (N H, D)."""
    return Rule((name,), lambda x: (_per_head(x),), lambda parts, shape: _undo_per_head(parts[0], shape))


def projections(*names: str) -> Rule:
    """(2 or 3, K, D, H) to as many (K H, D)."""
    return Rule(
        names,
        lambda x: tuple(_per_head(x[i]) for i in range(len(names))),
        lambda parts, shape: np.stack([_undo_per_head(part, shape[1:]) for part in parts]),
    )


def gating(gate: str, up: str) -> Rule:
    """(2, D, F) to two (F, D)."""
    return Rule((gate, up), lambda x: (x[0].T, x[1].T), lambda parts, _: np.stack([part.T for part in parts]))


def _per_head(x: Leaf) -> Leaf:
    return x.transpose(0, 2, 1).reshape(-1, x.shape[1])


def _undo_per_head(part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    heads, width, head_dim = shape
    return part.reshape(heads, head_dim, width).transpose(0, 2, 1)


def tensors_of(
    leaves: Mapping[str, jax.ShapeDtypeStruct], layout: Layout, blocks: Blocks
) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and dtypes of a PyTorch file, in the order in which `to_tensors` gives the tensors.

    Args:
      leaves: of the JAX model, by path.
      layout: rule per leaf.
      blocks: which leaves are stacked.
    """
    tensors = {}
    for path, leaf in leaves.items():
        rule, numbers = layout[path], blocks(path, leaf.shape[0] if leaf.shape else 0)
        part = leaf if numbers is None else jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        shapes = jax.eval_shape(rule.split, part)
        for i in [0] if numbers is None else numbers:
            tensors |= {name.format(i=i): shape for name, shape in zip(rule.names, shapes, strict=True)}
    return tensors


def to_tensors(
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    layout: Layout,
    blocks: Blocks,
    parts: Callable[[str], Iterator[np.ndarray]],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and tensors, block by block.

    Args:
      leaves: of the JAX model, by path.
      layout: rule per leaf.
      blocks: which leaves are stacked.
      parts: gives the rows of a stacked leaf, or the one array of any other.
    """
    for path, leaf in leaves.items():
        rule, numbers = layout[path], blocks(path, leaf.shape[0] if leaf.shape else 0)
        for i, part in zip([0] if numbers is None else numbers, parts(path), strict=True):
            for name, tensor in zip(rule.names, rule.split(part), strict=True):
                yield name.format(i=i), tensor


def from_tensors(
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    layout: Layout,
    blocks: Blocks,
    tensors: Mapping[str, np.ndarray],
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yields path, row and array of the JAX model, made from the tensors of a PyTorch file.

    Args:
      leaves: of the JAX model, by path.
      layout: rule per leaf.
      blocks: which leaves are stacked.
      tensors: of the file, by name.
    """
    for path, leaf in leaves.items():
        rule, numbers = layout[path], blocks(path, leaf.shape[0] if leaf.shape else 0)
        for row, i in enumerate([0] if numbers is None else numbers):
            tensors_of_row = [tensors[name.format(i=i)] for name in rule.names]
            yield path, row, rule.join(tensors_of_row, leaf.shape if numbers is None else leaf.shape[1:])
