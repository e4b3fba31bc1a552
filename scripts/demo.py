"""`python scripts/demo.py` is `clp demo`."""

import sys

from _launch import launch

sys.exit(launch("demo"))
