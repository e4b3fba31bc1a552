"""`python scripts/check.py` is `clp check`."""

from _launch import launch

launch("check")
