"""What all tools have in common: they print anywhere, and name the encoding of their files."""

import ast
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import tools

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("tools/*.py"), *ROOT.glob("tests/*.py")])
PARTS = {"__init__", "solve"}  # of other tools: tools.speed --solve
NAMES = sorted({path.stem for path in ROOT.glob("tools/*.py")} - PARTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_help_is_printed_in_any_encoding(name):
    """As in a console or a pipe of Windows, where stdout is not UTF-8."""
    command = [sys.executable, "-m", f"tools.{name}", "--help"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr[-300:]
    assert b"usage: " in done.stdout


def test_what_a_tool_prints_need_not_fit_the_encoding(monkeypatch):
    @dataclass
    class Args:
        number: int = 3

    printed = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["tool", "--number", "7"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="cp1252"))
    assert tools.parse(Args) == Args(7)
    print("± λ")
    sys.stdout.flush()
    assert printed.getvalue().decode("cp1252").splitlines() == ["± ?"]


def test_arguments_are_parsed_where_stdout_is_not_a_file_of_text(monkeypatch):
    """As in a notebook."""

    @dataclass
    class Args:
        number: int = 3

    monkeypatch.setattr(sys, "argv", ["tool"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert tools.parse(Args) == Args(3)


def calls_without_encoding(source):
    """Lines of those calls that read or write text and do not say in which encoding."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        modes = [x.value for x in node.args[1:2] if isinstance(x, ast.Constant)]
        is_binary = any("b" in str(mode) for mode in modes)
        name = ast.unparse(node.func).split(".")[-1]
        readers = ("read_text", "write_text", "genfromtxt", "loadtxt")
        is_text = name in readers or (ast.unparse(node.func) == "open" and not is_binary)
        is_text |= keywords.get("text") == "True"  # a pipe of subprocess
        if is_text and "encoding" not in keywords:
            lines.append(node.lineno)
    return lines


def test_calls_without_encoding():
    lines = ['open("x")', 'open("x", "wb")', 'open("x", "a", encoding="utf-8")']
    lines += ['Path("x").read_text()', "p.write_text(text)", "np.genfromtxt(p)"]
    lines += ["run(x, text=True)", 'run(x, text=True, encoding="utf-8")']
    assert calls_without_encoding("\n".join(lines)) == [1, 4, 5, 6, 7]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_are_read_and_written_as_utf_8(path):
    assert calls_without_encoding(path.read_text(encoding="utf-8")) == []
