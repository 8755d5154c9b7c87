"""Break one line at a time, and see whether the tests notice.

Run: python -m tools.mutate --output docs/mutations.md

The faults are in tools/mutants.txt: below the heading of a place, each line has the old text,
an arrow and the new text. A fault in a part that the scripts share goes into all four. All
tests run but those marked slow, those that measure the files, and those of other tools.
"""

import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import NamedTuple

import pytest
import tyro

from tools import fail

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = ["torch", "gymnasium", "hypothesis.extra.numpy", "scipy.integrate"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)
SCRIPTS = ["vanilla_pg.py", "is_pg.py", "trpo.py", "ppo.py"]
ALGORITHM, SHARED, RUN = "# --- algorithm", "# --- shared", "# --- the run"
IN_ALL_SCRIPTS = {  # place: the headings before it and after it
    "options": ("", ALGORITHM),
    "shared": (SHARED, RUN),
    "run": (RUN, ""),
}
TESTS = [  # in the order in which they run
    "exact_updates",
    "exact_returns",
    "exact",
    "tail",
    "collect",
    "networks",
    "runs",
    "evaluate",
    "environments",
    "bad_input",
    "device",
    "workers",
    "crashes",
]
FIRST = {  # place: the tests that know most about it, which run before the others
    "options": ["bad_input"],
    "shared": ["tail", "collect", "runs", "bad_input", "workers"],
    "run": ["runs", "tail", "collect", "bad_input", "workers", "crashes"],
    "common/networks.py": ["networks", "exact_returns"],
    "common/returns.py": ["exact_returns"],
    "common/workers.py": ["workers"],
    "tools/evaluate.py": ["evaluate"],
}


@dataclass
class Args:
    output: str = ""  # Markdown file to write, if any
    only: str = ""  # only faults whose place or text has this in it
    workers: int = 2  # tests that run side by side
    timeout: float = 400.0  # seconds after which tests count as failed


class Mutant(NamedTuple):
    place: str
    old: str
    new: str
    reason: str  # why no test can notice, if so


def read_mutants(text):
    """Mutants of a file such as mutants.txt."""
    mutants = []
    place = None
    for line in text.splitlines():
        if heading := re.fullmatch(r"\[([\w/.]+)\]", line):
            place = heading[1]
        elif line.startswith("    "):
            mutants[-1] = mutants[-1]._replace(reason=line.strip())
        elif line:
            mutants.append(Mutant(place, *line.split(" ==> "), ""))
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
        compile(files[root / name], name, "exec")
    return files


def part_of(source, place):
    """Start and end of the part of a file that is the place of a fault."""
    own = (ALGORITHM, SHARED) if place in SCRIPTS else ("", "")  # of other files, all
    before, after = IN_ALL_SCRIPTS.get(place, own)
    start = source.index(before)
    return start, source.index(after, start) if after else len(source)


def run_pytest(folder, arguments):
    """Run the tests of a folder, in a process that has loaded the libraries before."""
    os.chdir(folder)
    os.setsid()  # so that what the tests have started can be killed with them
    for name in list(sys.modules):
        if name.split(".")[0] in ("tools", "common"):
            del sys.modules[name]  # pytest puts the folder's own on the path
    sys.path[:] = [path for path in sys.path if path and Path(path).resolve() != ROOT]
    with open("log.txt", "w", encoding="utf-8") as sys.stdout:
        sys.stderr = sys.stdout
        sys.exit(pytest.main(arguments))


def run_tests(folder, place, timeout):
    """The name of the first test that fails, or nothing."""
    first = FIRST.get(place, [])
    others = [name for name in TESTS if name not in first]
    files = [f"tests/test_{name}.py" for name in (*first, *others)]
    options = ["-x", "-q", "-n", "0", "-m", "not slow", "--tb=no", "-p", "no:cacheprovider"]
    process = CONTEXT.Process(target=run_pytest, args=(folder, [*options, *files]))
    process.start()
    process.join(timeout)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return f"more than {timeout:g} seconds"
    log = (folder / "log.txt").read_text(encoding="utf-8")
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", log, re.MULTILINE)
    if process.exitcode < 0 and not failed:
        return f"signal {-process.exitcode} ended the tests"
    if process.exitcode and not failed:
        fail(f"the tests did not run: {log[-600:]}")
    if not process.exitcode:
        return ""
    return failed[1].split("[")[0].removeprefix("test_").replace(".py::test_", ": ")


def judge(mutant, folders, timeout):
    """Which test notices the fault, or nothing."""
    folder = folders.get()
    try:
        files = apply(mutant, folder)
        saved = {path: path.read_text(encoding="utf-8") for path in files}
        for path, source in files.items():
            path.write_text(source, encoding="utf-8")
        killer = run_tests(folder, mutant.place, timeout)
        for path, source in saved.items():
            path.write_text(source, encoding="utf-8")
    finally:
        folders.put(folder)
    return killer


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
    share = f"{killed} of {len(counted)} faults are noticed ({killed / len(counted):.1%})"
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


def copies(count, folder):
    """A queue of so many copies of the project, each for one test run at a time."""
    folders = Queue()
    ignored = shutil.ignore_patterns(".*", "runs", "docs", "__pycache__")
    for i in range(count):
        folders.put(shutil.copytree(ROOT, Path(folder, str(i)), ignore=ignored))
    return folders


def judge_all(mutants, args):
    """Pairs of a mutant and the test that notices it."""
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        start = time.time()
        folders = copies(args.workers, temporary)
        if killer := run_tests(folders.queue[0], "", args.timeout):
            fail(f"nothing is broken, yet a test fails: {killer}")
        with ThreadPoolExecutor(args.workers) as pool:
            verdicts = pool.map(lambda mutant: judge(mutant, folders, args.timeout), mutants)
            for mutant, killer in zip(mutants, verdicts):
                results.append((mutant, killer))
                count = f"{len(results)}/{len(mutants)}"
                minutes = (time.time() - start) / 60
                fault = f"{mutant.place}: {mutant.old} ==> {mutant.new}"
                print(f"{count} {minutes:.1f} min  {fault}: {killer or 'NOTHING'}", flush=True)
    return results


def main(args):
    mutants = read_mutants((ROOT / "tools" / "mutants.txt").read_text(encoding="utf-8"))
    mutants = [mutant for mutant in mutants if args.only in " ".join(mutant[:3])]
    if not mutants:
        fail(f"no fault has {args.only} in it")
    try:
        for mutant in mutants:
            apply(mutant, ROOT)
    except (ValueError, SyntaxError) as error:
        fail(f"mutants.txt does not fit: {error}")
    start = time.time()
    results = judge_all(mutants, args)
    print(summary(results))
    if args.output:
        minutes = (time.time() - start) / 60
        how_long = f"in {minutes:.0f} minutes with {args.workers} workers."
        Path(args.output).write_text(report(results, how_long), encoding="utf-8")
    return any(not killer and not mutant.reason for mutant, killer in results)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
