"""Named paths of nested mappings: flatten, unflatten, two-sided difference, rules over names.

A tree is a nested mapping from strings to leaves (arrays, ``jax.ShapeDtypeStruct``, anything that is no mapping). The
path of a leaf is its keys joined by "/", for example ``PaliGemma/llm/layers/attn/q_einsum/w``. Nothing here is dropped,
filled or cast silently.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from clp_jax.errors import InputError

T = TypeVar("T")


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of a nested mapping by path, in the order of the tree.

    Args:
      tree: nested mapping with string keys; a key must not be empty or hold "/", an inner mapping must not be empty
        (neither could be restored by `unflatten`).

    Returns:
      Leaves by "/"-joined path.

    Raises:
      InputError: a key or an inner mapping is of a kind that a path cannot name.

    >>> flatten({"llm": {"mlp": {"linear": 1}, "norm": 2}})
    {'llm/mlp/linear': 1, 'llm/norm': 2}
    """
    flat: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [("", tree)]
    while pending:
        path, node = pending.pop()
        if not isinstance(node, Mapping):
            flat[path] = node
            continue
        if not node and path:
            raise InputError(f"the tree holds an empty group at {path!r}; remove it, it has no parameters")
        for key in reversed(node):
            if not isinstance(key, str) or not key or "/" in key:
                raise InputError(f"the tree holds the key {key!r} below {path!r}; keys must be names without '/'")
            pending.append((f"{path}/{key}" if path else key, node[key]))
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict whose `flatten` is `flat`.

    Args:
      flat: leaves by "/"-joined path.

    Returns:
      Nested plain dicts.

    Raises:
      InputError: one path is a leaf and also the beginning of another.

    >>> unflatten({"llm/mlp/linear": 1, "llm/norm": 2})
    {'llm': {'mlp': {'linear': 1}, 'norm': 2}}
    """
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = root
        for depth, key in enumerate(parents, 1):
            node = node.setdefault(key, {})
            if not isinstance(node, dict) or "/".join(parents[:depth]) in flat:
                raise InputError(f"{'/'.join(parents[:depth])!r} is both a parameter and a group that holds {path!r}")
        if last in node:
            raise InputError(f"{path!r} is both a parameter and a group of parameters")
        node[last] = leaf
    return root


def abstract(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree with every array replaced by its ``jax.ShapeDtypeStruct`` (without sharding).

    >>> abstract({"w": np.zeros((2, 3), np.float32)})
    {'w': ShapeDtypeStruct(shape=(2, 3), dtype=float32)}
    """
    return unflatten({path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flatten(tree).items()})


def describe(leaf: Any) -> str:
    """Returns dtype and shape of a leaf on one line; the type's name if the leaf is no array.

    >>> describe(np.zeros((18, 2048), np.float32))
    'float32[18, 2048]'
    """
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return type(leaf).__name__


def difference(expected: Mapping[str, Any], got: Mapping[str, Any], *, dtypes: bool = False) -> list[str]:
    """Lists every path on which two trees differ, seen from both sides.

    Args:
      expected: tree of arrays or ``jax.ShapeDtypeStruct``.
      got: the tree to compare with it.
      dtypes: also compare the dtypes of leaves, not only their shapes.

    Returns:
      One line for each differing path, sorted by path, with the shape and dtype on both sides; empty if they agree.

    >>> a = {"w": np.zeros((18, 4), np.float32), "b": np.zeros(4, np.float32)}
    >>> for line in difference(a, {"w": np.zeros((9, 4), np.float32), "scale": np.zeros(4, np.float32)}):
    ...     print(line)
    b: expected float32[4], got nothing
    scale: expected nothing, got float32[4]
    w: expected float32[18, 4], got float32[9, 4]
    """
    left, right = flatten(expected), flatten(got)
    lines = []
    for path in sorted(left.keys() | right.keys()):
        if path in left and path in right and _agree(left[path], right[path], dtypes=dtypes):
            continue
        sides = (describe(side[path]) if path in side else "nothing" for side in (left, right))
        lines.append("{}: expected {}, got {}".format(path, *sides))
    return lines


def check_same_structure(
    expected: Mapping[str, Any], got: Mapping[str, Any], *, what: str = "the parameters", dtypes: bool = False
) -> None:
    """Raises with every differing path and both shapes unless two trees agree.

    Args:
      expected: tree of arrays or ``jax.ShapeDtypeStruct``.
      got: the tree to compare with it.
      what: the subject of the error's sentence, e.g. "the checkpoint /data/pi0".
      dtypes: also compare the dtypes of leaves.

    Raises:
      InputError: the trees differ.

    >>> check_same_structure({"w": np.zeros(2)}, {"w": np.zeros(3)})
    Traceback (most recent call last):
    ...
    clp_jax.errors.InputError: the parameters do not fit, 1 path differs:
      w: expected float64[2], got float64[3]
    """
    lines = difference(expected, got, dtypes=dtypes)
    if lines:
        count = f"{len(lines)} paths differ" if len(lines) > 1 else "1 path differs"
        raise InputError(f"{what} do not fit, {count}:\n  " + "\n  ".join(lines))


def assign(rules: Sequence[tuple[str, T]], paths: Iterable[str]) -> dict[str, T]:
    """Gives every path the value of the first rule whose pattern matches the whole path.

    Args:
      rules: (regular expression, value) pairs, most specific first.
      paths: the paths that need a value.

    Returns:
      The value of each path, in the order of `paths`.

    Raises:
      InputError: a path matches no rule, or a rule is the first match of no path (a sign of a misspelt pattern).

    >>> assign([(r".*/bias", "replicate"), (r".*", "shard")], ["img/bias", "img/kernel"])
    {'img/bias': 'replicate', 'img/kernel': 'shard'}
    """
    compiled = [re.compile(pattern) for pattern, _ in rules]
    values: dict[str, T] = {}
    used: set[int] = set()
    for path in paths:
        first = next((i for i, pattern in enumerate(compiled) if pattern.fullmatch(path)), None)
        if first is None:
            raise InputError(f"no rule matches {path!r}; add a rule for it, the rules are {[p for p, _ in rules]}")
        used.add(first)
        values[path] = rules[first][1]
    unused = [pattern for i, (pattern, _) in enumerate(rules) if i not in used]
    if unused:
        raise InputError(f"these rules match no path that an earlier rule leaves: {unused}; correct or remove them")
    return values


def _agree(a: Any, b: Any, *, dtypes: bool) -> bool:
    """Whether two leaves have the same shape (and dtype); leaves without a shape agree if their types do."""
    if not (hasattr(a, "shape") and hasattr(b, "shape")):
        return type(a) is type(b)
    return tuple(a.shape) == tuple(b.shape) and (not dtypes or np.dtype(a.dtype) == np.dtype(b.dtype))
