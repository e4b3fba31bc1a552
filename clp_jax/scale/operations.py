"""Matrix products in a traced program, loops multiplied out (a compiler's own count sees the body of a loop once)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

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
    return _walk(jaxpr.jaxpr, is_weight)[0]


def _walk(jaxpr: Any, is_weight: Sequence[bool]) -> tuple[Operations, list[bool]]:
    """The operations of a jaxpr, and which of its outputs are still nothing but parameters."""
    weights = dict(zip(jaxpr.invars, is_weight, strict=True)) | dict.fromkeys(jaxpr.constvars, False)
    total = Operations()
    for eqn in jaxpr.eqns:
        variables = [x for x in eqn.invars if not isinstance(x, core.Literal)]
        flags = [not isinstance(x, core.Literal) and weights[x] for x in eqn.invars]
        more, outputs = _equation(eqn, flags, only_weights=bool(variables) and all(weights[x] for x in variables))
        total += more
        weights |= dict(zip(eqn.outvars, outputs, strict=True))
    return total, [not isinstance(x, core.Literal) and weights[x] for x in jaxpr.outvars]


def _equation(eqn: Any, flags: list[bool], *, only_weights: bool) -> tuple[Operations, list[bool]]:
    name, params = eqn.primitive.name, eqn.params
    if name in ("dot_general", "conv_general_dilated"):
        read = sum(_bytes(x.aval) for x, flag in zip(eqn.invars, flags, strict=True) if flag)
        return Operations(_product_flops(eqn), read), [False]
    if name == "scan":
        inner, outputs = _walk(params["jaxpr"].jaxpr, flags)
        return inner.times(params["length"]), outputs
    if name == "while":  # of unknown length: counted once
        first, last = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        return _walk(params["body_jaxpr"].jaxpr, flags[first:last] + flags[last:])
    if name == "cond":
        branches = [_walk(branch.jaxpr, flags[1:]) for branch in params["branches"]]
        return max(branches, key=lambda found: found[0].flops)
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in params:
            inner = params[key]
            return _walk(getattr(inner, "jaxpr", inner), flags)
    return Operations(), [only_weights] * len(eqn.outvars)


def _product_flops(eqn: Any) -> int:
    left, right, out = (*(x.aval for x in eqn.invars[:2]), eqn.outvars[0].aval)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
    outputs = eqn.params["dimension_numbers"].rhs_spec[0]
    return 2 * math.prod(out.shape) * math.prod(right.shape) // right.shape[outputs]


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize
