"""`python scripts/serve.py` is `clp serve`."""

from _launch import launch

launch("serve")
