"""`python scripts/norm_stats.py` is `clp norm-stats`."""

from _launch import launch

launch("norm-stats")
