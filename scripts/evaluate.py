"""`python scripts/evaluate.py` is `clp evaluate`."""

import sys

from _launch import launch

if __name__ == "__main__":  # the simulators' processes import this file too
    sys.exit(launch("evaluate"))
