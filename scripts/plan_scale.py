"""`python scripts/plan_scale.py` is `clp plan-scale`."""

from _launch import launch

launch("plan-scale")
