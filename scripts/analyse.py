"""`python scripts/analyse.py` is `clp analyse`."""

from _launch import launch

launch("analyse")
