"""What stands around the code agrees with it: workflows, issue forms, citation, packages."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from clp_jax.version import __version__

ROOT = Path(__file__).parent.parent
YAML = [
    *ROOT.glob(".github/**/*.yml"),
    ROOT / "CITATION.cff",
]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("file", YAML, ids=lambda file: file.name)
def test_yaml_can_be_read(file):
    assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)


def test_workflows_run_the_targets_of_ci():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    called = {entry["target"] for entry in workflow["jobs"]["make"]["strategy"]["matrix"]["include"]}
    stages = set(re.findall(r"^ *stage (\S+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE))
    assert called == stages
    assert called <= targets()
    assert "test-nightly" in targets()
    assert "make test-nightly" in (ROOT / ".github/workflows/nightly.yml").read_text()


def test_issue_forms_have_what_github_asks_for():
    for file in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"):
        form = yaml.safe_load(file.read_text())
        if file.name != "config.yml":
            assert {"name", "description", "body"} <= form.keys()
            assert all({"type", "attributes"} <= part.keys() and "label" in part["attributes"] for part in form["body"])


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == __version__


def test_every_target_of_make_is_described_and_phony():
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    described = set(re.findall(r"^([a-z-]+):.* ## ", makefile, re.MULTILINE))
    assert phony == described == targets()


def test_the_packages_say_that_they_are_typed_and_the_sdist_has_what_the_readme_links_to():
    for package in ("clp_jax", "openpi_patches"):
        assert (ROOT / package / "py.typed").exists()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    links = re.findall(r"\]\(([\w./-]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert all(any(f"/{link}".startswith(place) for place in included) for link in links)


def test_the_changelog_has_a_heading_of_this_version_and_dates_in_order():
    headings = re.findall(
        r"^## \[(.*?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == __version__
    dates = [date for _, date in headings[1:]]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates) and dates == sorted(dates, reverse=True)
