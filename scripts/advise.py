"""`python scripts/advise.py` is `clp advise`."""

from _launch import launch

launch("advise")
