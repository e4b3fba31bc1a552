"""`python scripts/finetune.py` is `clp finetune`."""

import sys

from _launch import launch

sys.exit(launch("finetune"))
