"""Matrix products in a traced program, loops multiplied out (a compiler's own count sees the body of a loop once)."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Operations:
    """What a program does on all devices together.

    Attributes:
      flops: operations of matrix products and convolutions, a multiply-add is two; those that a backward pass does
        again are counted again.
      weight_bytes: bytes of parameters that these products read, at each use, in the dtype in which they are used.
    """

    flops: int = 0
    weight_bytes: int = 0

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(self.flops + other.flops, self.weight_bytes + other.weight_bytes)

    def times(self, number: int) -> "Operations":
        """As often."""
        return Operations(number * self.flops, number * self.weight_bytes)


def count_operations(jaxpr: core.ClosedJaxpr, is_weight: Sequence[bool]) -> Operations:
    """Count a traced program.

    Args:
      jaxpr: ``jax.jit(f).trace(...).jaxpr``.
      is_weight: which of its inputs are parameters.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> def three_layers(w, x):
    ...     return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
    >>> traced = jax.jit(three_layers).trace(jnp.ones((3, 4, 4)), jnp.ones((5, 4)))
    >>> count_operations(traced.jaxpr, [True, False])
    Operations(flops=480, weight_bytes=192)
    """
    return _walk(jaxpr, [_Value(weight=flag) for flag in is_weight])[0]


@dataclasses.dataclass(frozen=True)
class _Value:
    """What is known of an array of the program.

    Attributes:
      weight: whether nothing but parameters went into it.
      known: its content, where the program alone decides it: which blocks of a scan skip what.
    """

    weight: bool = False
    known: np.ndarray | None = None


_LARGEST_KNOWN = 1024
"""Entries: block numbers and flags are known, masks and positions need not be."""


def _walk(jaxpr: Any, values: Sequence[_Value]) -> tuple[Operations, list[_Value]]:
    """The operations of a jaxpr, closed over constants or not, and what is known of its outputs."""
    constants = getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    held = dict(zip(jaxpr.invars, values, strict=True)) | dict.fromkeys(jaxpr.constvars, _Value())
    held |= {
        variable: _Value(known=np.asarray(x))
        for variable, x in zip(jaxpr.constvars, constants, strict=False)
        if _may_be_known(variable.aval)
    }

    def value(x: Any) -> _Value:
        return _Value(known=np.asarray(x.val)) if isinstance(x, core.Literal) else held[x]

    total = Operations()
    for eqn in jaxpr.eqns:
        more, outputs = _equation(eqn, [value(x) for x in eqn.invars])
        total += more
        held |= dict(zip(eqn.outvars, outputs, strict=True))
    return total, [value(x) for x in jaxpr.outvars]


def _equation(eqn: Any, values: list[_Value]) -> tuple[Operations, list[_Value]]:
    name, params = eqn.primitive.name, eqn.params
    if name in ("dot_general", "conv_general_dilated"):
        read = sum(_bytes(x.aval) for x, value in zip(eqn.invars, values, strict=True) if value.weight)
        return Operations(_product_flops(eqn), read), [_Value()]
    if name == "scan":
        return _scan(params, values)
    if name == "while":  # of unknown length: counted once
        first = params["cond_nconsts"]
        return _walk(params["body_jaxpr"], _changing(values[first:], params["body_nconsts"]))
    if name == "cond":
        branches, chosen = params["branches"], values[0].known
        if chosen is not None:
            return _walk(branches[int(chosen)], values[1:])
        return max((_walk(branch, values[1:]) for branch in branches), key=lambda found: found[0].flops)
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in params:
            return _walk(params[key], values)
    if all(value.known is not None for value in values) and all(_may_be_known(x.aval) for x in eqn.outvars):
        found = eqn.primitive.bind(*(value.known for value in values), **params)
        found = found if eqn.primitive.multiple_results else [found]
        return Operations(), [_Value(known=np.asarray(x)) for x in found]
    arrays = [value for value in values if value.known is None]
    return Operations(), [_Value(bool(arrays) and all(value.weight for value in arrays))] * len(eqn.outvars)


def _may_be_known(aval: Any) -> bool:
    """Small, and of numbers: random keys are no NumPy arrays."""
    return aval.size <= _LARGEST_KNOWN and not jnp.issubdtype(aval.dtype, jax.dtypes.extended)


def _scan(params: Any, values: list[_Value]) -> tuple[Operations, list[_Value]]:
    """Iterations whose known slices are alike are walked once."""
    same, slices = _changing(values, params["num_consts"]), params["num_consts"] + params["num_carry"]
    known = {i: value.known for i, value in enumerate(values) if i >= slices and value.known is not None}
    alike = collections.Counter(tuple(x[step].tobytes() for x in known.values()) for step in range(params["length"]))
    total, outputs = Operations(), []
    for content, times in alike.items():
        step = {
            i: np.frombuffer(part, x.dtype).reshape(x.shape[1:])
            for (i, x), part in zip(known.items(), content, strict=True)
        }
        inputs = [_Value(value.weight, step.get(i)) for i, value in enumerate(same)]
        inputs[: params["num_consts"]] = same[: params["num_consts"]]
        inner, outputs = _walk(params["jaxpr"], inputs)
        total += inner.times(times)
    return total, [_Value(output.weight) for output in outputs]


def _changing(values: Sequence[_Value], constants: int) -> list[_Value]:
    """The inputs of a loop's body: what is no constant of the loop is not known in every round."""
    return [value if i < constants else _Value(value.weight) for i, value in enumerate(values)]


def _product_flops(eqn: Any) -> int:
    left, right, out = (*(x.aval for x in eqn.invars[:2]), eqn.outvars[0].aval)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
    outputs = eqn.params["dimension_numbers"].rhs_spec[0]
    return 2 * math.prod(out.shape) * math.prod(right.shape) // right.shape[outputs]


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize
