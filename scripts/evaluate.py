"""`python scripts/evaluate.py` is `clp evaluate`."""

from _launch import launch

if __name__ == "__main__":  # the simulators' processes import this file too
    launch("evaluate")
