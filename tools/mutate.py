"""Break one line at a time, and see whether the tests notice.

Run: python -m tools.mutate --output docs/mutations.md

The faults are in tools/mutants.txt: below the heading of a place, each line has the old text,
an arrow and the new text. An indented line below a fault says why no test can notice it. A fault
in a part that the scripts share goes into all four. For each fault, only the tests that run its
line are tried, and of these the likeliest to notice it first. coverage.py finds out which tests
run which lines. Tests marked slow are left out, and tests of the text of the files, which would
notice any change.
"""

import ast
import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import Queue
from typing import NamedTuple

from tools import ctrl_c_blocked, fail, parse, refuse_missing_folder

try:
    import coverage
    import pytest
except ImportError:  # main says so
    coverage = pytest = None

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "mutations.md"
PRELOADED = ["torch._dynamo", "gymnasium.wrappers.vector", "hypothesis.extra.numpy"]
PRELOADED += ["scipy.integrate", "matplotlib.pyplot", "pandas", "tyro", "coverage"]
SCRIPTS = ["vanilla_pg.py", "is_pg.py", "trpo.py", "ppo.py"]
ALGORITHM, SHARED, RUN = "# --- algorithm", "# --- shared", "# --- the run"
IN_ALL_SCRIPTS = {  # place: the headings before it and after it
    "options": ("", ALGORITHM),
    "shared": (SHARED, RUN),
    "run": (RUN, ""),
}
LEFT_OUT = [".[!c]*", "__pycache__", "runs"]  # of copies, in which .ci stays
OPTIONS = ["-x", "-q", "-n", "0", "--tb=no", "-p", "no:cacheprovider"]
OPTIONS += ["-m", "not slow and not text"]
RECORD = ["--cov", "--cov-context=test", "--cov-report="]  # which tests run which lines
LEAST = 10.0  # seconds that any test may take; beyond that, ten times what it took unbroken
IS_OVER = threading.Event()  # no more tests are to start


@dataclass
class Args:
    output: str = ""  # Markdown file to write anew, with these faults alone; none if empty
    only: str = ""  # only faults whose place or text has this in it
    workers: int = 2  # tests that run side by side
    seconds: float = 40.0  # of tests that are tried on a fault; one they miss is not noticed


class Mutant(NamedTuple):
    place: str
    old: str
    new: str
    reason: str  # why no test can notice, if so


class Covered(NamedTuple):
    """What a test runs."""

    seconds: float
    lines: dict[str, set[int]]  # numbers of the lines, by file


# The faults


def read_mutants(text):
    """Mutants of a file such as mutants.txt. Raises ValueError if a line is not one."""
    mutants = []
    place = None
    for line in text.splitlines():
        if heading := re.fullmatch(r"\[([\w/.]+)\]", line):
            place = heading[1]
        elif line.startswith("    ") and mutants:
            mutants[-1] = mutants[-1]._replace(reason=line.strip())
        elif line:
            texts = line.split(" ==> ")
            if len(texts) != 2 or not place:
                raise ValueError(f"{line!r} is not `old ==> new` below a [place]")
            mutants.append(Mutant(place, *texts, ""))
    return mutants


def apply(mutant, root):
    """{path: source} of the files that have the fault.

    Raises ValueError if the old text is not there exactly once, SyntaxError if the new text is
    not Python.
    """
    names = SCRIPTS if mutant.place in IN_ALL_SCRIPTS else [mutant.place]
    files = {}
    for name in names:
        source = (root / name).read_text(encoding="utf-8")
        start, end = part_of(source, mutant.place)
        count = source[start:end].count(mutant.old)
        if count != 1:
            raise ValueError(f"{name} has {mutant.old!r} {count} times, not once")
        at = source.index(mutant.old, start)
        files[root / name] = source[:at] + mutant.new + source[at + len(mutant.old) :]
    compile(files[root / name], name, "exec")  # one, since what scripts share is the same in all
    return files


def part_of(source, place):
    """Start and end of the part of a file that is the place of a fault."""
    own = (ALGORITHM, SHARED) if place in SCRIPTS else ("", "")  # of other files, all
    before, after = IN_ALL_SCRIPTS.get(place, own)
    start = source.index(before)
    return start, source.index(after, start) if after else len(source)


