"""`python scripts/prune.py` is `clp prune`."""

from _launch import launch

launch("prune")
