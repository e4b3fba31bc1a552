"""The parameters that an export writes: adapters merged, cast, one layer at a time."""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Num

from clp_jax.checkpoint import CheckpointSpec, FolderSpec, LeafReader, Spec, read_params
from clp_jax.checkpoint.safetensors.leaves import TensorLeaves
from clp_jax.models import Architecture, family_of, stack_of
from clp_jax.models.layers.lora import is_adapter
from clp_jax.trees import flatten, unflatten

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Weights:
    """The parameters of a checkpoint as an export wants them. Nothing is read before it is asked for.

    Attributes:
      spec: the checkpoint.
      source: its architecture, adapters included.
      merge: multiply LoRA adapters into their weights.
      dtype: cast every parameter to this; None keeps what is stored (a merged weight is float32).
      tied: parameters that are written with the values of others, from path to path.
    """

    spec: Spec
    source: Architecture
    merge: bool
    dtype: Dtype | None
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def source_folder(self) -> str:
        """The folder that a user would name: of the step, or of the tensors."""
        return str(self.spec.path if isinstance(self.spec, FolderSpec) else self.spec.path.parent)

    @cached_property
    def stored(self) -> dict[str, Any]:
        """Shapes and dtypes of what is stored, as a tree."""
        return self.spec.tree if isinstance(self.spec, CheckpointSpec) else self._tensors.tree

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture of what is written."""
        if not self.merges:
            return self.source
        return self._lora.without_adapters(self.source)

    @cached_property
    def leaves(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Path, shape and dtype of every parameter that is written, in the order of the tree."""
        tree = jax.eval_shape(self._lora.merge_lora, self.stored) if self.merges else self.stored
        return {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if self.dtype is None else jnp.dtype(self.dtype))
            for path, leaf in flatten(tree).items()
        }

    @cached_property
    def changed(self) -> frozenset[str]:
        """Paths of the parameters whose values are not those that are stored: cast, or merged with adapters."""
        stored = flatten(self.stored)
        return frozenset(
            path for path, leaf in self.leaves.items() if stored[path].dtype != leaf.dtype or self._factors(path)
        )

    def parts(self, path: str) -> Iterator[Num[np.ndarray, "..."]]:
        """The layers of a stacked parameter one after another, or the one array of any other.

        Args:
          path: of a parameter in `leaves`.
        """
        dtype = self.leaves[path].dtype
        path = self.tied.get(path, path)
        factors = self._factors(path)
        streams = [self._rows(name, stacked=self.stacked(path)) for name in (path, *factors)]
        for w, *factor in zip(*streams, strict=True):
            if factor:
                a, b = factor
                scale = self._lora.lora_scale(self.source, path)
                yield self._lora.merge_weight(path, w, a, b, lora_scale=scale).astype(dtype)
            else:
                yield w.astype(dtype, copy=False)

    def read(self) -> dict[str, Any]:
        """All parameters as a tree, in memory."""
        if not self.merges and isinstance(self.spec, CheckpointSpec):
            return read_params(self.spec, dtype=None if self.dtype is None else jnp.dtype(self.dtype))
        return unflatten({path: self._whole(path) for path in self.leaves})

    @property
    def merges(self) -> bool:
        """Whether there are adapters to be merged."""
        return self.merge and self._lora is not None and self._lora.has_adapters(self.source)

    @property
    def _lora(self) -> Any:
        return family_of(self.source).LORA

    def stacked(self, path: str) -> bool:
        """Whether axis 0 of a parameter counts blocks."""
        return stack_of(family_of(self.source).STACKS, path) is not None

    def _rows(self, path: str, *, stacked: bool) -> Iterator[np.ndarray]:
        if isinstance(self.spec, FolderSpec):
            return self._tensors.rows(path)
        return self._reader.layers(path) if stacked else iter([self._reader.whole(path)])

    @cached_property
    def _reader(self) -> LeafReader:
        assert isinstance(self.spec, CheckpointSpec)
        return LeafReader(self.spec)

    @cached_property
    def _tensors(self) -> TensorLeaves:
        assert isinstance(self.spec, FolderSpec)
        return TensorLeaves(self.spec, self.source)

    def _factors(self, path: str) -> tuple[str, ...]:
        if not self.merges or is_adapter(path):
            return ()
        factors = self._lora.adapter_paths(path)
        return factors if factors[0] in flatten(self.stored) else ()

    def _whole(self, path: str) -> np.ndarray:
        leaf = self.leaves[path]
        values = np.empty(leaf.shape, leaf.dtype)
        for i, part in enumerate(self.parts(path)):
            values[i if self.stacked(path) else ...] = part
        return values
