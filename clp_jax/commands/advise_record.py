"""What ``clp advise`` has written down, and reads again when it goes on."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from clp_jax.advising import Candidate, Trial
from clp_jax.advising.costs import Cost
from clp_jax.editable_json import write_json
from clp_jax.errors import InputError, blamed_on
from clp_jax.files import parse_json, read_json_object
from clp_jax.training.resumption import Entry, check_same_run

SETTINGS = "advise.json"
"""What was read and asked, the candidates and the costs that were measured: what --resume needs beside the trials."""
_SCHEMA = 2
"""Of that file. The first had none: its rungs were pieces of one run, whose losses are not comparable with these."""
_OR_ELSEWHERE = "begin in another --out"
_MAY_CHANGE = ("out", "resume", "overwrite", "json", "tolerance", "workers")

Costs = dict[str, Cost]
"""By depth."""


def write_settings(folder: Path, entry: Entry, candidates: Sequence[Candidate], costs: Costs) -> None:
    """Write down what was read and asked, what is to be tried, and what it costs."""
    measured = {depth: dataclasses.asdict(cost) for depth, cost in costs.items()}
    tried = [one.to_json() for one in candidates]
    write_json(folder / SETTINGS, entry.to_json() | {"schema": _SCHEMA, "candidates": tried, "costs": measured})


def check_same(folder: Path, entry: Entry, console: Console) -> None:
    """See that a command that is resumed was begun with the same inputs and flags, and note what differs all the same.

    Raises:
      InputError: it was not, or by another version whose trials cannot be compared.
    """
    if (file := folder / SETTINGS).exists():
        with blamed_on(file, _OR_ELSEWHERE):
            before = read_json_object(file)
            if before.get("schema") != _SCHEMA:
                raise InputError(
                    f"{file} was begun by another version of clp advise, whose trials are trained otherwise and cannot "
                    f"be compared with new ones; {_OR_ELSEWHERE}."
                )
            note = check_same_run(before, entry, may_change=_MAY_CHANGE, defaults={})
        if note is not None:
            console.print(f"[yellow]note:[/] {escape(note)}")


def known_candidates(folder: Path) -> list[Candidate]:
    """Those of the command that is resumed, if they were written down: another analysis might choose other blocks."""
    file = folder / SETTINGS
    if not file.exists():
        return []
    with blamed_on(file, _OR_ELSEWHERE):
        return [Candidate.from_json(one) for one in read_json_object(file).get("candidates", [])]


def known_costs(folder: Path) -> Costs:
    """Those of the command that is resumed; empty if they were not measured yet."""
    file = folder / SETTINGS
    if not file.exists():
        return {}
    with blamed_on(file, _OR_ELSEWHERE):
        return {depth: Cost(**cost) for depth, cost in read_json_object(file)["costs"].items()}


def read_trial(line: bytes, where: str) -> Trial:
    """The trial of a line.

    Raises:
      InputError: it is damaged; says what to do.
    """
    todo = "remove the line, and the trial will run again"
    with blamed_on(where, todo):
        value = parse_json(line, where, todo=todo)
        losses = (math.nan if loss is None else float(loss) for loss in value["losses"])
        return Trial(**value | {"losses": tuple(losses)})
