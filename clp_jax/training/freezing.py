"""Which parameters are trained: rules over their names, and trees split in two by them."""

import re
from collections.abc import Iterable, Sequence

from clp_jax.aliases import Tree
from clp_jax.errors import InputError
from clp_jax.trees import assign, flatten, unflatten

_FROZEN, _TRAINED = True, False

Rules = Sequence[tuple[str, bool]]
"""(regular expression over a whole name, whether it is frozen) pairs; the first match wins."""


def frozen_paths(
    paths: Sequence[str], *, freeze: Sequence[str] = (), train: Sequence[str] = (), default: Rules = ()
) -> frozenset[str]:
    """Names of the parameters that stay as they are.

    Args:
      paths: names of all parameters, keys joined by "/".
      freeze: regular expressions; a parameter whose whole name matches one is frozen...
      train: ... unless its name matches one of these.
      default: what is frozen where neither says anything; all is trained that no rule names. A rule for which they
        leave nothing has no say.

    Raises:
      InputError: an expression decides about no parameter, or nothing is left to train.

    >>> sorted(frozen_paths(["img/bias", "img/kernel", "head"], freeze=["img/.*"], train=[".*/bias"]))
    ['img/kernel']
    """
    rules = [(rule, _TRAINED) for rule in train] + [(rule, _FROZEN) for rule in freeze]
    for rule, _ in rules:
        try:
            re.compile(rule)
        except re.error as error:
            raise InputError(f"{rule!r} is no regular expression: {error}.") from None
    overruled = set(paths) - set(_undecided(rules, paths))
    rules += [
        (rule, value) for rule, value in default if not _matched(rule, paths) or _matched(rule, paths) - overruled
    ]
    rules += [(".*", _TRAINED)] if _undecided(rules, paths) else []
    frozen = frozenset(path for path, is_frozen in assign(rules, paths).items() if is_frozen)
    if len(frozen) == len(paths):
        raise InputError("all parameters are frozen, there is nothing to train; correct --freeze.")
    return frozen


def _matched(rule: str, paths: Iterable[str]) -> set[str]:
    return {path for path in paths if re.fullmatch(rule, path)}


def _undecided(rules: Rules, paths: Iterable[str]) -> list[str]:
    return [path for path in paths if not any(re.fullmatch(rule, path) for rule, _ in rules)]


def split_frozen(tree: Tree, frozen: frozenset[str]) -> tuple[dict, dict]:
    """The trained and the frozen part of a parameter tree; `merge_parts` joins them again."""
    flat = flatten(tree)
    trained = {path: leaf for path, leaf in flat.items() if path not in frozen}
    return unflatten(trained), unflatten({path: flat[path] for path in flat if path in frozen})


def merge_parts(trained: Tree, frozen: Tree) -> dict:
    """The whole tree from its two parts."""
    return unflatten(flatten(trained) | flatten(frozen))
