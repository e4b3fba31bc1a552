"""A traced program, walked equation by equation."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from clp_jax.errors import InputError
from clp_jax.operations.products import PRODUCTS, Operations, flops_of, kind_of


def count(function: Callable[..., Any], *args: Any, weights: Collection[int] = ()) -> Operations:
    """Count what a function does; nothing is computed or compiled.

    Args:
      function: of arrays, jitted or not.
      args: arrays or ``jax.ShapeDtypeStruct``, in trees; sizes may be symbolic.
      weights: positions of the arguments that are parameters.

    >>> w, x = jax.ShapeDtypeStruct((3, 4, 4), jnp.float32), jax.ShapeDtypeStruct((5, 4), jnp.float32)
    >>> def three_layers(w, x):
    ...     return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
    >>> found = count(three_layers, w, x, weights=[0])
    >>> found.flops, found.weight_bytes
    (480, 192)
    """
    is_weight = [place in weights for place, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
    return count_operations(jax.make_jaxpr(function)(*args), is_weight)


def count_operations(jaxpr: Any, is_weight: Sequence[bool]) -> Operations:
    """Count a traced program.

    Args:
      jaxpr: ``jax.jit(f).trace(...).jaxpr``.
      is_weight: which of its inputs are parameters.

    Raises:
      InputError: it has products inside an operation of which nobody can say how often it does them (a kernel).
    """
    with jax.ensure_compile_time_eval():
        return _walk(jaxpr, [_Value(weight=flag) for flag in is_weight])[0]


@dataclasses.dataclass(frozen=True)
class _Value:
    """What is known of an array of the program.

    Attributes:
      weight: whether nothing but parameters went into it.
      known: computes its content, where the program alone decides it: which blocks of a scan skip what. Called only
        where something depends on it, for each new kind of operation has to be compiled.
    """

    weight: bool = False
    known: Callable[[], np.ndarray] | None = None


_Found = tuple[Operations, list[_Value]]
"""What was counted, and what is known of the outputs."""

_LARGEST_KNOWN = 1024
"""Entries: block numbers and flags are known, masks and positions need not be."""

_MOST_ROUNDS = 100_000
"""Of a while loop whose condition is known, before it is taken for endless."""


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants; up to JAX 0.10 there are open and closed ones, in 0.12 one type is both."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _walk(jaxpr: Any, values: Sequence[_Value]) -> _Found:
    """The operations of a jaxpr, closed over constants or not, and what is known of its outputs."""
    jaxpr, constants = _open(jaxpr)
    held = dict(zip(jaxpr.invars, values, strict=True)) | dict.fromkeys(jaxpr.constvars, _Value())
    held |= {
        variable: _Value(known=functools.partial(np.asarray, x))
        for variable, x in zip(jaxpr.constvars, constants, strict=False)
        if _may_be_known(variable.aval)
    }

    def value(x: Any) -> _Value:
        return held[x] if not isinstance(x, core.Literal) else _Value(known=functools.partial(_content, x))

    total = Operations()
    for eqn in _needed(jaxpr):
        more, outputs = _equation(eqn, [value(x) for x in eqn.invars])
        total += more
        held |= dict(zip(eqn.outvars, outputs, strict=True))
    return total, [value(x) for x in jaxpr.outvars]


def _needed(jaxpr: Any) -> list[Any]:
    """The equations on which an output depends, or that do something else than to compute."""
    read = {x for x in jaxpr.outvars if not isinstance(x, core.Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not read.isdisjoint(eqn.outvars):
            kept.append(eqn)
            read |= {x for x in eqn.invars if not isinstance(x, core.Literal)}
    return kept[::-1]


def _equation(eqn: Any, values: list[_Value]) -> _Found:
    name, params = eqn.primitive.name, eqn.params
    if name in PRODUCTS:
        read = sum(_bytes(x.aval) for x, value in zip(eqn.invars, values, strict=True) if value.weight)
        return Operations({kind_of(eqn): flops_of(eqn)}, read), [_Value()]
    if name in _LOOPS_AND_BRANCHES:
        return _LOOPS_AND_BRANCHES[name](eqn, values)
    if name == "sharding_constraint":
        return Operations(), values
    for inner in _inner(params):
        if _shapes(_open(inner)[0].invars) == _shapes(eqn.invars):  # a call: jit, remat, custom derivatives
            return _walk(inner, values)
        if any(eqn.primitive.name in PRODUCTS for eqn in _all_equations(inner)):
            raise InputError(f"matrix products inside {name} cannot be counted; count the program without it.")
    if _can_be_computed(eqn, values):
        compute = functools.cache(functools.partial(_computed, eqn, values))
        return Operations(), [_Value(known=functools.partial(_item, compute, i)) for i in range(len(eqn.outvars))]
    arrays = [value for value in values if value.known is None]
    return Operations(), [_Value(bool(arrays) and all(value.weight for value in arrays))] * len(eqn.outvars)


def _scan(eqn: Any, values: list[_Value]) -> _Found:
    """Iterations whose known slices are alike are walked once."""
    length, (body, _) = eqn.params["length"], _open(eqn.params["jaxpr"])
    # Which inputs are constants, carried or sliced stands in num_consts and num_carry up to JAX 0.10, in ft_in of
    # 0.12. The ranks say it in every version: only what is sliced or stacked has one axis less inside.
    sliced = [len(x.aval.shape) > len(y.aval.shape) for x, y in zip(eqn.invars, body.invars, strict=True)]
    carried = sum(len(x.aval.shape) == len(y.aval.shape) for x, y in zip(eqn.outvars, body.outvars, strict=True))
    constants = len(sliced) - sum(sliced) - carried
    known = {}
    if not _DECIDING.isdisjoint(eqn.primitive.name for eqn in _all_equations(body)):
        known = {i: value.known() for i, value in enumerate(values) if sliced[i] and value.known is not None}
    alike: dict[tuple[bytes, ...], list[int]] = collections.defaultdict(list)
    for step in range(length) if known else ():
        alike[tuple(x[step].tobytes() for x in known.values())].append(step)
    total, weights = Operations(), [False] * len(eqn.outvars)
    for step, times in [(steps[0], len(steps)) for steps in alike.values()] if known else [(0, length)]:
        inputs = _changing(values, constants)
        for i, x in known.items():
            inputs[i] = _Value(values[i].weight, functools.partial(np.asarray, x[step]))
        inner, outputs = _walk(eqn.params["jaxpr"], inputs)
        total += inner.times(times)
        weights = [output.weight for output in outputs]
    return total, [_Value(weight) for weight in weights]


def _while(eqn: Any, values: list[_Value]) -> _Found:
    """Every round, as long as the condition is known; from there on as one round."""
    (condition, _), (body, _) = _open(eqn.params["cond_jaxpr"]), _open(eqn.params["body_jaxpr"])
    carried = len(eqn.outvars)
    of_condition, of_body = (len(x.invars) - carried for x in (condition, body))
    always, constants = values[:of_condition], values[of_condition : of_condition + of_body]
    state = values[of_condition + of_body :]
    unknown = [_Value(value.weight) for value in state]
    test, _ = _walk(eqn.params["cond_jaxpr"], [*always, *unknown])
    round_, _ = _walk(eqn.params["body_jaxpr"], [*constants, *unknown])
    once, total = test + round_, Operations()
    if not once.products:
        return once, unknown
    for _ in range(_MOST_ROUNDS):
        test, (go,) = _walk(eqn.params["cond_jaxpr"], [*always, *state])
        if go.known is None:
            return total + once, unknown
        if not go.known():
            return total + test, state
        round_, state = _walk(eqn.params["body_jaxpr"], [*constants, *state])
        # At once: what a long loop puts off would be computed in one deep recursion.
        state = [x if x.known is None else _Value(known=functools.partial(np.asarray, x.known())) for x in state]
        total += test + round_
    raise InputError(f"a loop of the program takes more than {_MOST_ROUNDS} rounds; count one of them instead.")


def _cond(eqn: Any, values: list[_Value]) -> _Found:
    """The branch that is taken; where that is not known, the one with the most operations."""
    branches, chosen = eqn.params["branches"], values[0].known
    if chosen is not None:
        return _walk(branches[int(chosen())], values[1:])
    found = [_walk(branch, values[1:]) for branch in branches]
    outputs = [_Value(all(x.weight for x in same)) for same in zip(*(outputs for _, outputs in found), strict=True)]
    return max((operations for operations, _ in found), key=lambda operations: operations.flops), outputs


def _shard_map(eqn: Any, values: list[_Value]) -> _Found:
    """The work of one device, as often as there are devices along the axes that are split by hand."""
    mesh, params = eqn.params["mesh"], eqn.params
    inner, outputs = _walk(params["jaxpr"], [_Value(value.weight) for value in values])
    return inner.times(math.prod(mesh.shape[axis] for axis in _manual(params))), [_Value(x.weight) for x in outputs]


def _manual(params: Mapping[str, Any]) -> Collection[str]:
    """Axes of a mesh that a shard_map splits by hand, as JAX calls them in 0.10 and newer, before that, and in 0.5."""
    for name in ("newly_manual_axes", "manual_axes"):
        if name in params:
            return params[name]
    return set(params["mesh"].axis_names) - params["auto"]


_LOOPS_AND_BRANCHES = {"scan": _scan, "while": _while, "cond": _cond, "shard_map": _shard_map}

_DECIDING = frozenset(["cond", "while"])
"""What does the more or the less, depending on an array."""


def _changing(values: Sequence[_Value], constants: int) -> list[_Value]:
    """The inputs of a loop's body: what is no constant of the loop is not known in every round."""
    return [value if i < constants else _Value(value.weight) for i, value in enumerate(values)]


