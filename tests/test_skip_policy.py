"""The policy on skips, tried on small test files."""

import pytest
from skip_policy import SkipPolicy

FUNCTIONS = """
import pytest

def test_vague():
    pytest.skip("not today")

def test_needs_what_ci_lacks():
    pytest.skip("needs openpi: pip install it from its repository")

@pytest.mark.skip(reason="needs hypothesis")
def test_needs_what_ci_has():
    pass

@pytest.mark.xfail(reason="known")
def test_expected_failure():
    assert False
"""


def run(pytester: pytest.Pytester, *words: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *words, plugins=[SkipPolicy()])


@pytest.mark.parametrize(
    ("ci", "outcomes"),
    [("true", {"failed": 1, "errors": 1, "skipped": 1, "xfailed": 1}), ("", {"failed": 1, "skipped": 2, "xfailed": 1})],
)
def test_a_skip_needs_a_reason_that_ci_accepts(pytester, monkeypatch, ci, outcomes):
    monkeypatch.setenv("CI", ci)
    pytester.makepyfile(FUNCTIONS)
    result = run(pytester)
    assert result.parseoutcomes() == outcomes
    result.stdout.fnmatch_lines("*a skip says what is missing*not 'not today'*")
    assert ("CI has what this skip says is missing" in result.stdout.str()) == (ci == "true")


def test_what_a_job_installs_is_no_excuse_there(pytester, monkeypatch):
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("CI_HAS", "torch,openpi")
    pytester.makepyfile("import pytest\npytest.skip('needs openpi', allow_module_level=True)\n")
    assert run(pytester).parseoutcomes() == {"errors": 1}


@pytest.mark.parametrize(("reason", "outcome"), [("", "errors"), (", reason='needs openpi'", "skipped")])
def test_a_whole_module_is_held_to_the_same(pytester, monkeypatch, reason, outcome):
    monkeypatch.setenv("CI", "true")
    pytester.makepyfile(f"import pytest\npytest.importorskip('no_such_package'{reason})\n")
    assert run(pytester).parseoutcomes() == {outcome: 1}


def test_so_is_a_doctest(pytester):
    pytester.makepyfile('"""\n>>> 1  # doctest: +SKIP\n2\n"""\n')
    assert run(pytester, "--doctest-modules").parseoutcomes() == {"failed": 1}
