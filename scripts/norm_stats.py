"""`python scripts/norm_stats.py` is `clp norm-stats`."""

import sys

from _launch import launch

sys.exit(launch("norm-stats"))