def broken_lines(mutant, root):
    """{file: lines of the statement that has the fault}."""
    lines = {}
    for path, broken in apply(mutant, root).items():
        source = path.read_text(encoding="utf-8")
        pairs = zip(source.split("\n"), broken.split("\n"))
        number = next(i for i, (old, new) in enumerate(pairs, start=1) if old != new)
        lines[str(path.relative_to(root))] = set(statement(source, number))
    return lines


def statement(source, number):
    """The lines of the statement that has this line, without the statements within it."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.stmt, ast.excepthandler)):
            body = getattr(node, "body", None)
            last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno
            spans.append(range(node.lineno, last + 1))
    around = [span for span in spans if number in span]
    return min(around, key=len, default=range(number, number + 1))


# Which tests run which lines


class Watch:
    """A pytest plugin: it chooses the tests, says which one runs, and adds up their seconds."""

    def __init__(self, wanted=None, limits=None):
        self.wanted = wanted  # names of the tests in the order to run them; if None, all
        self.limits = limits or {}  # seconds after which a test is killed
        self.seconds = Counter()

    def pytest_collection_modifyitems(self, items):
        if self.wanted is not None:
            found = {item.nodeid: item for item in items}
            items[:] = [found[name] for name in self.wanted if name in found]

    def pytest_runtest_logstart(self, nodeid):
        Path("test.txt").write_text(nodeid, encoding="utf-8")
        signal.setitimer(signal.ITIMER_REAL, self.limits.get(nodeid, 0))  # 0: no limit

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration


def covered_by_tests(folders):
    """{test: what it runs}. Kept in runs/, for as long as no Python file changes.

    The entry "" has what runs as the files are imported.
    """
    path = ROOT / "runs" / "mutate" / f"{digest(folders.queue[0])}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(watch_all(folders)), encoding="utf-8")
    covered = {"": Covered(0.0, {})}
    for test, seconds, lines in json.loads(path.read_text(encoding="utf-8")):
        sets = {file: set(numbers) for file, numbers in lines.items()}
        if test:
            covered[test] = Covered(seconds, sets)
        else:
            merge(covered[""].lines, sets)
    return covered


def merge(lines, others):
    for file, numbers in others.items():
        lines[file] = lines.get(file, set()) | numbers


def watch_all(folders):
    """[test, seconds, lines] of all tests, each file of tests by itself."""

    def watch(file):
        folder = folders.get()
        try:
            return watch_one(folder, file)
        finally:
            folders.put(folder)

    files = sorted(ROOT.glob("tests/test_*.py"), key=lambda path: -path.stat().st_size)
    with threads(folders.qsize()) as pool:
        futures = [pool.submit(watch, str(path.relative_to(ROOT))) for path in files]
        for future in as_completed(futures):
            future.result()  # which raises what has gone wrong
    return [row for future in futures for row in future.result()]


def watch_one(folder, file):
    for path in folder.glob(".coverage*"):
        path.unlink()
    record = folder / "record.json"
    done = run_pytest(folder, [*RECORD, file], record=record)
    if done.code == pytest.ExitCode.NO_TESTS_COLLECTED:
        return []
    if done.code:
        fail(f"nothing is broken, yet a test of {file} fails: {done.log[-2000:]}")
    return json.loads(record.read_text(encoding="utf-8"))


def digest(folder):
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        whole.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def read_coverage(seconds):
    """[test, seconds, lines] of the coverage data in this folder."""
    recorder = coverage.Coverage()
    recorder.load()
    recorder.combine()  # the data of processes that the tests started
    data = recorder.get_data()
    lines = {test: defaultdict(list) for test in ["", *seconds]}
    for path in data.measured_files():
        file = str(Path(path).relative_to(Path.cwd()))
        for number, contexts in data.contexts_by_lineno(path).items():
            # "test|run" in the process of the tests, "test (call)" in those that they start
            for test in {re.sub(r"\|\w+$| \(\w+\)$", "", context) for context in contexts}:
                lines[test][file].append(number)
    return [(test, seconds[test], lines[test]) for test in lines]


# Running tests


def start_forkserver():
    """Start the process from which those of the tests are forked, and wait until it can."""
    from multiprocessing import forkserver  # not on Windows

    forkserver.set_forkserver_preload(PRELOADED)
    with ctrl_c_blocked():
        forkserver.ensure_running()
    first = multiprocessing.get_context("forkserver").Process()
    first.start()  # here Ctrl-C interrupts the wait, and in a thread it could not
    first.join()


@contextlib.contextmanager
def threads(count):
    """Threads that run tests. If anything goes wrong, or on Ctrl-C, the tests end at once."""
    IS_OVER.clear()
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    except BaseException:
        IS_OVER.set()
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=IS_OVER.is_set())


class Done(NamedTuple):
    code: int  # pytest's exit code; if negative, the signal that ended it
    test: str  # the last test that began
    log: str


def in_a_copy(folder, arguments, watch, record):
    """Run tests of a copy, in a process that has loaded the libraries before."""
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # as usual, not as for this process
    os.environ.pop("PYTEST_CURRENT_TEST", None)  # coverage.py takes it for the test that runs
    os.setsid()  # so that what the tests have started can be killed with them
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ctrl-C, for the tests of it
    for name in list(sys.modules):
        if name.split(".")[0] in ("tools", "common"):
            del sys.modules[name]  # pytest puts the copy's own on the path
    sys.path[:] = [path for path in sys.path if path and Path(path).resolve() != ROOT]
    sys.dont_write_bytecode = not record  # bytecode of a broken file must not outlive it
    if record:
        os.environ["COVERAGE_FOLDER"] = str(folder)
        os.environ["COVERAGE_PROCESS_START"] = str(folder / "pyproject.toml")
    else:
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    with open("log.txt", "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)  # stdout and stderr, of child processes too
        os.dup2(log.fileno(), 2)
    code = pytest.main([*OPTIONS, *arguments], plugins=[watch])
    sys.stdout.flush()
    if record and not code:
        record.write_text(json.dumps(read_coverage(watch.seconds)), encoding="utf-8")
    sys.exit(int(code))


def run_pytest(folder, arguments, watch=None, record=None):
    """Run tests of a copy up to the first failure. Returns what they came to."""
    for name in ("test.txt", "log.txt"):
        (folder / name).write_text("", encoding="utf-8")
    arguments = (folder, arguments, watch or Watch(), record)
    process = multiprocessing.get_context("forkserver").Process(target=in_a_copy, args=arguments)
    if IS_OVER.is_set():
        raise CancelledError
    process.start()
    if IS_OVER.is_set():  # while it started
        process.kill()
    process.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if IS_OVER.is_set():  # perhaps it did not end by itself
        raise CancelledError
    texts = [(folder / name).read_text(encoding="utf-8") for name in ("test.txt", "log.txt")]
    return Done(process.exitcode, *texts)


class Memory:
    """Which test noticed which fault, in the last table and since."""

    def __init__(self, text):
        self.killers = {}
        self.counts = Counter()
        place = ""
        for line in text.splitlines():
            if line.startswith("## "):
                place = line.removeprefix("## ").split(",")[0]
            elif row := re.fullmatch(r"\| `(.+)` \| `(.+)` \| (\w+: \w+).*", line):
                old, new = row[1].replace(r"\|", "|"), row[2].replace(r"\|", "|")
                self.add(Mutant(place, old, new, ""), row[3])

    def add(self, mutant, killer):
        self.killers[mutant[:3]] = killer
        self.counts[mutant.place, killer] += 1


def label(test):
    """A test as the table names it: without the folder, and all its cases as one."""
    file, _, function = test.split("[")[0].partition("::")
    return f"{Path(file).stem.removeprefix('test_')}: {function.removeprefix('test_')}"


def in_order(mutant, covered, lines, memory):
    """The tests that run the broken lines: first those that are likely to notice, and quick.

    A test is the likelier to notice, the fewer lines it runs, the more faults of this place it
    has noticed, the more it says of what has changed, and the fewer of its cases come before. If
    the line runs when its file is imported, any test of a file that uses it may notice.
    """
    imported = runs_any(covered[""], lines)
    files = {file: set(range(1, 10_000)) for file in lines}
    users = {test.split("::")[0] for test in covered if runs_any(covered[test], files)}
    words = words_in(f"{mutant.old} {mutant.new}")
    costs = {}
    for test in filter(None, covered):
        # Where nothing is known, the lines run in forks of what an earlier test has started
        runs = runs_any(covered[test], lines) or not covered[test].lines
        if test.split("::")[0] in users and (runs or imported):
            size = 1 + sum(map(len, covered[test].lines.values()))
            noticed = memory.counts[mutant.place, label(test)]
            likeliness = (1 + noticed) * (1 + 30 * common_words(test, words) ** 2) / size**0.5
            costs[test] = (0.1 + covered[test].seconds) / likeliness
            if not runs:
                costs[test] *= 10
    cases = Counter()
    for test in sorted(costs, key=costs.get):
        cases[label(test)] += 1
        costs[test] *= cases[label(test)]
    last = memory.killers.get(mutant[:3])
    return sorted(costs, key=lambda test: (label(test) != last, costs[test]))


def runs_any(covered, lines):
    return any(covered.lines.get(file, set()) & numbers for file, numbers in lines.items())


def common_words(test, words):
    """How many of the words are in the source of a test; a word in n tests counts as 1/n."""
    file, *_, function = test.split("[")[0].split("::")
    of_tests = words_of_tests(file)
    common = words & of_tests.get(function, set())
    return sum(1 / sum(word in others for others in of_tests.values()) for word in common)


@cache
def words_of_tests(file):
    """{test: the words in its source, and in the functions of its file that it uses}."""
    source = (ROOT / file).read_text(encoding="utf-8")
    texts = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            parts = [node, *node.decorator_list]
            texts[node.name] = " ".join(ast.get_source_segment(source, part) for part in parts)
    words = {}
    for test in texts:
        if test.startswith("test_"):
            used = [name for name in texts if re.search(rf"\b{name}\b", texts[test])]
            words[test] = words_in(" ".join(texts[name] for name in used))
    return words


def words_in(text):
    """Names and their parts: hidden_size, hidden and size."""
    return set(re.findall(r"\w{3,}", text) + re.findall("[a-z]{3,}", text))


def batches(tests, covered, longest):
    """Few tests first, then more and more at once, since each batch takes a second to begin."""
    batch, seconds, end = [], 0.0, min(2.0, longest)
    for test in tests:
        batch.append(test)
        seconds += covered[test].seconds
        if seconds > end:
            yield batch
            batch, end = [], min(5 * end, longest)
        if seconds > longest:
            return
    if batch:
        yield batch


@contextlib.contextmanager
def broken(mutant, folder):
    """A copy of the project has the fault; afterward it is as before."""
    files = apply(mutant, folder)
    sources = {path: path.read_text(encoding="utf-8") for path in files}
    for path, source in files.items():
        path.write_text(source, encoding="utf-8")
    try:
        yield
    finally:
        for path, source in sources.items():
            path.write_text(source, encoding="utf-8")


def judge(mutant, folder, covered, memory, seconds):
    """Which test notices the fault, or nothing."""
    tests = in_order(mutant, covered, broken_lines(mutant, folder), memory)
    with broken(mutant, folder):
        for batch in batches(tests, covered, seconds):
            limits = {test: LEAST + 10 * covered[test].seconds for test in batch}
            files = list(dict.fromkeys(test.split("::")[0] for test in batch))
            done = run_pytest(folder, files, Watch(batch, limits))
            if done.code:
                return verdict(done)
    return ""


def verdict(done):
    if done.code == -signal.SIGALRM:
        return f"{label(done.test)} (it takes too long)"
    if done.test:
        return label(done.test)
    if done.code in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.TESTS_FAILED):
        return "the import of the file"
    return fail(f"the tests did not run: {done.log[-2000:]}")


def copies(count, folder):
    """A queue of so many copies of the project, each for one run of tests at a time."""
    folders = Queue()
    for i in range(count):
        ignored = shutil.ignore_patterns(*LEFT_OUT)
        folders.put(shutil.copytree(ROOT, Path(folder, str(i)), ignore=ignored))
    return folders


def judge_all(mutants, workers, seconds):
    """{fault: the test that notices it, or nothing}."""
    start = time.time()
    memory = Memory(TABLE.read_text(encoding="utf-8") if TABLE.exists() else "")
    verdicts = {}
    start_forkserver()
    with tempfile.TemporaryDirectory() as temporary:
        folders = copies(workers, temporary)
        covered = covered_by_tests(folders)
        print(f"{minutes(start)}  {len(covered) - 1} tests", flush=True)

        def judge_one(mutant):
            folder = folders.get()
            longest = seconds / 4 if mutant.reason else seconds  # nothing is expected to notice
            try:
                return judge(mutant, folder, covered, memory, longest)
            finally:
                folders.put(folder)

        with threads(workers) as pool:
            futures = {pool.submit(judge_one, mutant): mutant for mutant in mutants}
            for future in as_completed(futures):
                mutant, killer = futures[future], future.result()
                verdicts[mutant[:3]] = killer
                if killer:
                    memory.add(mutant, killer)
                fault = f"{mutant.place}: {mutant.old} ==> {mutant.new}"
                count = f"{len(verdicts)}/{len(mutants)}"
                print(f"{count} {minutes(start)}  {fault}: {killer or 'NOTHING'}", flush=True)
    return verdicts


# The table


def minutes(start):
    return f"{(time.time() - start) / 60:.0f} minutes"


def table(rows):
    """Markdown. rows: pairs of a mutant and the test that notices it."""
    lines = ["| old | new | noticed by |", "|---|---|---|"]
    for mutant, killer in rows:
        old, new = mutant.old.replace("|", r"\|"), mutant.new.replace("|", r"\|")
        lines.append(f"| `{old}` | `{new}` | {killer or mutant.reason or '**nothing**'} |")
    return "\n".join(lines)


def summary(results):
    """The share of the faults that tests notice, in a sentence."""
    counted = [killer for mutant, killer in results if killer or not mutant.reason]
    killed = len([killer for killer in counted if killer])
    share = f"{killed} of {len(counted)} faults are noticed ({killed / max(len(counted), 1):.1%})"
    same = len(results) - len(counted)
    return f"{share}; {same} more change nothing that could be noticed."


def report(results, how_long):
    command = "Written by `python -m tools.mutate --output docs/mutations.md`, "
    parts = ["# One broken line at a time", command + how_long, summary(results)]
    for place in dict.fromkeys(mutant.place for mutant, _ in results):
        rows = [row for row in results if row[0].place == place]
        title = f"{place}, as in all four scripts" if place in IN_ALL_SCRIPTS else place
        parts += [f"## {title}", table(rows)]
    return "\n\n".join(parts) + "\n"


def check_system():
    """Exit if the packages are not installed, or processes cannot be forked."""
    for package in ("coverage", "pytest", "pytest_cov"):
        if not importlib.util.find_spec(package):
            fail(f"this needs {package}: pip install {package.replace('_', '-')}")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        fail("this needs processes that fork, which Windows does not have")


def main(args):
    check_system()
    if args.workers < 1:
        fail("--workers must be at least 1")
    if not args.seconds > 0:
        fail("--seconds must be above 0")
    if args.output:
        refuse_missing_folder(args.output)
    try:
        mutants = read_mutants((ROOT / "tools" / "mutants.txt").read_text(encoding="utf-8"))
        mutants = [mutant for mutant in mutants if args.only in " ".join(mutant[:3])]
        for mutant in mutants:
            apply(mutant, ROOT)
    except (OSError, ValueError, SyntaxError) as error:
        fail(f"mutants.txt does not fit: {error}")
    if not mutants:
        fail(f"no fault has {args.only} in it")
    start = time.time()
    verdicts = judge_all(mutants, args.workers, args.seconds)
    results = [(mutant, verdicts[mutant[:3]]) for mutant in mutants]
    print(summary(results))
    if args.output:
        how_long = f"in {minutes(start)} with {args.workers} workers."
        Path(args.output).write_text(report(results, how_long), encoding="utf-8")
    return any(not killer and not mutant.reason for mutant, killer in results)


if __name__ == "__main__":
    sys.exit(main(parse(Args)))
