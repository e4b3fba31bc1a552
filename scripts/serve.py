"""`python scripts/serve.py` is `clp serve`."""

import sys

from _launch import launch

sys.exit(launch("serve"))
