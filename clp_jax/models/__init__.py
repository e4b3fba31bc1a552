"""Models in Flax, with the parameter trees of their releases, at any size.

`family` says what a family is, `FAMILIES` lists those that there are; `layers` is what they share.
"""

import functools
from typing import Any

import jax

from clp_jax.aliases import Tree
from clp_jax.errors import InputError
from clp_jax.models import groot, pi0, smolvla
from clp_jax.models.family import Architecture, Family, Lengths, Loss, Remat
from clp_jax.models.layers.scan import Rows
from clp_jax.models.stacks import bias_of, blocks_of, kernels_of, rows_kept, stack_of, towers_measured
from clp_jax.models.towers import Gates, Shape, Stack, Tower, TowerStates
from clp_jax.processing.conventions import Configuration
from clp_jax.processing.robots import Robot
from clp_jax.trees import flatten

FAMILIES: dict[str, Any] = {"pi0": pi0, "smolvla": smolvla, "groot": groot}
"""Every family by the name of its package; a new one is a package and a line here."""

RELEASED: dict[str, Architecture] = {
    name: architecture for family in FAMILIES.values() for name, architecture in family.RELEASED.items()
}
"""Sizes of the published models of all families, by the names that people give them."""


def family_of(architecture: Architecture) -> Any:
    """The family of an architecture, a module with the names of `family.Family`."""
    return family_of_kind(architecture.kind)


def family_of_kind(kind: str) -> Any:
    """The family that a kind of model belongs to.

    Raises:
      InputError: no family has such a kind.
    """
    for family in FAMILIES.values():
        if kind in family.KINDS:
            return family
    known = ", ".join(kind for family in FAMILIES.values() for kind in family.KINDS)
    raise InputError(f"there is no kind of model {kind!r}; known are {known}.")


def family_of_tree(tree: Tree) -> Any:
    """The family of a parameter tree, by names alone.

    Raises:
      InputError: no family knows it.
    """
    for family in FAMILIES.values():
        if family.recognises(tree):
            return family
    held = ", ".join(sorted(flatten(tree))[:3]) or "nothing"
    raise InputError(f"this is no checkpoint of a family that clp_jax knows ({', '.join(FAMILIES)}); it holds {held}.")


def robots() -> dict[str, Robot]:
    """Every robot that some family's upstream knows, by name."""
    return {name: robot for family in FAMILIES.values() for name, robot in family.ROBOTS.items()}


def configurations() -> dict[str, Configuration]:
    """Every configuration that some family's upstream names."""
    return {name: found for family in FAMILIES.values() for name, found in family.CONFIGURATIONS.items()}


def why_unrecorded(configuration: str) -> str | None:
    """Why a configuration that some family's upstream names has no record here; None for names that nobody knows."""
    reasons = [family.UNRECORDED_CONFIGURATIONS.get(configuration) for family in FAMILIES.values()]
    return next(filter(None, reasons), None)


def views(architecture: Architecture, count: int) -> tuple[str, ...]:
    """Names of so many cameras, or of all that there are: the model's own, or made-up ones where it reads any.

    >>> views(pi0.PI0, 2)
    ('base_0_rgb', 'left_wrist_0_rgb')
    >>> views(groot.GROOT_N15, 2)
    ('view_0', 'view_1')
    """
    known = family_of(architecture).camera_names(architecture)
    return tuple(f"view_{i}" for i in range(count)) if known is None else known[:count]


def build(architecture: Architecture, rows: Rows = None) -> Any:
    """The model of an architecture, without parameters; ``rows`` is how a batch is split over devices."""
    return family_of(architecture).build(architecture, rows)


def init_params(architecture: Architecture, rng: jax.Array) -> dict:
    """Freshly initialised parameters, float32."""
    return family_of(architecture).init_params(architecture, rng)


def abstract_params(architecture: Architecture) -> dict:
    """The parameter tree as ``jax.ShapeDtypeStruct``, float32, without allocating anything.

    >>> abstract_params(pi0.PI0)["PaliGemma"]["llm"]["layers"]["attn"]["q_einsum"]["w"].shape
    (18, 8, 2048, 256)
    """
    return jax.tree.map(lambda leaf: leaf, _abstract_params(architecture))  # dicts of the caller's own


@functools.lru_cache(maxsize=64)
def _abstract_params(architecture: Architecture) -> dict:
    """Traced once, which takes a second or more, for commands ask several times."""
    return jax.eval_shape(lambda: init_params(architecture, jax.random.key(0)))  # the key inside: no device is asked


__all__ = [
    "FAMILIES",
    "RELEASED",
    "Architecture",
    "Family",
    "Gates",
    "Lengths",
    "Loss",
    "Remat",
    "Rows",
    "Shape",
    "Stack",
    "Tower",
    "TowerStates",
    "abstract_params",
    "bias_of",
    "blocks_of",
    "build",
    "configurations",
    "family_of",
    "family_of_kind",
    "family_of_tree",
    "init_params",
    "kernels_of",
    "robots",
    "rows_kept",
    "stack_of",
    "towers_measured",
    "views",
    "why_unrecorded",
]
