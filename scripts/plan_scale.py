"""`python scripts/plan_scale.py` is `clp plan-scale`."""

import sys

from _launch import launch

sys.exit(launch("plan-scale"))
