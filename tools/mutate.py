"""Break one line at a time, and see whether the tests notice.

Run: python -m tools.mutate --output docs/mutations.md

The faults are in tools/mutants.txt: under the heading of a place, in each line the old text, an
arrow and the new text. A fault in the part that the scripts share is put into all four. The tests
run but for those marked slow, those that measure the files, and those of other tools.
"""

import multiprocessing
import os
import re
import shutil
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
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "gymnasium", "hypothesis.extra.numpy", "scipy.integrate"])
SCRIPTS = ["vanilla_pg.py", "is_pg.py", "trpo.py", "ppo.py"]
# In this order, but those first that are most about the place
TESTS = ["exact_updates", "exact_returns", "exact", "tail", "collect", "networks", "runs"]
TESTS += ["evaluate", "environments", "bad_input", "device", "workers", "crashes"]
FIRST = {
    "shared": ["tail", "collect", "runs", "bad_input", "workers"],
    "common/networks.py": ["networks", "exact_returns"],
    "common/returns.py": ["exact_returns"],
    "tools/evaluate.py": ["evaluate"],
}


@dataclass
class Args:
    output: str = ""  # Markdown file to write, if any
    only: str = ""  # only faults whose place or text has this in it
    workers: int = 2  # tests that run side by side
    timeout: float = 180.0  # seconds after which tests count as failed


class Mutant(NamedTuple):
    place: str
    old: str
    new: str
    reason: str  # why no test can notice, if so


def read_mutants(text):
    """Mutants of a file such as mutants.txt."""
    mutants, place = [], None
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

    Raises ValueError if the old text is not there once, or the new one is no Python.
    """
    files = {}
    for name in SCRIPTS if mutant.place == "shared" else [mutant.place]:
        source = (root / name).read_text()
        start = source.find("# --- algorithm") + 1  # 0 in a file that has no such heading
        if mutant.place == "shared":
            start = source.index("# --- shared")
        end = source.find("# --- shared", start + 1)
        part = source[start : end if end > 0 else None]
        if part.count(mutant.old) != 1:
            raise ValueError(f"{name} has {mutant.old!r} {part.count(mutant.old)} times, not once")
        at = start + part.index(mutant.old)
        files[root / name] = source[:at] + mutant.new + source[at + len(mutant.old) :]
        compile(files[root / name], name, "exec")
    return files


def run_pytest(folder, arguments):
    """To be called in a process of its own, in which the libraries are there already."""
    os.chdir(folder)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tools", "common")]:
        del sys.modules[name]  # those of the folder are meant, which pytest puts on the path
    sys.path[:] = [path for path in sys.path if path and Path(path).resolve() != ROOT]
    with open("log.txt", "w") as sys.stdout:
        sys.stderr = sys.stdout
        sys.exit(pytest.main(arguments))


def run_tests(folder, place, timeout):
    """The name of the first test that fails, or nothing."""
    names = FIRST.get(place, [])
    names = names + [name for name in TESTS if name not in names]
    arguments = ["-x", "-q", "-n", "0", "-m", "not slow", "--tb=no", "-p", "no:cacheprovider"]
    arguments += [f"tests/test_{name}.py" for name in names]
    process = CONTEXT.Process(target=run_pytest, args=(folder, arguments))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        return f"more than {timeout:g} seconds"
    log = (folder / "log.txt").read_text()
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", log, re.MULTILINE)
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
        saved = {path: path.read_text() for path in files}
        for path, source in files.items():
            path.write_text(source)
        killer = run_tests(folder, mutant.place, timeout)
        for path, source in saved.items():
            path.write_text(source)
    finally:
        folders.put(folder)
    return killer


def table(rows):
    """Markdown. rows: pairs of a mutant and the test that notices it."""
    lines = ["| old | new | noticed by |", "|---|---|---|"]
    for mutant, killer in rows:
        old, new = (f"`{text.replace('|', chr(92) + '|')}`" for text in (mutant.old, mutant.new))
        lines.append(f"| {old} | {new} | {killer or mutant.reason or '**nothing**'} |")
    return "\n".join(lines)


def summary(results):
    """The share of the faults that tests notice, in a sentence."""
    counted = [killer for mutant, killer in results if killer or not mutant.reason]
    killed, same = sum(map(bool, counted)), len(results) - len(counted)
    sentence = f"{killed} of {len(counted)} faults are noticed ({killed / len(counted):.1%})"
    return sentence + f"; {same} more change nothing that could be noticed."


def report(results, how_long):
    command = "Written by `python -m tools.mutate --output docs/mutations.md`, "
    parts = ["# One broken line at a time", command + how_long, summary(results)]
    for place in dict.fromkeys(mutant.place for mutant, _ in results):
        rows = [row for row in results if row[0].place == place]
        title = "the part that the four scripts share" if place == "shared" else place
        parts += [f"## {title}", table(rows)]
    return "\n\n".join(parts) + "\n"


def main(args):
    mutants = read_mutants((ROOT / "tools" / "mutants.txt").read_text())
    mutants = [mutant for mutant in mutants if args.only in " ".join(mutant[:3])]
    if not mutants:
        fail(f"no fault has {args.only} in it")
    try:
        for mutant in mutants:
            apply(mutant, ROOT)
    except (ValueError, SyntaxError) as error:
        fail(f"mutants.txt does not fit: {error}")
    with tempfile.TemporaryDirectory() as temporary:
        folders, start = Queue(), time.time()
        for i in range(args.workers):
            ignored = shutil.ignore_patterns(".*", "runs", "docs", "__pycache__")
            folders.put(shutil.copytree(ROOT, Path(temporary, str(i)), ignore=ignored))
        if killer := run_tests(folders.queue[0], "", args.timeout):
            fail(f"nothing is broken, yet a test fails: {killer}")
        with ThreadPoolExecutor(args.workers) as pool:
            verdicts = pool.map(lambda mutant: judge(mutant, folders, args.timeout), mutants)
            results = []
            for mutant, killer in zip(mutants, verdicts):
                results.append((mutant, killer))
                minutes = (time.time() - start) / 60
                print(f"{len(results)}/{len(mutants)} {minutes:.1f} min  {mutant.place}", end=": ")
                print(f"{mutant.old} ==> {mutant.new}: {killer or 'NOTHING'}", flush=True)
    print(summary(results))
    if args.output:
        how_long = f"in {minutes:.0f} minutes with {args.workers} workers."
        Path(args.output).write_text(report(results, how_long))
    return any(not killer and not mutant.reason for mutant, killer in results)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
