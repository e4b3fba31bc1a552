"""`python scripts/analyse.py` is `clp analyse`."""

import sys

from _launch import launch

sys.exit(launch("analyse"))
