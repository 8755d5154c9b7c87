"""What docs/faults_of_others.md names is there: tests, and threads at the address of their link."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "faults_of_others.md").read_text(encoding="utf-8")
TABLE = re.findall(r"^\| (.+?) \| (\[.+?) \| (.+?) \|$", TEXT, re.MULTILINE)
TESTS = sorted(set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", TEXT)))


def test_every_row_has_a_fault_threads_and_one_test():
    rows = [line for line in TEXT.splitlines() if line.startswith("| ")]
    heads = [line for line in rows if line == "| bug | where | test that catches it here |"]
    assert len(TABLE) == len(rows) - len(heads) >= 20
    assert len({fault for fault, _, _ in TABLE}) == len(TABLE)
    for _, _, test in TABLE:
        assert re.fullmatch(r"`test_\w+\.py::test_\w+`", test), test


@pytest.mark.parametrize(("file", "function"), TESTS)
def test_a_test_that_is_named_exists(file, function):
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {function}\(", source, re.MULTILINE)


def test_a_link_leads_to_what_it_names():
    links = re.findall(r"\[([\w.-]+/[\w.-]+)#(\d+)\]\(([^)\s]+)\)", TEXT)
    assert len(links) == TEXT.count("https://")
    for repository, number, address in links:
        kind = r"(issues|pull)"
        assert re.fullmatch(rf"https://github\.com/{repository}/{kind}/{number}", address), address
