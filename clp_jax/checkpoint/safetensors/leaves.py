"""The tensors of a folder of safetensors files as the leaves of a model's parameter tree."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from clp_jax.checkpoint.manifest import check_part, checksum, listed_arrays
from clp_jax.checkpoint.safetensors.copying import SPAN_BYTES
from clp_jax.checkpoint.safetensors.folder import FolderSpec
from clp_jax.checkpoint.safetensors.tensorfile import read_tensors
from clp_jax.checkpoint.threads import run_in_threads
from clp_jax.errors import InputError
from clp_jax.models import Architecture, abstract_params, blocks_of, family_of
from clp_jax.models.layers.torch_rules import from_tensors, tensors_of, to_tensors
from clp_jax.progress import in_megabytes, stage
from clp_jax.trees import difference, flatten, unflatten


class TensorLeaves:
    """The leaves of a model, made from tensors when they are asked for; the files are mapped, not read.

    Args:
      spec: the folder.
      architecture: of its model.

    Raises:
      InputError: some tensor is missing, unknown, or of another shape; all are listed.
    """

    def __init__(self, spec: FolderSpec, architecture: Architecture):
        family = family_of(architecture)
        tensors: dict[str, np.ndarray] = {}
        for shard in spec.shards.values():
            tensors |= read_tensors(shard.path)
        leaves = flatten(abstract_params(architecture))
        self._layout = family.stored_layout(leaves, tensors)
        self._blocks = functools.partial(blocks_of, family.STACKS)
        self._tensors, self._leaves, self._listed = tensors, leaves, listed_arrays(spec.folder) or {}
        wanted = tensors_of(leaves, self._layout, self._blocks)
        lines = difference(wanted, tensors)
        if lines:
            count = f"{len(lines)} tensors differ" if len(lines) > 1 else "1 tensor differs"
            listed = "\n  ".join(lines)
            raise InputError(f"{spec.path} and a {architecture.kind} model do not fit, {count}:\n  {listed}")

    @property
    def tree(self) -> dict[str, Any]:
        """Shapes and stored dtypes.

        Raises:
          InputError: blocks of one tower are stored in different dtypes.
        """
        return unflatten(
            {path: jax.ShapeDtypeStruct(leaf.shape, self._dtype(path)) for path, leaf in self._leaves.items()}
        )

    def whole(self, path: str) -> np.ndarray:
        """One leaf, its rows stacked."""
        leaf = self._leaves[path]
        values = np.empty(leaf.shape, self._dtype(path))
        stacked = self._blocks(path, 1) is not None
        for row, part in enumerate(self.rows(path)):
            values[row if stacked else ...] = part
        return values

    def rows(self, path: str) -> Iterator[np.ndarray]:
        """The rows of a stacked leaf one after another, or the one array of any other."""
        found = from_tensors({path: self._leaves[path]}, self._layout, self._blocks, self._tensors)
        return (part for _, _, part in found)

    def read(self, shardings: Mapping[str, Any]) -> dict[str, Any]:
        """All leaves as a tree.

        Args:
          shardings: per path where the leaf goes; None returns it on the host. What another host holds is not made.

        Raises:
          InputError: a tensor is not what the manifest says.
        """
        values: dict[str, Any] = {}

        def read(path: str) -> Iterator[int]:
            self._verify(path)
            array = self.whole(path)
            placement = shardings[path]
            if placement is not None:
                array = jax.make_array_from_callback(array.shape, placement, array.__getitem__)
            values[path] = array
            yield array.nbytes

        with stage("reading", total=None, unit="MB") as advance:
            run_in_threads([read(path) for path in self._leaves], in_megabytes(advance))
        return unflatten({path: values[path] for path in self._leaves})

    def _names(self, path: str) -> list[str]:
        """The tensors of a leaf."""
        leaf = self._leaves[path]
        numbers = self._blocks(path, leaf.shape[0] if leaf.shape else 0)
        return [name.format(i=i) for i in numbers or [0] for name in self._layout[path].names]

    def _verify(self, path: str) -> None:
        for name in self._names(path):
            content = self._tensors[name].reshape(-1).view(np.uint8)
            for number, crc32 in self._listed[name].crc32.items() if name in self._listed else ():
                start = int(number) * SPAN_BYTES
                check_part(name, crc32, checksum(content[start : start + SPAN_BYTES].data))

    def _dtype(self, path: str) -> np.dtype:
        names = self._names(path)
        dtypes = {self._tensors[name].dtype for name in names} or {np.dtype(np.float32)}
        if len(dtypes) > 1:
            listed = ", ".join(sorted(map(str, dtypes)))
            raise InputError(f"{names[0]} and its like in other blocks are stored as {listed}; store them alike.")
        return dtypes.pop()


def tensors_from(
    spec: FolderSpec, architecture: Architecture, leaves: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors that some leaves of a model become in a folder like this one.

    Args:
      spec: a folder of the same kind of model, perhaps of other depths.
      architecture: of the model.
      leaves: whole leaves by path.

    Raises:
      InputError: a leaf is not one of the model's, or of another shape.
    """
    family, known = family_of(architecture), flatten(abstract_params(architecture))
    for path, leaf in leaves.items():
        if path not in known or known[path].shape != leaf.shape:
            raise InputError(f"{path} of shape {leaf.shape} is no leaf of the healed model.")
    layout = family.stored_layout(known, spec.tensors)
    stacked = functools.partial(blocks_of, family.STACKS)

    def parts(path: str) -> Iterator[np.ndarray]:
        leaf = leaves[path]
        return iter([leaf] if stacked(path, 1) is None else leaf)

    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    return {name: np.ascontiguousarray(x) for name, x in to_tensors(shapes, layout, stacked, parts)}
