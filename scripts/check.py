"""`python scripts/check.py` is `clp check`."""

import sys

from _launch import launch

sys.exit(launch("check"))
