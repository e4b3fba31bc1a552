"""How two checkpoints differ: names, shapes and dtypes, and value by value with only a few arrays in memory."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from clp_jax.checkpoint import CheckpointSpec, FolderSpec, Spec, fingerprint, stored_shapes
from clp_jax.checkpoint.beside import differences_beside, digests_beside
from clp_jax.checkpoint.orbax.params import LeafReader
from clp_jax.checkpoint.safetensors.leaves import TensorLeaves
from clp_jax.history import blocks_of_source
from clp_jax.loading import read_architecture, stored_tree
from clp_jax.models import blocks_of, family_of_tree, rows_kept, stack_of
from clp_jax.models.stored import numbered
from clp_jax.trees import difference, flatten

_BYTES_AT_ONCE = 2**26

Keep = Mapping[str, Sequence[int]]
"""Per tower that was cut the blocks of the larger checkpoint that the smaller one has."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """One of two checkpoints was made of the other, as its ``clp.json`` says.

    Attributes:
      other_is_source: whether this one was made of the other, or the other of this one.
      blocks: per tower that was cut the source's blocks, in order.
      healed: whether blocks that stayed were refitted.
      trained: whether it was trained since.
    """

    other_is_source: bool
    blocks: dict[str, tuple[int, ...]]
    healed: bool
    trained: bool


@dataclasses.dataclass(frozen=True)
class Values:
    """Two checkpoints compared bit by bit.

    Attributes:
      compared: arrays that both have; of a cut only the kept blocks' rows.
      different: names of those that differ in shape, dtype or any bit.
      only_here: names that only the first checkpoint has.
      only_there: names that only the second has, blocks left out by a cut not counted.
      block_faults: per tower the kept blocks (by their number in the cut) that differ from their source block.
    """

    compared: int
    different: tuple[str, ...]
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]
    block_faults: dict[str, tuple[int, ...]]

    @property
    def equal(self) -> bool:
        """Whether no bit differs."""
        return not (self.different or self.only_here or self.only_there)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How two checkpoints differ.

    Attributes:
      other: path of the second.
      names: whose names are compared: "stored", or "model" where the two are stored in different forms.
      differences: a line for every name on which they differ: expected is the other's, got is this one's.
      beside: how the statistics, tokenizers and configurations beside the arrays differ, by file
        (`checkpoint.beside`); None where the two are stored in different forms.
      same_content: whether their fingerprints are equal.
      cut: if one was made of the other.
      values: if they were compared.
    """

    other: str
    names: str
    differences: tuple[str, ...]
    beside: dict[str, str] | None
    same_content: bool
    cut: Cut | None
    values: Values | None

    @property
    def same_structure(self) -> bool:
        """Whether all names, shapes and dtypes are equal."""
        return not self.differences

    @property
    def same(self) -> bool:
        """Whether the structure and the files beside it are equal, and the values if they were compared."""
        return self.same_structure and not self.beside and (self.values is None or self.values.equal)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self) | {"same_structure": self.same_structure}))


def compare(
    this: Spec, other: Spec, *, values: bool = False, vlm_config: str | os.PathLike[str] | None = None
) -> Comparison:
    """Say how two checkpoints differ.

    Args:
      this: a checkpoint.
      other: what it is compared with.
      values: also compare every bit; in memory are at most two arrays without a layer axis, or two blocks' rows.
      vlm_config: as of `loading.load_model`, needed only where the two are stored in different forms.

    Raises:
      InputError: one cannot be read, or they are of different families or stored in different forms and the model
        that would make them comparable is not known.
    """
    alike = isinstance(this, FolderSpec) == isinstance(other, FolderSpec)
    if alike:
        trees = [stored_shapes(spec) if isinstance(spec, FolderSpec) else spec.tree for spec in (this, other)]
    else:
        trees = [_model_tree(spec, vlm_config) for spec in (this, other)]
    lines = difference(trees[1], trees[0], dtypes=True)
    prints = fingerprint(this), fingerprint(other)
    cut = _cut(this, other, *prints)
    found = None
    if values:
        if alike and isinstance(this, FolderSpec) and isinstance(other, FolderSpec):
            found = _folder_values(this, other, cut)
        else:
            found = _leaf_values(this, other, flatten(trees[0]), flatten(trees[1]), cut, vlm_config)
    return Comparison(
        other=str(other.path),
        names="stored" if alike else "model",
        differences=tuple(lines),
        beside=differences_beside(*map(digests_beside, (this, other))) if alike else None,
        same_content=prints[0] == prints[1],
        cut=cut,
        values=found,
    )


