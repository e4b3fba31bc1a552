"""A test cannot pass by not running: a skip names what it needs, and CI fails one that needs what CI installs."""

import os
import re

import pytest

CI_LACKS = ("openpi", "openpi_client", "torch", "lerobot", "metaworld", "gym_aloha", "libero", "an accelerator")
"""What CI does not install. A test may be skipped there for the want of these, and of nothing else.

A job that does install some of them says so in ``$CI_HAS`` (``torch,lerobot``): there they are no excuse.
"""


class SkipPolicy:
    """A plugin and not hooks of conftest.py, which would not see the doctests of clp_jax/."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        return _checked((yield))

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self):
        return _checked((yield))


def _checked(report):
    if report.skipped and not hasattr(report, "wasxfail"):
        path, line, reason = report.longrepr
        complaint = _complaint(reason.removeprefix("Skipped: "), in_ci=os.environ.get("CI") == "true")
        if complaint:
            report.outcome = "failed"
            report.longrepr = f"{path}:{line}: {complaint}"
    return report


def _complaint(reason: str, *, in_ci: bool) -> str | None:
    if not reason.startswith("needs "):
        return f"a skip says what is missing ('needs openpi', not '{reason}')"
    has = tuple(name for name in os.environ.get("CI_HAS", "").split(",") if name)
    lacks = "|".join(name for name in CI_LACKS if name not in has)
    if in_ci and not re.match(rf"needs ({lacks})\b", reason):
        return f"CI has what this skip says is missing ('{reason}'); if not, add it to CI_LACKS in skip_policy.py"
    return None
