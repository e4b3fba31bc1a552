"""`python scripts/benchmark.py` is `clp benchmark`."""

from _launch import launch

launch("benchmark")
