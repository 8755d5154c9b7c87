"""tools.mutate: its faults fit the scripts as they are, and its table says what happened."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from processes import Job

from tools import mutate
from tools.mutate import Mutant

pytestmark = pytest.mark.text

TEXT = (mutate.ROOT / "tools" / "mutants.txt").read_text(encoding="utf-8")
MUTANTS = mutate.read_mutants(TEXT)


def test_there_are_enough_faults_and_each_fits_where_it_should():
    assert len(MUTANTS) == len(set(MUTANTS)) >= 400
    for mutant in MUTANTS:
        for path, source in mutate.apply(mutant, mutate.ROOT).items():
            before = path.read_text(encoding="utf-8").split("\n")
            after = source.split("\n")
            changed = [i for i, (one, other) in enumerate(zip(before, after)) if one != other]
            assert len(before) == len(after)
            assert len(changed) == 1


def test_read_mutants():
    text = "[a.py]\nx + 1 ==> x - 1\n[y] ==> [z]\n    it is the same\n\n[common/b.py]\nf ==> g\n"
    first, second = (
        Mutant("a.py", "x + 1", "x - 1", ""),
        Mutant("a.py", "[y]", "[z]", "it is the same"),
    )
    assert mutate.read_mutants(text) == [first, second, Mutant("common/b.py", "f", "g", "")]


@pytest.mark.parametrize(
    "text",
    [
        "[a.py]\nx + 1 =>> x - 1\n",
        "[a.py]\na ==> b ==> c\n",
        "[a.py]\na ==>\n",
        "[a.py]\n    it is the same\n",
        "a ==> b\n",
    ],
)
def test_a_line_that_is_no_fault_is_said(text, tmp_path, monkeypatch, capsys):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "mutants.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as stop:
        mutate.main(mutate.Args())
    assert stop.value.code == 2
    said = f"mutants.txt does not fit: {text.splitlines()[-1]!r} is not `old ==> new`"
    assert said in capsys.readouterr().err


def test_a_place_that_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "mutants.txt").write_text("[nothing.py]\na ==> b\n", encoding="utf-8")
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as stop:
        mutate.main(mutate.Args())
    assert stop.value.code == 2
    assert "mutants.txt does not fit: " in capsys.readouterr().err


def test_apply(tmp_path):
    parts = ["x = 1\n", "# --- algorithm\nx = 1\n", "# --- shared\nx = 1\nx = 22\n"]
    parts += ["# --- the run\nx = 1\n"]
    for name in mutate.SCRIPTS:
        (tmp_path / name).write_text("".join(parts), encoding="utf-8")
    places = ["options", "trpo.py", "shared", "run"]  # in their order in a script
    for i, place in enumerate(places):
        files = mutate.apply(Mutant(place, "x = 1", "x = 3", ""), tmp_path)
        names = ["trpo.py"] if place == "trpo.py" else mutate.SCRIPTS
        assert [path.name for path in files] == names
        changed = [*parts[:i], parts[i].replace("x = 1", "x = 3"), *parts[i + 1 :]]
        assert set(files.values()) == {"".join(changed)}
    (tmp_path / "common.py").write_text("y = 1\n", encoding="utf-8")
    (whole,) = mutate.apply(Mutant("common.py", "y", "z", ""), tmp_path).values()
    assert whole == "z = 1\n"
    for old, new in [("y", "z"), ("x = ", "y = "), ("x = 22", "x =")]:  # absent, twice, no Python
        with pytest.raises((ValueError, SyntaxError)):
            mutate.apply(Mutant("shared", old, new, ""), tmp_path)


def test_report():
    results = [
        (Mutant("ppo.py", "a | b", "a", ""), "exact: clipping"),
        (Mutant("ppo.py", "c", "d", ""), ""),
        (Mutant("shared", "e", "f", "it is the same"), ""),
        (Mutant("shared", "g", "h", ""), "runs: resume"),
    ]
    text = mutate.report(results, "in no time.")
    assert "2 of 3 faults are noticed (66.7%); 1 more" in text
    assert "| `a \\| b` | `a` | exact: clipping |" in text
    assert "| `c` | `d` | **nothing** |" in text
    assert "| `e` | `f` | it is the same |" in text
    assert text.index("## ppo.py") < text.index("`c`") < text.index("## shared") < text.index("`e`")


def test_a_typo_in_only_is_said(capsys):
    with pytest.raises(SystemExit) as stop:
        mutate.main(mutate.Args(only="no such line"))
    assert stop.value.code == 2
    assert "no fault has no such line in it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(workers=0), "--workers must be at least 1"),
        (dict(seconds=0), "--seconds must be above 0"),
        (dict(seconds=float("nan")), "--seconds must be above 0"),
        (dict(output="nowhere/mutations.md"), "there is no folder nowhere"),
    ],
)
def test_bad_input_is_said_before_the_work(options, words, capsys):
    with pytest.raises(SystemExit) as stop:
        mutate.main(mutate.Args(**options))
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


WITHOUT = "import sys; sys.modules.update(coverage=None, pytest=None, pytest_cov=None)"
ON_WINDOWS = """
import multiprocessing

