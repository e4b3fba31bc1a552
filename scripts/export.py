"""`python scripts/export.py` is `clp export`."""

from _launch import launch

launch("export")
