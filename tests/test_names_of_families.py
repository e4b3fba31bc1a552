"""Names of kinds, families and towers stand with their family, nowhere else in the package."""

import ast
from collections.abc import Iterator
from pathlib import Path

import clp_jax
from clp_jax.models import FAMILIES

ROOT = Path(clp_jax.__file__).parent
EXCLUDED = {
    "benchmarks": "each measures one chosen model",
    "export/templates": "programs for another package's users, about one kind each",
    "example": "data and the script that made it",
    **{f"models/{name}": "the family itself" for name in FAMILIES},
}
"""Folders, and why names may stand there."""

ALLOWED = {
    **{("models/__init__.py", name): "the one list of families" for name in FAMILIES},
    ("models/layers/lerobot.py", "action"): "the column of a data set of lerobot",
    ("processing/robots.py", "action"): "the column of a data set of lerobot",
    ("processing/modality.py", "action"): "the column of a data set of lerobot",
    ("processing/policy_files.py", "action"): "the feature in lerobot's statistics",
    ("export/__init__.py", "groot"): "the target, whose code loads the export",
    ("export/groot.py", "groot"): "the same",
    ("commands/inspect.py", "action"): "the unit of a chunk, for people",
}
"""Constants that are one of the names, by file, and why they are there."""


def names() -> set[str]:
    """Of kinds, families, released models and towers."""
    released = [model for family in FAMILIES.values() for model in family.RELEASED.values()]
    found = {tower for model in released for tower in model.depths}
    return found.union(
        FAMILIES, *(family.KINDS for family in FAMILIES.values()), *(f.RELEASED for f in FAMILIES.values())
    )


def literals(source: str) -> Iterator[tuple[int, str]]:
    """Lines and values of string constants; a docstring is never one bare name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def offenders() -> dict[tuple[str, str], int]:
    """Every constant outside the excluded folders that is one of the names, with its line."""
    known, found = names(), {}
    for file in ROOT.rglob("*.py"):
        path = file.relative_to(ROOT).as_posix()
        if not path.startswith(tuple(f"{folder}/" for folder in EXCLUDED)):
            found |= {(path, value): line for line, value in literals(file.read_text()) if value in known}
    return found


def test_no_family_is_known_by_name_outside_of_its_package():
    assert {place: line for place, line in offenders().items() if place not in ALLOWED} == {}


def test_every_exception_is_still_needed():
    assert set(ALLOWED) - set(offenders()) == set()


def test_a_name_as_argument_key_or_default_is_found():
    source = 'def f(tower="vlm"):\n    return {"dit": 1}[tower] == g(x="vision")\n'
    assert {value for _, value in literals(source)} == {"vlm", "dit", "vision"} <= names()