def get_context(method):
    raise ValueError(f"cannot find context for {method!r}")

multiprocessing.get_context = get_context
multiprocessing.get_all_start_methods = lambda: ["spawn"]
"""


@pytest.mark.parametrize(
    ("system", "words"),
    [(WITHOUT, "this needs coverage: pip install coverage"), (ON_WINDOWS, "this needs processes")],
)
def test_what_the_system_lacks_is_said_in_one_line(system, words):
    """And does not keep anybody from reading the help."""
    code = f"{system}\nimport runpy\nrunpy.run_module('tools.mutate', None, '__main__', True)"
    for option in ("--help", "--workers=2"):
        command = [sys.executable, "-c", code, option]
        done = subprocess.run(command, cwd=mutate.ROOT, capture_output=True, encoding="utf-8")
        if option == "--help":
            assert done.returncode == 0, done.stderr
            assert "--workers" in done.stdout
        else:
            assert done.returncode == 2
            assert done.stderr.startswith(f"error: {words}")
            assert done.stderr.count("\n") == 1


def test_faults_that_change_nothing_are_not_counted():
    mutant = Mutant("ppo.py", "a", "b", "the same")
    assert mutate.summary([(mutant, "")]).startswith("0 of 0 faults are noticed (0.0%); 1 more")


SOURCE = """\
x = 1

@decorator
def f(a,
      b):
    if (a >
            b):
        return [
            a,
        ]
    try:
        b()
    except ValueError:
        a()
"""


@pytest.mark.parametrize(
    ("line", "lines"),
    [(1, [1]), (4, [4, 5]), (5, [4, 5]), (6, [6, 7]), (9, [8, 9, 10]), (12, [12]), (13, [13])],
)
def test_the_statement_of_a_line(line, lines):
    assert list(mutate.statement(SOURCE, line)) == lines


def test_broken_lines(tmp_path):
    (tmp_path / "a.py").write_text(SOURCE, encoding="utf-8")
    assert mutate.broken_lines(Mutant("a.py", "        b()", "        a()", ""), tmp_path) == {
        "a.py": {12}
    }
    assert mutate.broken_lines(Mutant("a.py", "b):\n    if", "c):\n    if", ""), tmp_path) == {
        "a.py": {4, 5}
    }


def covered(seconds, **lines):
    return mutate.Covered(seconds, {f"{name}.py": numbers for name, numbers in lines.items()})


COVERED = {
    "": covered(0, a={1, 2}),
    "tests/test_x.py::test_much": covered(1, a={3, *range(5, 100)}),
    "tests/test_x.py::test_little[1]": covered(1, a={3}),
    "tests/test_x.py::test_little[2]": covered(1, a={3}),
    "tests/test_x.py::test_slow": covered(9, a={3}),
    "tests/test_x.py::test_elsewhere": covered(1, b={3}),
    "tests/test_y.py::test_of_another_file": covered(1, b={3}),
    "tests/test_y.py::test_of_nothing": covered(1),
}


def order(text="", line=3):
    fault = Mutant("a.py", "old", "new", "")
    tests = mutate.in_order(fault, COVERED, {"a.py": {line}}, mutate.Memory(text))
    return [test.split("test_")[-1] for test in tests]


def test_the_likeliest_tests_come_first(monkeypatch):
    monkeypatch.setattr(mutate, "common_words", lambda test, words: 0)
    assert order() == ["little[1]", "little[2]", "much", "slow"]
    row = "| `old` | `{}` | x: {} |"
    others = "\n".join(["## a.py", *(row.format(i, "much") for i in range(99))])
    assert order(others)[:2] == ["much", "little[1]"]
    assert order("## b.py\n" + row.format("new", "slow"))[0] == "little[1]"
    assert order("## a.py\n" + row.format("new", "slow"))[0] == "slow"
    monkeypatch.setattr(mutate, "common_words", lambda test, words: "slow" in test)
    assert order()[0] == "slow"


def test_lines_of_an_import_concern_all_tests_of_the_file(monkeypatch):
    monkeypatch.setattr(mutate, "common_words", lambda test, words: "else" in test)
    assert order(line=2) == ["elsewhere", "little[1]", "little[2]", "much", "slow"]
    assert order(line=4) == []


def test_tests_of_which_nothing_is_known_may_notice_what_others_of_its_file_run(monkeypatch):
    monkeypatch.setattr(mutate, "common_words", lambda test, words: 0)
    tests = mutate.in_order(Mutant("b.py", "", "", ""), COVERED, {"b.py": {3}}, mutate.Memory(""))
    assert "tests/test_y.py::test_of_nothing" in tests
    assert "of_nothing" not in order()


def test_common_words(tmp_path, monkeypatch):
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    text = """
import pytest

