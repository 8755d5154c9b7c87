"""A script as a process of its own, and whatever processes come of it."""

import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
# Processes that start at once, for what they import is there already
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["worker", "vanilla_pg", "is_pg", "trpo", "ppo"])


def wait_for(process, ready, seconds=120):
    """Wait until something is so, while a process of subprocess runs."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it does not get there"
        time.sleep(0.02)


class Job:
    """A command in a session of its own; its processes and theirs are known by a mark."""

    def __init__(self, command, cwd, **env):
        self.mark = dict(JOB=str(uuid.uuid4()))
        env = os.environ | self.mark | dict(PYTHONPATH=str(ROOT / "tests")) | env
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=cwd, env=env, start_new_session=True, **pipes
        )

    def alive(self, **also):
        """Processes with the mark in their environment, and with what else is asked for."""
        wanted = (self.mark | also).items()
        processes = psutil.process_iter(["environ", "status"])  # None where it may not be read
        alive = [x for x in processes if x.info["status"] != psutil.STATUS_ZOMBIE]
        return [x for x in alive if wanted <= (x.info["environ"] or {}).items()]

    def wait_for(self, ready):
        wait_for(self.process, ready)

    def end(self, timeout=60):
        """Its output, when all of it has ended; exit code and orphans are the test's concern."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err


def rows(run_dir):
    """How many lines metrics.csv has; none if there is no such file."""
    path = Path(run_dir, "metrics.csv")
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def main_of(script, arguments, folder, barrier=None):
    """Run a script in a process of CONTEXT; if there is a barrier, at the same time as others."""
    os.chdir(folder)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")
    script = importlib.import_module(script)
    if barrier:
        barrier.wait()
    sys.exit(script.main(script.Args(**arguments)))


def command_line(script, *options):
    """Run a script as `python SCRIPT OPTIONS` does, but here. Returns the exit code."""
    argv, sys.argv = sys.argv, [script, *map(str, options)]
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = argv
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