def _may_be_known(aval: Any) -> bool:
    """Small, and of numbers: random keys are no NumPy arrays, and a symbolic size is no number."""
    shape = getattr(aval, "shape", None)
    if shape is None or jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return False
    return all(isinstance(size, int) for size in shape) and math.prod(shape) <= _LARGEST_KNOWN


def _computed(eqn: Any, values: Sequence[_Value]) -> list[np.ndarray]:
    found = eqn.primitive.bind(*(value.known() for value in values if value.known), **eqn.params)
    return [np.asarray(x) for x in (found if eqn.primitive.multiple_results else [found])]


def _item(compute: Callable[[], list[np.ndarray]], place: int) -> np.ndarray:
    return compute()[place]


def _content(literal: Any) -> np.ndarray:
    return np.asarray(literal.val, literal.aval.dtype)


def _can_be_computed(eqn: Any, values: Sequence[_Value]) -> bool:
    if eqn.effects or eqn.primitive.name == "dim_as_value":  # the number that a symbolic size stands for
        return False
    return all(value.known is not None for value in values) and all(_may_be_known(x.aval) for x in eqn.outvars)


def _shapes(variables: Sequence[Any]) -> list[Any]:
    return [getattr(x.aval, "shape", None) for x in variables]


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
    """The programs that an operation is given: ``jaxpr``, ``call_jaxpr`` or ``fun_jaxpr``, by version and operation."""
    for param in params.values():
        for x in param if isinstance(param, (tuple, list)) else (param,):
            if hasattr(_open(x)[0], "eqns"):
                yield x


def _all_equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in _open(jaxpr)[0].eqns:
        yield eqn
        for inner in _inner(eqn.params):
            yield from _all_equations(inner)


def _bytes(aval: Any) -> Any:
    return math.prod(aval.shape) * aval.dtype.itemsize