def helper():
    return rare

@pytest.mark.parametrize("one", [1])
def test_a(one):
    assert helper() == often

def test_b():
    assert often
"""
    (tmp_path / "test_x.py").write_text(text, encoding="utf-8")
    for test, words, expected in [
        ("test_x.py::test_a[1]", {"rare", "often", "other"}, 1.5),
        ("test_x.py::test_a[1]", {"parametrize"}, 1),
        ("test_x.py::test_b", {"rare", "often"}, 0.5),
    ]:
        assert mutate.common_words(test, words) == expected


def test_batches_get_longer_up_to_the_limit():
    tests = [str(i) for i in range(40)]
    seconds = {test: covered(1) for test in tests}
    sizes = [len(batch) for batch in mutate.batches(tests, seconds, 30)]
    assert sizes == [3, 8, 20]
    assert [len(batch) for batch in mutate.batches(tests[:5], seconds, 30)] == [3, 2]
    assert [len(batch) for batch in mutate.batches(tests, seconds, 1.5)] == [2]
    assert [len(batch) for batch in mutate.batches(tests[:1], seconds, 0.5)] == [1]


TESTS = """
import subprocess
import sys

import code_of_it


def test_half():
    assert code_of_it.half(4) == 2


def test_in_another_process():
    subprocess.run([sys.executable, "code_of_it.py"], check=True)


def test_that_waits():
    code_of_it.wait()
"""
CODE = """
import time


def half(x):
    return x / 2


def wait():
    time.sleep(0)


if __name__ == "__main__":
    assert half(2) == 1
"""


def small_project(folder):
    (folder / "tests").mkdir(parents=True)
    (folder / "code_of_it.py").write_text(CODE, encoding="utf-8")
    (folder / "tests" / "test_it.py").write_text(TESTS, encoding="utf-8")
    pyproject = (mutate.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (folder / "pyproject.toml").write_text(pyproject, encoding="utf-8")
    return folder


@pytest.mark.slow
def test_a_whole_run_on_a_small_project(tmp_path, monkeypatch):
    monkeypatch.setattr(mutate, "ROOT", small_project(tmp_path / "project"))
    monkeypatch.setattr(mutate, "LEAST", 2.0)
    mutate.start_forkserver()
    folders = mutate.copies(1, tmp_path)
    known = mutate.covered_by_tests(folders)
    folder = folders.get()
    lines = {test.split("::")[-1]: x.lines.get("code_of_it.py") for test, x in known.items()}
    assert lines["test_half"] == {6}
    assert {6, 14} <= lines["test_in_another_process"]
    assert {2, 5, 9} <= known[""].lines["code_of_it.py"]
    assert not {6, 10, 14} & known[""].lines["code_of_it.py"]
    assert lines["test_that_waits"] == {10}
    faults = {
        "x / 2": ("x", "it: half"),
        "half(2) == 1": ("half(2) == 2", "it: in_another_process"),
        "time.sleep(0)": ("time.sleep(99)", "it: that_waits (it takes too long)"),
        "return x": ("return 1 * x", ""),
        "import time": ("import tim", "the import of the file"),
    }
    for old, (new, killer) in faults.items():
        fault = Mutant("code_of_it.py", old, new, "")
        assert mutate.judge(fault, folder, known, mutate.Memory(""), 60) == killer
        assert (folder / "code_of_it.py").read_text(encoding="utf-8") == CODE


# How it ends early

DRIVER = """
import sys
from pathlib import Path

