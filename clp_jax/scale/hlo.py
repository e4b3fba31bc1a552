"""Collectives in a compiled program, read from its text, loops multiplied out.

A TPU splits one collective into the start, steps and end of an asynchronous fusion, each of which names it; it is
counted once, by its channel.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: name, type of the result, opcode, and what follows the opening bracket."""

    name: str
    result: str
    opcode: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      result: its type in the program's text.
      payload: bytes of the whole array: gathered, or not yet scattered, on one device.
      group: devices that take part together.
      times: how often it runs.
      computation: where it stands.
    """

    kind: str
    result: str
    payload: int
    group: int
    times: int
    computation: str

    @property
    def sent(self) -> float:
        """Bytes that leave a device each time, as the best ring would send them."""
        share = (self.group - 1) / self.group
        return self.payload * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program by name, and the name of the one that is run."""
    found: dict[str, list[Instruction]] = {}
    entry = ""
    current: list[Instruction] = []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = found[head[2]] = []
            entry = head[2] if head[1] else entry
        elif body := _INSTRUCTION.match(line):
            current.append(Instruction(*body.groups()))
    return found, entry


def collectives(text: str) -> list[Collective]:
    """The collectives of a program, from the text of its compiled form."""
    program, entry = computations(text)
    by_channel: dict[str, Collective] = {}
    for computation, times in _runs(program, entry, 1):
        for instruction in program[computation]:
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                found = _collective(instruction, kind, computation, times)
                key = f"{kind} {channel[1] if channel else instruction.name}"
                if key not in by_channel or times > by_channel[key].times:
                    by_channel[key] = found
    return list(by_channel.values())


def trip_count(program: dict[str, list[Instruction]], loop: Instruction) -> int | None:
    """How often the body of a while loop runs; None where only the data knows."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    instructions = program[condition[1]] if condition else []
    limits = [
        int(found[1])
        for x in instructions
        if x.opcode == "constant"
        and x.result.startswith(("s32[]", "u32[]"))
        and (found := re.match(r"(\d+)\)", x.rest))
    ]
    # A scan counts from 0 by 1 while it is below its length; anything else has another form.
    counts = instructions and not any(x.opcode in ("and", "or", "not", "all-reduce") for x in instructions)
    return limits[0] if counts and len(limits) == 1 else None


def size_of(types: str) -> list[int]:
    """Bytes of each array of a type.

    >>> size_of("(bf16[2,3]{1,0:T(8,128)(2,1)}, u32[]{:S(2)})")
    [12, 4]
    """
    return [math.prod(map(int, filter(None, sizes.split(",")))) * _width(name) for name, sizes in _ARRAY.findall(types)]


def _width(name: str) -> int:
    return _BYTES.get(name) or max(int(re.sub(r"\D.*", "", name.lstrip("abcdefghijklmnopqrstuvwxyz")) or 8) // 8, 1)


def _runs(program: dict[str, list[Instruction]], name: str, times: int) -> Iterator[tuple[str, int]]:
    """A computation and those that it calls, with how often each runs."""
    yield name, times
    for instruction in program[name]:
        inner = times
        if instruction.opcode == "while":
            inner = times * (trip_count(program, instruction) or 1)
        if instruction.opcode in ("while", "fusion", "call", "conditional", "async-start"):
            called = _CALLED.findall(instruction.rest)
            if branches := re.search(r"branch_computations=\{([^}]*)\}", instruction.rest):
                called += [branch.strip().lstrip("%") for branch in branches[1].split(",")]
            for computation in called:
                yield from _runs(program, computation, inner)


def _collective(instruction: Instruction, kind: str, computation: str, times: int) -> Collective:
    sizes = size_of(instruction.result)
    if instruction.opcode == "collective-permute-start":
        sizes = sizes[:1]
    elif instruction.opcode == "all-gather-start":  # what goes in, then what comes out
        sizes = sizes[len(sizes) // 2 :]
    group = _group(instruction.rest)
    if computation.startswith("all-reduce-scatter"):  # how a TPU writes it: an all-reduce of which a slice is kept
        kind = "reduce-scatter"
    elif kind == "reduce-scatter":
        sizes = [size * group for size in sizes]
    return Collective(kind, instruction.result, sum(sizes), group, times, computation)


def _group(rest: str) -> int:
    """Devices of a group, in any of the three ways in which groups are written."""
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\](?:\([^)]*\))? \{([^}]*)\}", rest):
        lengths = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(lengths[axis]) for axis in re.findall(r"'(\w+)'", axes[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([^}]*)\}", rest):
        return listed[1].count(",") + 1
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
    return pairs[1].count("{") if pairs else 1
