"""pyproject.toml, from which uv installs, names what the requirements files name for pip."""

import re
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.text

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins(text):
    """The pins of a requirements file, without its comments and the files that it includes."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("-")]


def test_pins_by_hand():
    text = "-r other.txt\n\n# a comment\none==1.0\ntwo==2.0  # why 2.0\n"
    assert pins(text) == ["one==1.0", "two==2.0"]


def test_the_dependencies_are_the_requirements():
    wanted = pins((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    assert len(wanted) == 4
    assert PYPROJECT["project"]["dependencies"] == wanted


def test_the_groups_are_the_requirements_for_development():
    text = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")
    assert "-r requirements.txt" in text.splitlines()
    groups = PYPROJECT["dependency-groups"]
    assert list(groups) == ["tests", "tools", "environments"]
    assert [pin for group in groups.values() for pin in group] == pins(text)


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_is_one_exact_version(name):
    for pin in pins((ROOT / name).read_text(encoding="utf-8")):
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", pin)


def test_the_minimum_of_python_is_that_of_the_readme_and_of_ruff():
    assert PYPROJECT["project"]["requires-python"] == ">=3.11"
    assert "Python 3.11" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py311"


def test_nothing_is_built_and_a_plain_run_needs_no_group():
    assert "build-system" not in PYPROJECT
    assert PYPROJECT["tool"]["uv"] == {"package": False, "default-groups": []}


PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "docs/results/README.md"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_tests_that_a_page_names_exist(page):
    sources = [path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*.py")]
    known = set(re.findall(r"^def (test_\w+)", "\n".join(sources), re.MULTILINE))
    known |= {path.stem for path in ROOT.glob("tests/*.py")}
    named = set(re.findall(r"\btest_\w+", page.read_text(encoding="utf-8")))
    assert named <= known


def test_the_links_of_the_pages_lead_to_files():
    files = []
    for page in PAGES:
        links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        files += [page.parent / link for link in links if "://" not in link]
    assert len(files) > 20
    assert [path for path in files if not path.exists()] == []


def test_the_lengths_in_the_details_are_those_of_the_files():
    details = " ".join((ROOT / "docs/details.md").read_text(encoding="utf-8").split())
    for script in ("vanilla_pg", "is_pg", "trpo", "ppo"):
        lines = (ROOT / f"{script}.py").read_text(encoding="utf-8").splitlines()
        assert f"{len(lines)} (`{script}.py`)" in details
    common = [path.read_text(encoding="utf-8") for path in ROOT.glob("common/*.py")]
    lines = sum(len(text.splitlines()) for text in common)
    assert f"(`ppo.py`) and {lines}." in details
    assert f"({lines} lines)" in (ROOT / "README.md").read_text(encoding="utf-8")