def _model_tree(spec: Spec, vlm_config: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Shapes and dtypes in our tree."""
    if isinstance(spec, CheckpointSpec):
        return spec.tree
    return stored_tree(spec, read_architecture(spec, vlm_config=vlm_config))


def _cut(this: Spec, other: Spec, here: str, there: str) -> Cut | None:
    for spec, source, is_other in ((this, there, True), (other, here, False)):
        if here != there and (found := blocks_of_source(spec, source)) is not None:
            return Cut(is_other, *found)
    return None


class _Found:
    """Collects what differs."""

    def __init__(self) -> None:
        self.compared = 0
        self.different: dict[str, None] = {}
        self.faults: dict[str, dict[int, None]] = {}

    def add(self, name: str, tower: str | None, block: int | None, *, equal: bool) -> None:
        """Counts one comparison of a name, or of one of its blocks."""
        if not equal:
            self.different[name] = None
            if tower is not None and block is not None:
                self.faults.setdefault(tower, {})[block] = None

    def values(self, here: set[str], there: set[str]) -> Values:
        """The result, given the names that have no counterpart."""
        faults = {tower: tuple(sorted(blocks)) for tower, blocks in self.faults.items()}
        return Values(self.compared, tuple(self.different), tuple(sorted(here)), tuple(sorted(there)), faults)


def _folder_values(this: FolderSpec, other: FolderSpec, cut: Cut | None) -> Values:
    """Compares two folders tensor by tensor; of a cut each tensor with that of its source block."""
    small, large = (this, other) if cut is None or cut.other_is_source else (other, this)
    keep: Keep = {} if cut is None else cut.blocks
    found, used = _Found(), set()
    alone = set()
    for name, tensor in small.tensors.items():
        block = small.block_of(name)
        tower, number, template = (None, None, name) if block is None else block
        partner = name if tower not in keep or number is None else numbered(template, keep[tower][number])
        if partner not in large.tensors:
            alone.add(name)
            continue
        used.add(partner)
        found.compared += 1
        twin = large.tensors[partner]
        equal = (tensor.dtype, tensor.shape) == (twin.dtype, twin.shape)
        equal = equal and _equal(_bytes_of(small, name), _bytes_of(large, partner))
        found.add(name, tower, number, equal=equal)
    left = {name for name in large.tensors.keys() - used if not _is_removed(large.block_of(name), keep)}
    return found.values(*((alone, left) if small is this else (left, alone)))


def _is_removed(block: tuple[str, int, str] | None, keep: Keep) -> bool:
    return block is not None and block[0] in keep and block[1] not in keep[block[0]]


def _bytes_of(spec: FolderSpec, name: str) -> np.ndarray:
    """The bytes of a tensor, mapped and not read."""
    tensor = spec.tensors[name]
    shard = spec.shards[tensor.file]
    if tensor.size == 0:
        return np.empty(0, np.uint8)
    return np.memmap(shard.path, np.uint8, "r", offset=shard.data + tensor.begin, shape=(tensor.size,))


class _Leaves:
    """The leaves of either form, one at a time.

    Args:
      spec: the checkpoint.
      vlm_config: for a folder.
    """

    def __init__(self, spec: Spec, vlm_config: str | os.PathLike[str] | None):
        if isinstance(spec, FolderSpec):
            tensors = TensorLeaves(spec, read_architecture(spec, vlm_config=vlm_config))
            self.whole, self.rows = tensors.whole, tensors.rows
        else:
            reader = LeafReader(spec)
            self.whole, self.rows = reader.whole, reader.layers


def _leaf_values(
    this: Spec,
    other: Spec,
    here: Mapping[str, jax.ShapeDtypeStruct],
    there: Mapping[str, jax.ShapeDtypeStruct],
    cut: Cut | None,
    vlm_config: str | os.PathLike[str] | None,
) -> Values:
    """Compares leaf by leaf, stacked ones row by row; of a cut each row with that of its source block."""
    read = functools.partial(_Leaves, vlm_config=vlm_config)
    sides = [(read(this), here), (read(other), there)]
    (small, shapes), (large, larger) = sides if cut is None or cut.other_is_source else reversed(sides)
    stacks = family_of_tree(this.tree if isinstance(this, CheckpointSpec) else _tree_of(other)).STACKS
    keep: Keep = {} if cut is None else cut.blocks
    found = _Found()
    for path in (path for path in shapes if path in larger):
        found.compared += 1
        a, b = shapes[path], larger[path]
        stack = stack_of(stacks, path)
        if a.dtype != b.dtype or a.shape[bool(stack) :] != b.shape[bool(stack) :]:
            found.add(path, None, None, equal=False)
        elif stack is None:
            found.add(path, None, None, equal=_equal(small.whole(path), large.whole(path)))
        else:
            blocks = stack.blocks(b.shape[0])
            chosen = rows_kept(blocks, keep[stack.tower]) if stack.tower in keep else tuple(range(b.shape[0]))
            if len(chosen) != a.shape[0]:
                found.add(path, None, None, equal=False)
                continue
            numbers = blocks_of(stacks, path, a.shape[0]) or range(0)
            pairs = zip(numbers, small.rows(path), _chosen(large.rows(path), chosen), strict=True)
            for number, row, twin in pairs:
                found.add(path, stack.tower, number, equal=_equal(row, twin))
    return found.values(here.keys() - there.keys(), there.keys() - here.keys())


def _tree_of(spec: Spec) -> dict[str, Any]:
    assert isinstance(spec, CheckpointSpec), "two folders are compared by their tensors"
    return spec.tree


def _chosen(rows: Iterator[np.ndarray], chosen: Sequence[int]) -> Iterator[np.ndarray]:
    wanted = set(chosen)
    return (row for number, row in enumerate(rows) if number in wanted)


def _equal(a: Shaped[np.ndarray, "*shape"], b: Shaped[np.ndarray, "*shape"]) -> bool:
    """Whether all bits are equal, NaN included."""
    first, second = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    starts = range(0, len(first), _BYTES_AT_ONCE)
    return len(first) == len(second) and all(
        np.array_equal(first[start : start + _BYTES_AT_ONCE], second[start : start + _BYTES_AT_ONCE])
        for start in starts
    )
