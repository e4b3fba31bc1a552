"""Packages that we are measured beside, where they are installed."""

import importlib
from types import ModuleType


def optional(name: str) -> ModuleType | None:
    """A peer's module; None where the package is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
