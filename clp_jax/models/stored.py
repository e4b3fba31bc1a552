"""How a family lies in a folder of safetensors files: names of tensors and keys of ``config.json``, and no arrays.

What is here is enough to remove blocks from such a folder: the pattern of a tower says which block a tensor belongs
to, and the family says which numbers of the config follow the depths.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clp_jax.errors import InputError

Config = Mapping[str, Any]
"""Content of a ``config.json``."""

_BLOCK = "{block}"


@dataclass(frozen=True)
class StoredTower:
    """A tower by the names of its tensors.

    Attributes:
      name: in plans, records and reports.
      pattern: regular expression over the whole name of a tensor, with ``{block}`` where the block's number stands.
      period: blocks alternate between so many kinds, which follow from their place: kept block j must be of the kind
        of place j, ``kept[j] % period == j % period``.
      uncuttable: why no block can go; None where blocks can.
    """

    name: str
    pattern: str
    period: int = 1
    uncuttable: str | None = None

    def block_of(self, tensor: str) -> tuple[int, str] | None:
        """The block that a tensor belongs to, and its name with ``{block}`` for the number; None for any other.

        >>> StoredTower("vlm", r"vlm[.]layers[.]{block}[.].+").block_of("vlm.layers.11.mlp.up_proj.weight")
        (11, 'vlm.layers.{block}.mlp.up_proj.weight')
        """
        match = re.fullmatch(self.pattern.replace(_BLOCK, "(0|[1-9][0-9]{0,8})"), tensor, re.ASCII)
        if match is None:
            return None
        return int(match[1]), tensor[: match.start(1)] + _BLOCK + tensor[match.end(1) :]


def numbered(template: str, block: int) -> str:
    """The name of a tensor of a block, from the second result of `StoredTower.block_of`.

    >>> numbered("vlm.layers.{block}.mlp.up_proj.weight", 3)
    'vlm.layers.3.mlp.up_proj.weight'
    """
    return template.replace(_BLOCK, str(block), 1)


def whole_number(config: Config, path: Sequence[str], default: int | None = None) -> int:
    """The whole number at a path of keys of a config, or the default where it does not have them.

    >>> whole_number({"backbone_cfg": {"select_layer": 12}}, ["backbone_cfg", "select_layer"])
    12

    Raises:
      InputError: something else is there, or nothing and there is no default.
    """
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"config.json: {'.'.join(path)} is {value!r}, not a whole number; correct it")
    return value


def _no_aliases(_: Iterable[str]) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class StoredFamily:
    """A family by what lies in its folders.

    Attributes:
      kind: of the model, in plans and records.
      recognises: whether a config is one of this family.
      why_not: why a folder with this config cannot be cut although the family is right; None where it can.
      towers: the towers of a model with this config, in data-flow order.
      groups: names of the towers that keep the same blocks, the most important group first.
      depths: what the config says about each tower's depth; a tower that it is silent about is missing.
      config_with_depths: the config of the same model at other depths.
      aliases: tensors to add to a cut, because the loaders of the family need them under that name too: from the new
        name to the name of the stored tensor with the same bytes. Given all names that are stored.
    """

    kind: str
    recognises: Callable[[Config], bool]
    towers: Callable[[Config], tuple[StoredTower, ...]]
    groups: tuple[tuple[str, ...], ...]
    depths: Callable[[Config], dict[str, int]]
    config_with_depths: Callable[[Config, Mapping[str, int]], dict[str, Any]]
    why_not: Callable[[Config], str | None] = lambda _: None
    aliases: Callable[[Iterable[str]], dict[str, str]] = _no_aliases


def stored_families() -> tuple[StoredFamily, ...]:
    """Every family that is released as a folder of safetensors files."""
    from clp_jax.models.groot.stored import GROOT
    from clp_jax.models.smolvla.stored import SMOLVLA

    return SMOLVLA, GROOT
