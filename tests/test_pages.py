"""Tables of pages are written anew by the commands above them."""

import subprocess
from pathlib import Path

import pytest

from tools import pages

ROOT = Path(__file__).parents[1]
COMMAND = '<!-- python -m tools.plot docs/results/weightings/CartPole-v1 --table --output "" -->'
FAILS = "<!-- python -m tools.plot nothing --table -->"


@pytest.mark.slow
def test_a_table_is_replaced_and_the_rest_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = tmp_path / "page.md"
    page.write_text(
        f"Before\n\n{COMMAND}\n\n| old |\n| --- |\n\nAfter | this\n\n| other |\n", encoding="utf-8"
    )
    pages.main(pages.Args([str(page)]))
    first = page.read_text(encoding="utf-8")
    head, table = first.split(COMMAND)
    lines = table.split("\n\nAfter | this\n\n| other |\n")[0].strip().splitlines()
    assert head == "Before\n\n"
    assert lines[0].startswith("| environment | steps | `is_pg --weighting per-decision` |")
    assert lines[2].startswith("| CartPole-v1 | 200,000 | 500 (")
    assert len(lines) == 3
    pages.main(pages.Args([str(page)]))
    assert page.read_text(encoding="utf-8") == first


@pytest.mark.slow
def test_a_table_that_is_not_there_yet_is_put_in(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = tmp_path / "page.md"
    page.write_text(f"{COMMAND}\n\nAfter\n", encoding="utf-8")
    pages.main(pages.Args([str(page)]))
    assert page.read_text(encoding="utf-8").count("\n|") == 3
    assert page.read_text(encoding="utf-8").endswith("|\n\nAfter\n")


@pytest.mark.slow
def test_a_table_has_the_letters_of_the_runs_wherever_it_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    run, page = tmp_path / "run", tmp_path / "page.md"
    run.mkdir()
    config = '{"script": "ppo", "args": {"env_id": "Pôle-λ-v1"}}'
    (run / "config.json").write_text(config, encoding="utf-8")
    (run / "metrics.csv").write_text("step,episodes,return_last100\n8,1,5\n", encoding="utf-8")
    page.write_text(
        f'<!-- python -m tools.plot {run} --table --output "" -->\n\n', encoding="utf-8"
    )
    pages.main(pages.Args([str(page)]))
    assert "| Pôle-λ-v1 | 8 | 5 |\n" in page.read_text(encoding="utf-8")


@pytest.fixture
def left_alone(tmp_path, monkeypatch, capsys):
    """Check that a page with this comment is refused with these words, and stays as it is."""
    monkeypatch.chdir(ROOT)

    def check(comment, words):
        page = tmp_path / "page.md"
        page.write_text(text := f"{comment}\n\n| old |\n", encoding="utf-8")
        with pytest.raises(SystemExit) as stop:
            pages.main(pages.Args([str(page)]))
        assert stop.value.code == 1
        assert words in capsys.readouterr().err
        assert page.read_text(encoding="utf-8") == text

    return check


@pytest.mark.slow
def test_a_command_that_fails_leaves_the_page_alone(left_alone):
    left_alone(FAILS, "there is no file or folder nothing")


def test_a_command_without_a_table_leaves_the_page_alone(left_alone):
    """Say that --table was forgotten."""
    left_alone(COMMAND.replace(" --table", ""), "prints no table")


def test_a_command_with_two_tables_leaves_the_page_alone(left_alone, monkeypatch):
    """Both would be in the place of the first."""
    tables = "| a |\n|:-:|\n| 1 |\n\n| b | c |\n| --- | --- |\n"
    done = subprocess.CompletedProcess([], 0, tables, "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    left_alone(COMMAND, "prints 2 tables, not one")


def test_no_such_page(capsys):
    with pytest.raises(SystemExit) as stop:
        pages.main(pages.Args(["nothing.md"]))
    assert stop.value.code == 2
    assert "there is no page nothing.md" in capsys.readouterr().err


def test_a_picture_is_no_page(tmp_path, capsys):
    picture = tmp_path / "learned.webp"
    picture.write_bytes(content := b"RIFF\xe4\x00WEBP")
    with pytest.raises(SystemExit) as stop:
        pages.main(pages.Args([str(picture)]))
    assert stop.value.code == 2
    assert "learned.webp is not a text in UTF-8" in capsys.readouterr().err
    assert picture.read_bytes() == content


@pytest.mark.parametrize("page", pages.PAGES)
def test_the_pages_have_tables_to_write(page):
    assert pages.TABLE.search((ROOT / page).read_text(encoding="utf-8"))
