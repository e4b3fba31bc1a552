"""`python scripts/finetune.py` is `clp finetune`."""

from _launch import launch

launch("finetune")
