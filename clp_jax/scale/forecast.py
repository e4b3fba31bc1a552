"""Per chip: memory as the compiler plans it, operations, collectives, and a time that no run can beat."""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax

from clp_jax.operations import Operations, count_operations
from clp_jax.scale.chips import GIB, interconnect
from clp_jax.scale.hlo import Collective, collectives
from clp_jax.scale.programs import Program
from clp_jax.scale.topologies import Topology


@dataclasses.dataclass(frozen=True)
class Forecast:
    """One program on one slice; sizes in bytes on one chip, times in seconds.

    Attributes:
      topology: name of the slice.
      chips: how many it has.
      fsdp_devices: over how many parameters are split.
      model: whose program it is.
      program: which of the task's.
      observations: of one call.
      hbm: what a program may use.
      fits: whether the compiler fits it in.
      needed: all that the program needs: arguments + outputs - aliases + temporaries + code.
      held: of the arguments, by what they are; ``padding`` is what the chip's layouts add to them.
      activations: needed less held: activations, gradients, gathered parameters, results, code.
      memory: the compiler's own numbers; empty if it gave up.
      flops: of matrix products.
      traffic: bytes through the HBM at least: the larger of all arguments and of the parameters at each use, and the
        results.
      collectives: bytes of whole arrays per kind.
      sent: bytes that leave a chip.
      compute_seconds: flops at peak.
      memory_seconds: traffic at full bandwidth.
      network_seconds: sent over all links at full bandwidth.
      problem: why there is no program, if there is none.
    """

    topology: str
    chips: int
    fsdp_devices: int
    model: str
    program: str = ""
    observations: int = 0
    hbm: int = 0
    fits: bool = False
    needed: int = 0
    held: Mapping[str, int] = dataclasses.field(default_factory=dict)
    activations: int = 0
    memory: Mapping[str, int] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    traffic: float = 0.0
    collectives: Mapping[str, int] = dataclasses.field(default_factory=dict)
    sent: float = 0.0
    compute_seconds: float = 0.0
    memory_seconds: float = 0.0
    network_seconds: float = 0.0
    problem: str = ""

    @property
    def free(self) -> int:
        """What is left of the HBM; negative if the program does not fit."""
        return self.hbm - self.needed

    @property
    def bound(self) -> tuple[float, str]:
        """The largest of the three times, and whose it is; a run takes longer, for no chip reaches its peaks."""
        times = {"compute": self.compute_seconds, "HBM": self.memory_seconds, "network": self.network_seconds}
        slowest = max(times, key=lambda name: times[name])
        return times[slowest], slowest

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        seconds, of = self.bound
        return dataclasses.asdict(self) | {"free": self.free, "bound_seconds": seconds, "bound_by": of}


def forecast(program: Program, topology: Topology, model: str, fsdp_devices: int) -> Forecast:
    """Compile a program for a slice and count."""
    held, hbm = dict(program.held), topology.chip.hbm
    operations = count_operations(program.traced.jaxpr, program.is_weight)
    begun = Forecast(
        topology.name, topology.chips, fsdp_devices, model, program.name, program.observations, hbm, held=held
    )
    if sum(held.values()) > hbm:
        whole = sum(held.values())
        return dataclasses.replace(begun, needed=whole, problem=f"the arguments alone are {whole / GIB:.2f} GiB a chip")
    try:
        compiled = program.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = _needed_by(str(error))
        activations = max(needed - sum(held.values()), 0)
        return dataclasses.replace(
            begun, needed=needed, activations=activations, problem=f"the compiler: {str(error).splitlines()[0]}"
        )
    return _counted(begun, topology, program.split, operations, compiled)


def _counted(begun: Forecast, topology: Topology, split: int, operations: Operations, compiled: Any) -> Forecast:
    memory = _memory(compiled)
    needed = memory["argument"] + memory["output"] - memory["alias"] + memory["temp"] + memory["generated_code"]
    held = dict(begun.held) | {"padding": memory["argument"] - sum(begun.held.values())}
    found: list[Collective] = collectives(compiled.as_text())
    payload: collections.Counter[str] = collections.Counter()
    for one in found:
        payload[one.kind] += one.payload * one.times
    sent = sum(one.sent * one.times for one in found)
    chip = topology.chip
    # With the batch split, every chip multiplies with all parameters, wherever they are stored.
    weights = operations.weight_bytes / (1 if split == topology.chips else split)
    traffic = max(memory["argument"], weights) + memory["output"]
    network = interconnect(chip, topology.shape)
    return dataclasses.replace(
        begun,
        fits=needed <= begun.hbm,
        needed=needed,
        held=held,
        activations=needed - memory["argument"],
        memory=memory,
        flops=operations.flops / split,
        traffic=float(traffic),
        collectives=dict(payload),
        sent=float(sent),
        compute_seconds=operations.flops / split / chip.flops,
        memory_seconds=traffic / chip.hbm_bandwidth,
        network_seconds=sent / network if network else 0.0,
    )


def smallest(forecasts: list[Forecast]) -> dict[str, str]:
    """Per model the slice with the fewest chips on which all of its programs fit, where there is one."""
    fits: dict[tuple[str, str], bool] = {}
    chips = {one.topology: one.chips for one in forecasts}
    for one in forecasts:
        fits[one.model, one.topology] = fits.get((one.model, one.topology), True) and one.fits
    found: dict[str, str] = {}
    for (model, topology), good in sorted(fits.items(), key=lambda item: chips[item[0][1]]):
        if good:
            found.setdefault(model, topology)
    return found


def _memory(compiled: Any) -> dict[str, int]:
    plan = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    return {name: getattr(plan, f"{name}_size_in_bytes") for name in names}


def _needed_by(message: str) -> int:
    """What the compiler says it would have needed, in its two wordings; 0 if it does not say."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of", message) or re.search(r"\(([\d.]+)([KMGT])\) exceeds", message)
    return 0 if found is None else int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]])
