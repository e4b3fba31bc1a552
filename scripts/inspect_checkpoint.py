"""`python scripts/inspect_checkpoint.py` is `clp inspect`."""

# Not inspect.py: Python puts this folder first on sys.path, where that name would hide its own module inspect.

import sys

from _launch import launch

sys.exit(launch("inspect"))
