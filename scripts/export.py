"""`python scripts/export.py` is `clp export`."""

import sys

from _launch import launch

sys.exit(launch("export"))
