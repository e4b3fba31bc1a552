"""Array types and the vocabulary of axis names used in signatures.

Axis names:
  b        observations of a batch
  s        tokens of a sequence
  d        width of a stream
  l        states of a tower: depth + 1 (index 0 is the tower's input, i the residual stream after block i)
  depth    blocks of a tower
  n        samples (rows) of a CKA estimate
  g        groups: disjoint sets of samples, each with its own HSIC estimate
  horizon  actions of a chunk
  adim     dimensions of an action
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Array = jax.Array
"""A JAX array."""

AnyArray = jax.Array | np.ndarray
"""An array of either library."""

Tree = Mapping[str, Any]
"""A nested mapping from names to arrays or ``jax.ShapeDtypeStruct``: openpi's parameter tree."""

Leaf = Any
"""A leaf of a PyTree: an array, or what stands for one (``jax.ShapeDtypeStruct``, a sharding, a tracer)."""
