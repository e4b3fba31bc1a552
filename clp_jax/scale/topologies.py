"""Slices of TPUs by name, as devices that programs can be compiled for and not run on."""

import dataclasses
import math
import os
import re
from typing import Any

import jax

from clp_jax.errors import InputError
from clp_jax.scale.chips import CHIPS, CPU, Chip

_USUAL = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
}
"""Shapes that Google rents out, from 1 chip to 256 (v5p's single chip only shows what one would hold)."""

_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask Google's metadata server, which is not here
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling takes no chip away from another process
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
"""Only set where the user has not; without the last four libtpu fills the screen."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice.

    Attributes:
      name: ``v5e:4x4``.
      chip: what it is made of.
      shape: chips along each axis.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


def parse(name: str) -> Topology:
    """The slice of that name.

    Args:
      name: ``v5e:4x4``, ``v5p:2x4x4``, Google's ``v5e-16``, ``v6e-256``, ``v5p-64`` (which counts two cores a chip), or
        ``cpu:8``.

    Raises:
      InputError: there is no such slice.

    >>> parse("v5p-64").name, parse("v6e-8").name, parse("v5e:2x4").chips
    ('v5p:2x4x4', 'v6e:2x4', 8)
    """
    generation, separator, rest = re.sub(r"^v5litepod\b", "v5e", name.lower()).partition(":" if ":" in name else "-")
    if generation == "cpu" and separator == ":" and re.fullmatch(r"[1-9]\d{0,2}", rest):
        return Topology(name, CPU, (int(rest),))
    chip = CHIPS.get(generation)
    if chip is None:
        raise InputError(f"--topology {name} is of no known kind; the kinds are {', '.join(CHIPS)} (and cpu:8).")
    usual = _USUAL[chip.dimensions]
    if separator == "-":
        counts = {math.prod(_sizes(shape)) * (2 if generation == "v5p" else 1): shape for shape in usual}
        if not rest.isdigit() or int(rest) not in counts:
            known = ", ".join(f"{generation}-{count}" for count in counts)
            raise InputError(f"--topology {name} is no slice; there are {known}.")
        rest = counts[int(rest)]
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{chip.dimensions - 1}}}", rest):
        raise InputError(f"--topology {name} is no slice of {generation}; write it as {generation}:{usual[3]}.")
    return Topology(f"{generation}:{rest}", chip, _sizes(rest))


def usual_names(generation: str) -> tuple[str, ...]:
    """The slices of a kind from one chip to 256."""
    return tuple(f"{generation}:{shape}" for shape in _USUAL[CHIPS[generation].dimensions])


def devices_of(topology: Topology) -> list[Any]:
    """The chips, in the order in which JAX lists those of a real slice.

    Raises:
      InputError: the TPU compiler is not installed, or knows no such slice.
    """
    if topology.chip is CPU:
        found = jax.devices("cpu")
        if len(found) < topology.chips:
            raise InputError(f"{topology.name}: this process has {len(found)} CPU devices; see --topology in --help.")
        return list(found[: topology.chips])
    for key, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise InputError('the TPU compiler is not installed: pip install "jax[tpu]" (no TPU is needed).') from None
    from jax.experimental import topologies

    # A host has 2 x 2 chips unless it is told; smaller slices are a part of one.
    bounds = [min(size, 2) for size in topology.shape] + [1]
    bounds = (bounds[0], bounds[1], 1)
    try:
        return list(topologies.get_topology_desc(topology.name, "tpu", chips_per_host_bounds=bounds).devices)
    except jax.errors.JaxRuntimeError as error:
        usual = ", ".join(usual_names(topology.name.split(":")[0]))
        raise InputError(f"{topology.name}: {str(error).splitlines()[0]}. The usual slices are {usual}.") from None


def _sizes(shape: str) -> tuple[int, ...]:
    return tuple(int(size) for size in shape.split("x"))
