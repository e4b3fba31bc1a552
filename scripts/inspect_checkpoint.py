"""`python scripts/inspect_checkpoint.py` is `clp inspect`."""

# Not inspect.py: Python puts this folder first on sys.path, where that name would hide its own module inspect.

from _launch import launch

launch("inspect")
