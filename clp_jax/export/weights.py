"""The parameters that an export writes: adapters merged, cast, one layer at a time."""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Num

from clp_jax.checkpoint import CheckpointSpec, LeafReader, read_params
from clp_jax.models import Architecture
from clp_jax.models.pi0.lora import adapter_paths, is_adapter, merge_lora, merge_weight
from clp_jax.prune import tower_of
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
    """

    spec: CheckpointSpec
    source: Architecture
    merge: bool
    dtype: Dtype | None

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture of what is written."""
        if not self.merge:
            return self.source
        plain = {
            name: dataclasses.replace(getattr(self.source, name), attn_lora_rank=0, ffn_lora_rank=0, lora_scale=1.0)
            for name in ("vlm", "action")
            if getattr(self.source, name) is not None
        }
        changes: dict[str, Any] = plain
        return dataclasses.replace(self.source, **changes)

    @cached_property
    def leaves(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Path, shape and dtype of every parameter that is written, in the order of the tree."""
        tree = jax.eval_shape(merge_lora, self.spec.tree) if self.merge else self.spec.tree
        return {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if self.dtype is None else jnp.dtype(self.dtype))
            for path, leaf in flatten(tree).items()
        }

    def changes_values(self) -> bool:
        """Whether anything written differs from what is stored."""
        stored = flatten(self.spec.tree)
        return any(stored[path].dtype != leaf.dtype or self._factors(path) for path, leaf in self.leaves.items())

    def parts(self, path: str) -> Iterator[Num[np.ndarray, "..."]]:
        """The layers of a stacked parameter one after another, or the one array of any other.

        Args:
          path: of a parameter in `leaves`.
        """
        dtype, factors = self.leaves[path].dtype, self._factors(path)
        read = self._reader.layers if tower_of(path) else lambda name: iter([self._reader.whole(name)])
        streams = [read(name) for name in (path, *factors)]
        for w, *factor in zip(*streams, strict=True):
            if factor:
                a, b = factor
                yield merge_weight(path, w, a, b, lora_scale=self.source_scale(path)).astype(dtype)
            else:
                yield w.astype(dtype, copy=False)

    def read(self) -> dict[str, Any]:
        """All parameters as a tree, in memory."""
        if not self.merge:
            return read_params(self.spec, dtype=None if self.dtype is None else jnp.dtype(self.dtype))
        return unflatten({path: self._whole(path) for path in self.leaves})

    def source_scale(self, path: str) -> float:
        """alpha / rank of the attention adapters of the expert that a parameter belongs to."""
        expert = self.source.action if tower_of(path) == "action" else self.source.vlm
        return 1.0 if expert is None else expert.lora_scale

    @cached_property
    def _reader(self) -> LeafReader:
        return LeafReader(self.spec)

    def _factors(self, path: str) -> tuple[str, ...]:
        if not self.merge or is_adapter(path):
            return ()
        factors = adapter_paths(path)
        return factors if factors[0] in flatten(self.spec.tree) else ()

    def _whole(self, path: str) -> np.ndarray:
        leaf = self.leaves[path]
        values = np.empty(leaf.shape, leaf.dtype)
        for i, part in enumerate(self.parts(path)):
            values[i if tower_of(path) else ...] = part
        return values
