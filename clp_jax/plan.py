"""The editable plan: which blocks of every tower stay, and why.

Blocks are numbered from 0. A plan says for each tower the depth *before* pruning and the sorted indices that are kept;
a tower that the plan does not name stays as it is. A person may open the file, edit ``keep`` and prune again.
Reading is strict: what cannot be meant is an error that names the tower and the index. Keys that begin with "_" are
comments.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clp_jax.editable_json import json_object, typed, write_json
from clp_jax.errors import InputError
from clp_jax.files import read_json

SCHEMA = 1
_DEEPEST = 10_000
"""Blocks; a plan that claims more would be worked on for ever."""
_ABOUT = "Edit 'keep': the 0-based blocks that stay. Towers of one 'coupled' group keep the same blocks."
_REQUIRED = ("schema", "kind", "towers")
_OPTIONAL = ("coupled", "criterion", "scores", "notes")


@dataclass(frozen=True)
class TowerPlan:
    """Depth of one tower before pruning and the blocks that stay.

    Attributes:
      depth: number of blocks before pruning, at least 1.
      keep: 0-based indices of the blocks that stay: sorted, without repetition, at least one.

    >>> TowerPlan(depth=4, keep=(0, 3)).removed
    (1, 2)
    """

    depth: int
    keep: tuple[int, ...]

    def __post_init__(self):
        if not 1 <= self.depth <= _DEEPEST:
            raise InputError(f"depth is {self.depth}; a tower has at least one block and at most {_DEEPEST:,}")
        if not self.keep:
            raise InputError("keep is empty; at least one block must stay")
        for index in self.keep:
            if not 0 <= index < self.depth:
                raise InputError(f"keep names block {index}, but the blocks are numbered 0 to {self.depth - 1}")
        for before, after in zip(self.keep, self.keep[1:], strict=False):
            if before == after:
                raise InputError(f"keep names block {after} twice")
            if before > after:
                raise InputError(f"keep names block {after} after block {before}; sort the list")

    @property
    def removed(self) -> tuple[int, ...]:
        """The blocks that go, sorted."""
        return tuple(sorted(set(range(self.depth)) - set(self.keep)))


@dataclass(frozen=True)
class PrunePlan:
    """Which blocks of every tower of a model stay.

    Attributes:
      kind: model kind, for example "pi0", "pi05" or "pi0_fast".
      towers: tower name ("vision", "vlm", "action") to its plan.
      coupled: groups of towers that must keep the same blocks, for example ``(("vlm", "action"),)``.
      criterion: how the blocks were chosen; "manual" for a person.
      scores: what the criterion says about each group of towers (JSON values), for the reader and the report.
      notes: free text.
    """

    kind: str
    towers: dict[str, TowerPlan]
    coupled: tuple[tuple[str, ...], ...] = ()
    criterion: str = "manual"
    scores: dict[str, Any] = field(default_factory=dict)
    notes: str = ""

    def __post_init__(self):
        if not self.kind:
            raise InputError("the plan has an empty 'kind'; name the model kind, for example \"pi0\"")
        for group in self.coupled:
            for name in group:
                if name not in self.towers:
                    raise InputError(f"the plan couples tower {name!r}, but has no such tower; add it or uncouple it")
            for name in group[1:]:
                _check_coupled(group[0], self.towers[group[0]], name, self.towers[name])
        try:
            json.dumps(self.scores, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"the plan's scores are no JSON values ({error}); use numbers, text and null") from None

    @classmethod
    def of(
        cls,
        kind: str,
        depths: Mapping[str, int],
        keep: Mapping[str, Sequence[int]] | None = None,
        *,
        coupled: tuple[tuple[str, ...], ...] = (),
        criterion: str = "manual",
        scores: dict[str, Any] | None = None,
    ) -> "PrunePlan":
        """Returns the plan for a model with ``depths``; towers that ``keep`` does not name keep every block.

        >>> plan = PrunePlan.of("pi0", {"vlm": 3, "action": 3}, {"vlm": [0, 2], "action": [0, 2]})
        >>> plan.removed("vlm"), plan.is_identity
        ((1,), False)
        """
        keep = keep or {}
        for name in keep:
            if name not in depths:
                raise InputError(f"the model has no tower {name!r}; its towers are {_listed(depths)}")
        towers = {name: _tower(name, depth, list(keep.get(name, range(depth)))) for name, depth in depths.items()}
        return cls(kind, towers, coupled, criterion, scores or {})

    def removed(self, tower: str) -> tuple[int, ...]:
        """Returns the blocks of ``tower`` that go, sorted; none for a tower that the plan does not name."""
        return self.towers[tower].removed if tower in self.towers else ()

    @property
    def is_identity(self) -> bool:
        """Whether every block of every tower stays."""
        return not any(tower.removed for tower in self.towers.values())

    def check_against(self, depths: Mapping[str, int]) -> None:
        """Checks that the plan was made for a model with these depths.

        Args:
          depths: tower name to number of blocks, read from the model.

        Raises:
          InputError: the model lacks a tower of the plan, or has it at another depth.
        """
        for name, tower in self.towers.items():
            if name not in depths:
                raise InputError(f"the plan prunes tower {name!r}, but the model's towers are {_listed(depths)}")
            if tower.depth != depths[name]:
                raise InputError(
                    f"the plan is for a {name!r} tower of {tower.depth} blocks, but the model's has {depths[name]}; "
                    "use this checkpoint's own plan or analyse it again"
                )

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON values; `from_json` is its inverse."""
        return {
            "schema": SCHEMA,
            "_about": _ABOUT,
            "kind": self.kind,
            "criterion": self.criterion,
            "towers": {name: {"depth": t.depth, "keep": list(t.keep)} for name, t in self.towers.items()},
            "coupled": [list(group) for group in self.coupled],
            "scores": self.scores,
            "notes": self.notes,
        }

    @classmethod
    def from_json(cls, data: Any) -> "PrunePlan":
        """Reads a plan from JSON values, strictly.

        Args:
          data: what `to_json` returns; keys beginning with "_" are ignored.

        Raises:
          InputError: a key is missing or unknown, a type is wrong, or the indices make no plan.
        """
        data = json_object(data, "the plan", _REQUIRED, _OPTIONAL)
        if typed(data["schema"], int, "schema") != SCHEMA:
            raise InputError(f"the plan has schema {data['schema']!r}; this version reads schema {SCHEMA}")
        towers = {}
        for name, value in typed(data["towers"], dict, "towers").items():
            tower = json_object(value, f"tower {name!r}", ("depth", "keep"))
            towers[name] = _tower(name, tower["depth"], tower["keep"])
        groups = [typed(group, list, "coupled") for group in typed(data.get("coupled", []), list, "coupled")]
        return cls(
            kind=typed(data["kind"], str, "kind"),
            towers=towers,
            coupled=tuple(tuple(typed(name, str, "coupled") for name in group) for group in groups),
            criterion=typed(data.get("criterion", "manual"), str, "criterion"),
            scores=typed(data.get("scores", {}), dict, "scores"),
            notes=typed(data.get("notes", ""), str, "notes"),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as a file that is pleasant to edit; the file appears complete or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PrunePlan":
        """Reads the plan that `save` wrote and a person may have edited; an `InputError` names the file."""
        value = read_json(path, finite=True)
        try:
            return cls.from_json(value)
        except InputError as error:
            raise InputError(f"{os.fspath(path)}: {error}") from None


def compose(first: PrunePlan, then: PrunePlan) -> PrunePlan:
    """Returns the one plan that does what ``first``, and ``then`` on its result, do together.

    The composed indices are those of the model before ``first``. A group stays coupled when both plans keep it coupled
    (a plan that names none of its towers does). Scores are kept as ``{"first": ..., "then": ...}``, each about the
    blocks that its own plan saw.

    Args:
      first: plan that was applied to the original model.
      then: plan made for the model that ``first`` left.

    Raises:
      InputError: the plans are for different kinds, or ``then`` expects another depth than ``first`` leaves.

    >>> p = PrunePlan("pi0", {"vlm": TowerPlan(6, (0, 2, 3, 5))})
    >>> q = PrunePlan("pi0", {"vlm": TowerPlan(4, (0, 3))})
    >>> compose(p, q).towers["vlm"]
    TowerPlan(depth=6, keep=(0, 5))
    """
    if first.kind != then.kind:
        raise InputError(f"cannot prune a {first.kind!r} checkpoint by a plan for {then.kind!r}; make one for its kind")
    towers = first.towers | then.towers
    for name in (name for name in first.towers if name in then.towers):
        before, after = first.towers[name], then.towers[name]
        if after.depth != len(before.keep):
            raise InputError(
                f"the checkpoint's {name!r} tower was already pruned to {len(before.keep)} blocks, but the plan is for "
                f"{after.depth}; analyse the pruned checkpoint or write a plan for it"
            )
        towers[name] = TowerPlan(before.depth, tuple(before.keep[index] for index in after.keep))
    groups = dict.fromkeys(first.coupled + then.coupled)
    coupled = tuple(group for group in groups if _keeps_coupled(first, group) and _keeps_coupled(then, group))
    if first.is_identity or then.is_identity:
        why = then if first.is_identity else first
        return PrunePlan(first.kind, towers, coupled, why.criterion, why.scores, why.notes)
    scores = {"first": first.scores, "then": then.scores} if first.scores or then.scores else {}
    notes = "\n".join(text for text in (first.notes, then.notes) if text)
    return PrunePlan(first.kind, towers, coupled, f"{first.criterion}, then {then.criterion}", scores, notes)


def check_period(keep: Sequence[int], period: int, tower: str, *, depth: int) -> None:
    """Checks that every kept block is of the kind that its new place has.

    In a tower whose blocks alternate between ``period`` kinds, the kind of a block follows from its number: kept block
    j must satisfy ``keep[j] % period == j % period``. Then every loader that builds the shorter tower by the same rule
    builds it right.

    Args:
      keep: 0-based indices of the blocks that stay, sorted.
      period: kinds that alternate; 1 allows every list.
      tower: its name, for the message.
      depth: number of blocks before pruning.

    Raises:
      InputError: names the first block that cannot take its place, and which could.

    >>> check_period([0, 1, 4, 5, 8, 11], 2, "dit", depth=16)
    >>> check_period([0, 3, 5], 2, "dit", depth=16)
    Traceback (most recent call last):
    clp_jax.errors.InputError: tower 'dit': block 5 cannot take place 2, because its blocks alternate between 2 kinds;
    keep 4 instead, or keep 6 instead, or also keep 4, or leave out 5
    """
    for place, block in enumerate(keep):
        if not _fits([block], period, place):
            ways = ", or ".join(_ways(list(keep), place, period, depth))
            raise InputError(
                f"tower {tower!r}: block {block} cannot take place {place}, because its blocks alternate between "
                f"{period} kinds; {ways}"
            )


def _fits(blocks: Sequence[int], period: int, first: int = 0) -> bool:
    return all(block % period == place % period for place, block in enumerate(blocks, first))


def _ways(keep: list[int], place: int, period: int, depth: int) -> list[str]:
    """Edits at a place after which the block there fits: those that need no other, if there are any."""
    before, block, after = keep[:place], keep[place], keep[place + 1 :]
    between = range((before or [-1])[-1] + 1, (after or [depth])[0])
    fitting = [other for other in between if _fits([other], period, place)]
    below, above = [x for x in fitting if x < block][-1:], [x for x in fitting if x > block][:1]
    ways = {f"keep {other} instead": [*before, other, *after] for other in [*below, *above]}
    ways |= {f"also keep {other}": [*before, other, block, *after] for other in below}
    ways |= {f"leave out {block}": [*before, *after]}
    return [way for way, edited in ways.items() if edited and _fits(edited, period)] or list(ways)


def _tower(name: str, depth: Any, keep: Any) -> TowerPlan:
    """The tower's plan; every complaint names the tower."""
    where = f"tower {name!r}"
    typed(depth, int, f"{where}: depth")
    indices = [typed(index, int, f"{where}: every index in keep") for index in typed(keep, list, f"{where}: keep")]
    try:
        return TowerPlan(depth, tuple(indices))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _check_coupled(name: str, tower: TowerPlan, other_name: str, other: TowerPlan) -> None:
    pair = f"towers {name!r} and {other_name!r} are coupled"
    if tower.depth != other.depth:
        raise InputError(f"{pair}, but have {tower.depth} and {other.depth} blocks; correct the depths or uncouple")
    different = sorted(set(tower.keep) ^ set(other.keep))
    if different:
        keeper = name if different[0] in tower.keep else other_name
        raise InputError(f"{pair}, but only {keeper!r} keeps block {different[0]}; give both the same list")


def _keeps_coupled(plan: PrunePlan, group: tuple[str, ...]) -> bool:
    return group in plan.coupled or not any(name in plan.towers for name in group)


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, names))
