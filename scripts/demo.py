"""`python scripts/demo.py` is `clp demo`."""

from _launch import launch

launch("demo")
