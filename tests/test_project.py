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
