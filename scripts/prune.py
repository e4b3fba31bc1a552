"""`python scripts/prune.py` is `clp prune`."""

import sys

from _launch import launch

sys.exit(launch("prune"))
