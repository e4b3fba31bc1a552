"""``similarity.npz`` as it is read: every array of the shape that its towers say, or one line."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from clp_jax.editable_json import typed
from clp_jax.errors import InputError
from clp_jax.files import parse_json, read_archive
from clp_jax.similarity import VARIANTS

SCHEMA = 1
_HEAD = {"schema": int, "kind": str, "depths": dict, "coupled": list, "samples": dict, "meta": dict}
_DEEPEST = 10_000
_LIMIT = 2**32
"""Bytes; matrices of a thousand clusters of towers of a hundred blocks have less."""


def read_stored(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads and proves the file of an analysis.

    Args:
      path: to read.

    Returns:
      The JSON of ``meta``, with everything that `Analysis` asks for, and the other arrays by key.

    Raises:
      InputError: it is not such a file, is damaged, or of another version.
    """
    if not epath.Path(path).exists():
        raise InputError(f"there is no {os.fspath(path)}; give the folder that clp analyse wrote")
    arrays = read_archive(path, _LIMIT)
    try:
        if "meta" not in arrays or arrays["meta"].dtype.kind != "U":
            raise InputError("it lacks 'meta'")
        head = typed(parse_json(str(arrays.pop("meta")), "its 'meta'", finite=True), dict, "'meta'")
        _check_head(head)
        _check_arrays(head, arrays)
    except InputError as error:
        raise InputError(f"{os.fspath(path)} is no analysis that can be used: {error}; analyse again") from None
    return head, arrays


def _check_head(head: Mapping[str, Any]) -> None:
    for key, wanted in _HEAD.items():
        if key not in head:
            raise InputError(f"it lacks {key!r}")
        typed(head[key], wanted, key)
    if head["schema"] != SCHEMA:
        raise InputError(f"it has schema {head['schema']}, this version reads {SCHEMA}")
    depths, measured = head["depths"], head["samples"]
    for name, depth in depths.items():
        if not 0 < typed(depth, int, f"the depth of {name}") <= _DEEPEST:
            raise InputError(f"the depth of {name} is {depth}")
    for name, samples in measured.items():
        _check_tower(name, depths)
        typed(samples, int, f"samples of {name}")
    for group in [*head["coupled"], *typed(head.get("groups", []), list, "groups")]:
        _check_group(typed(group, list, "a group"), depths, measured)
    for name, rules in typed(head.get("towers", {}), dict, "towers").items():
        _check_tower(name, depths)
        _check_rules(typed(rules, dict, f"rules of {name}"), name)


def _check_tower(name: Any, depths: Mapping[str, int]) -> None:
    if not isinstance(name, str) or name not in depths:
        raise InputError(f"there is no tower {name!r} among {', '.join(depths)}")


def _check_group(group: list[Any], depths: Mapping[str, int], measured: Mapping[str, int]) -> None:
    if not group:
        raise InputError("a group is empty")
    for name in group:
        _check_tower(name, depths)
        if name not in measured or depths[name] != depths[group[0]]:
            raise InputError(f"{name} was not measured, or is not as deep as {group[0]}")


def _check_rules(rules: Mapping[str, Any], name: str) -> None:
    for key, value in rules.items():
        if key == "period":
            fits = type(value) is int and value >= 1
        elif key == "optional":
            fits = type(value) is bool
        else:
            fits = key in ("protected", "incomparable") and isinstance(value, list)
            fits = fits and all(type(number) is int for number in value)
        if not fits:
            raise InputError(f"{key} of {name} is {value!r}")


def _check_arrays(head: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Every array that a tower has, and no other."""
    variants, known = len(VARIANTS), {}
    for name in head["samples"]:
        states = head["depths"][name] + 1
        square = (states, states)
        known |= {f"{name}/{key}": ("f", square) for key in ("cosine", "angle", "residual", "mse")}
        known[f"{name}/cka"] = ("f", (variants, *square))
        known[f"{name}/clusters"] = ("f", (None, variants, *square))
        known[f"{name}/channel_share"] = ("f", (states,))
        known[f"{name}/read"] = ("b", (states,))
    if missing := sorted(known.keys() - arrays.keys()):
        raise InputError(f"it lacks {missing[0]!r}")
    for key in sorted(arrays.keys() - known.keys()):
        known[key] = ("f", _shape_of_gates(key, head["depths"]))
    for key, array in arrays.items():
        kind, shape = known[key]
        fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
        if array.dtype.kind != kind or not fits or array.size == 0:
            raise InputError(f"{key} is {array.dtype} of shape {array.shape}")


def _shape_of_gates(key: str, depths: Mapping[str, int]) -> tuple[int, ...]:
    """Of what is under ``gates/<tower>+<tower>/<name>``: a number, or one for each other block, per block."""
    parts = key.split("/")
    if len(parts) != 3 or parts[0] != "gates" or not set(parts[1].split("+")) <= depths.keys():
        raise InputError(f"it holds {key!r}, which no analysis has")
    depth = depths[parts[1].split("+")[0]]
    return (depth, depth) if parts[2] == "gauss_newton" else (depth,)
