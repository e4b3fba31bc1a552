"""`python scripts/benchmark.py` is `clp benchmark`."""

import sys

from _launch import launch

sys.exit(launch("benchmark"))