sys.argv[0] = "-m"
from tools import mutate

mutate.ROOT, mutate.PRELOADED = Path(sys.argv[1]), []
if __name__ == "__main__":
    mutate.main(mutate.Args(workers=2))
"""
WAITS = """
import os, time

def test_that_waits():
    open(os.environ["BEGUN"], "w").close()
    time.sleep(60)
"""
FAILS = """
import os, time

def test_that_fails():
    while not os.path.exists(os.environ["BEGUN"]):
        time.sleep(0.1)
    assert False
"""
SLOWER = "time.sleep(0) ==> open(os.environ['BEGUN'], 'w').close(); time.sleep({})"


@pytest.fixture
def temporary():
    """A folder whose name is short enough for the sockets in it."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def start(folder, temporary, faults, **tests):
    """Run it in a process on a small project with these faults, and with more tests."""
    project = small_project(folder / "project")
    code = CODE.replace("import time", "import os, time")
    (project / "code_of_it.py").write_text(code, encoding="utf-8")
    for name, text in tests.items():
        (project / "tests" / f"test_{name}.py").write_text(text, encoding="utf-8")
    (project / "tools").mkdir()
    lines = "\n".join(["[code_of_it.py]", *faults])
    (project / "tools" / "mutants.txt").write_text(lines, encoding="utf-8")
    (folder / "driver.py").write_text(DRIVER, encoding="utf-8")
    env = dict(PYTHONPATH=str(mutate.ROOT), BEGUN=str(folder / "begun"), TMPDIR=str(temporary))
    return Job([folder / "driver.py", project], folder, **env)


def wait_until_none_is_alive(job):
    deadline = time.time() + 20
    while job.alive():
        assert time.time() < deadline, job.alive()
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="nothing can be forked there")
@pytest.mark.parametrize("reached", ["all", "one"])
@pytest.mark.parametrize("when", ["recording", "judging"])
def test_ctrl_c_ends_it_and_what_it_has_started(when, reached, temporary, tmp_path):
    """Of eight faults, each would take ten seconds or more; the two tests a minute."""
    if when == "recording":
        job = start(tmp_path, temporary, ["x / 2 ==> x"], waits=WAITS, waits_too=WAITS)
    else:
        job = start(tmp_path, temporary, [SLOWER.format(seconds) for seconds in range(60, 68)])
    job.wait_for((tmp_path / "begun").exists)
    began = time.time()
    send = os.killpg if reached == "all" else os.kill  # a terminal sends it to all
    send(job.process.pid, signal.SIGINT)
    code, _, err = job.end()
    assert (code, err) == (-signal.SIGINT, "stopped\n")
    assert time.time() - began < 50
    wait_until_none_is_alive(job)
    assert not any(temporary.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="nothing can be forked there")
def test_a_failure_ends_it_and_what_it_has_started(temporary, tmp_path):
    job = start(tmp_path, temporary, ["x / 2 ==> x"], waits=WAITS + "#" * 999, fails=FAILS)
    job.wait_for((tmp_path / "begun").exists)
    began = time.time()
    code, _, err = job.end()
    assert code == 2
    assert err.startswith("error: nothing is broken, yet a test of tests/test_fails.py fails: ")
    assert "test_waits" not in err
    assert time.time() - began < 50
    wait_until_none_is_alive(job)
