"""Matrix products: how many operations, of which dtype and precision, and what they cost a matrix unit."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clp_jax.errors import InputError

Size = Any
"""An int, or where sizes are symbolic (``jax.export.symbolic_shape``) an expression of them."""


class Product(NamedTuple):
    """How a product is asked for.

    Attributes:
      dtype: of the operands, the wider one if they differ: ``"bfloat16"``.
      precision: name of the ``jax.lax.Precision`` or ``jax.lax.DotAlgorithmPreset``: ``"DEFAULT"``, ``"HIGHEST"``.
    """

    dtype: str
    precision: str


@dataclasses.dataclass(frozen=True)
class Operations:
    """What a program does on all devices together.

    Attributes:
      products: operations of matrix products and convolutions by kind, a multiply-add is two; those that a backward
        pass does again are counted again.
      weight_bytes: bytes of parameters that these products read, at each use, in the dtype in which they are used.
    """

    products: Mapping[Product, Size] = dataclasses.field(default_factory=dict)
    weight_bytes: Size = 0

    @property
    def flops(self) -> Size:
        """Operations of all kinds."""
        return sum(self.products.values())

    @property
    def passes(self) -> Size:
        """The same, in what a TPU's matrix unit does for them: see `MatrixUnit`."""
        return TPU.passes(self.products)

    def __add__(self, other: "Operations") -> "Operations":
        kinds = dict.fromkeys([*self.products, *other.products])
        products = {kind: self.products.get(kind, 0) + other.products.get(kind, 0) for kind in kinds}
        return Operations(products, self.weight_bytes + other.weight_bytes)

    def times(self, number: Size) -> "Operations":
        """As often."""
        products = {kind: number * flops for kind, flops in self.products.items()}
        return Operations(products, number * self.weight_bytes)


@dataclasses.dataclass(frozen=True)
class MatrixUnit:
    """What multiplies matrices on a kind of chip.

    Attributes:
      name: of the chips.
      passes_of_float32: how many times as long as a product of bfloat16 one of float32 takes, by its precision.
    """

    name: str
    passes_of_float32: Mapping[str, int | float]

    def passes(self, products: Mapping[Product, Size]) -> Size:
        """Operations of bfloat16 products that take the unit as long as these products.

        Types of 8 and 16 bits are taken to need one pass, though some chips do 8 bits in half of one.

        >>> TPU.passes({Product("bfloat16", "DEFAULT"): 100, Product("float32", "HIGHEST"): 10})
        160

        Raises:
          InputError: for these products no rate is public: float64, some algorithms.
        """
        return sum(flops * self._passes_of(kind) for kind, flops in products.items())

    def _passes_of(self, kind: Product) -> int | float:
        if jnp.dtype(kind.dtype).itemsize <= 2:
            return 1
        if kind.dtype == "float32" and kind.precision in self.passes_of_float32:
            return self.passes_of_float32[kind.precision]
        raise InputError(
            f"how many passes of a {self.name}'s matrix unit a product of {kind.dtype} at precision {kind.precision} "
            "takes is not known; compute it in bfloat16 or float32 at precision DEFAULT, HIGH or HIGHEST."
        )


_IN_PARTS = {"BF16_BF16_F32": 1, "BF16_BF16_F32_X3": 3, "BF16_BF16_F32_X6": 6, "BF16_BF16_F32_X9": 9}
"""``jax.lax.DotAlgorithmPreset``: a suffix X3, X6 or X9 is the number of bfloat16 products of an operand's parts."""

TPU = MatrixUnit("TPU", {"DEFAULT": 1, "HIGH": 3, "HIGHEST": 6} | _IN_PARTS)
"""The rule of JAX's documentation of ``jax.lax.Precision`` (docs.jax.dev/en/latest/jax.lax.html#jax.lax.Precision)."""

_BFLOAT16, _TENSORFLOAT32, _FLOAT32 = 989.4, 494.7, 66.9

H100 = MatrixUnit(
    "H100",
    {"HIGHEST": _BFLOAT16 / _FLOAT32} | dict.fromkeys(("DEFAULT", "HIGH"), _BFLOAT16 / _TENSORFLOAT32) | _IN_PARTS,
)
"""Dense TFLOP/s of an H100 SXM from NVIDIA's data sheet; float32 has no matrix unit there. Which precision is computed
in TensorFloat32 is JAX's rule again."""


PRODUCTS = frozenset(["dot_general", "conv_general_dilated"])
"""Names of the operations that are counted."""


def kind_of(eqn: Any) -> Product:
    """How an equation of a traced program asks for its product."""
    dtypes = [x.aval.dtype for x in eqn.invars[:2]]
    asked = eqn.params["precision"]
    # One level for each operand, or one for both; an algorithm that is written out is a tuple too, and has no name.
    pair = isinstance(asked, tuple) and not isinstance(asked, jax.lax.DotAlgorithm)
    names = ["DEFAULT" if x is None else getattr(x, "name", str(x)) for x in (asked if pair else [asked])]
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    return Product(widest.name, max(names, key=lambda name: TPU.passes_of_float32.get(name, math.inf)))


def flops_of(eqn: Any) -> Size:
    """Operations of an equation that is a product."""
    left, right, out = (*(x.aval for x in eqn.invars[:2]), eqn.outvars[0].aval)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
    outputs = eqn.params["dimension_numbers"].rhs_spec[0]
    return 2 * math.prod(out.shape) * math.prod(size for axis, size in enumerate(right.shape) if axis != outputs)
