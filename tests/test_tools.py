"""What all tools have in common: they print anywhere, and name the encoding of their files."""

import ast
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import tools
from tools import exact, language_models

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


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is no signal there")
@pytest.mark.parametrize("name", NAMES)
def test_ctrl_c_is_no_traceback(name, tmp_path):
    """Not even while a tool imports, which can take seconds."""
    interrupt = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    for module in ("matplotlib", "numpy", "torch", "tyro"):  # each tool imports one of them
        (tmp_path / f"{module}.py").write_text(interrupt, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", f"tools.{name}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "stopped\n")


@pytest.mark.parametrize("tool", [exact, language_models], ids=["exact", "language_models"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.foo", "cannot write {}: Format 'foo' is not supported"),
        ("", "{} is a folder: name a file to write"),
        ("nowhere/a.png", "there is no folder"),
    ],
)
def test_a_picture_that_cannot_be_written_is_said_first(tool, name, words, tmp_path, capsys):
    """Before a first line is printed, and before any work, which would take longer than a test."""
    with pytest.raises(SystemExit) as stop:
        tool.main(tool.Args(output=str(tmp_path / name), problems=10**9))
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert words.format(tmp_path / name) in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_other_errors_are_printed_as_ever(capsys):
    try:
        raise ValueError("a fault")
    except ValueError as error:
        tools.say_stopped(ValueError, error, error.__traceback__)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "ValueError: a fault"


# Rows of CSV files

COLUMNS = ["name", "words"]
START = b"name,words\r\na,1\r\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, b"name,words\r\nb,c\r\n"),
        (b"", b"name,words\r\nb,c\r\n"),
        (START, START + b"b,c\r\n"),
        (START.strip(), START + b"b,c\r\n"),  # an editor has removed the last newline
        (b"name,words", b"name,words\r\nb,c\r\n"),
        (b"name,words\na,1\n", b"name,words\na,1\nb,c\r\n"),
        (b'"name","words"\n', b'"name","words"\nb,c\r\n'),
    ],
)
def test_a_row_has_a_line_of_its_own(before, after, tmp_path):
    path = tmp_path / "rows.csv"
    if before is not None:
        path.write_bytes(before)
    tools.add_row(path, dict(words="c", name="b"), COLUMNS)
    assert path.read_bytes() == after


@pytest.mark.parametrize("before", [b"name\na\n", b"\xef\xbb\xbfname,words\n", b"words,name\n"])
def test_a_row_is_not_added_to_other_columns(before, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_bytes(before)
    with pytest.raises(SystemExit) as stop:
        tools.add_row(path, dict(name="b", words="c"), COLUMNS)
    assert stop.value.code == 2
    assert "rows.csv has other columns" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize("room", [0, 1, 5, 18])
@pytest.mark.parametrize("before", [START, START.strip(), b""])
def test_a_row_for_which_there_is_no_room_is_not_there_at_all(room, before, tmp_path):
    """Some of its bytes fit on the disk. Once there is room, the row is added as usual."""
    resource = pytest.importorskip("resource")
    path, row = tmp_path / "rows.csv", dict(name="b", words="c" * 30)
    path.write_bytes(before)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            tools.add_row(path, row, COLUMNS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    tools.add_row(path, row, COLUMNS)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines == ["name,words", *["a,1"] * bool(before), f"b,{'c' * 30}"]


def test_ctrl_c_leaves_no_half_of_a_row(tmp_path, monkeypatch):
    class Interrupted(io.FileIO):
        def write(self, data):
            super().write(data[:3])
            raise KeyboardInterrupt

    path = tmp_path / "rows.csv"
    path.write_bytes(START)
    monkeypatch.setattr(tools, "open", Interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        tools.add_row(path, dict(name="b", words="c"), COLUMNS)
    assert path.read_bytes() == START


def test_a_row_goes_into_a_pipe():
    """Reading it first, as one reads a file, would wait for its own end."""
    source, sink = os.pipe()
    tools.add_row(f"/dev/fd/{sink}", dict(name="b", words="c"), COLUMNS)
    assert os.read(source, 100) == b"name,words\r\nb,c\r\n"
    os.close(source)
    os.close(sink)


def test_where_a_file_is_to_be_written(tmp_path, capsys):
    tools.refuse_missing_folder(tmp_path / "x.csv")
    (tmp_path / "x.csv").touch()
    tools.refuse_missing_folder(tmp_path / "x.csv")
    for path, words in [
        (tmp_path, f"{tmp_path} is a folder: name a file"),
        (f"{tmp_path / 'new'}/", f"{tmp_path / 'new'}/ is a folder: name a file"),
        (tmp_path / "a" / "x.csv", f"there is no folder {tmp_path / 'a'} to write"),
    ]:
        with pytest.raises(SystemExit) as stop:
            tools.refuse_missing_folder(path)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err


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


def test_a_file_that_begins_anew_stays_what_it_is(tmp_path):
    """A link, or /dev/null, which the root user of a container could remove for all."""
    (tmp_path / "file.csv").write_text("of yesterday\n", encoding="utf-8")
    link = tmp_path / "link.csv"
    link.symlink_to(tmp_path / "file.csv")
    tools.keep_row(link, dict(a=1), ["a"], anew=True)
    assert link.is_symlink()
    assert (tmp_path / "file.csv").read_text(encoding="utf-8").split() == ["a", "1"]


def test_rows_are_kept_one_by_one(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.csv"
    path.write_text("of yesterday\n", encoding="utf-8")
    tools.keep_row(path, dict(a=1), ["a", "b"], anew=True)
    tools.keep_row(path, dict(a=2), ["a", "b"])
    assert path.read_text(encoding="utf-8").splitlines() == ["a,b", "1,", "2,"]

    def full(*_):
        raise OSError("No space left")

    monkeypatch.setattr(tools, "add_row", full)
    with pytest.raises(SystemExit, match="1"):
        tools.keep_row(path, dict(a=3), ["a", "b"])
    assert "rows.csv: No space left" in capsys.readouterr().err
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3
