"""Train scripts × environments × seeds in parallel, without doing twice what is done.

Run: python -m tools.sweep benchmark
     python -m tools.sweep --scripts ppo "ppo --clip-eps 0.1" --envs CartPole-v1 --seeds 5

A finished run leaves RESULTS/NAME/ENV/SCRIPT/seedN, with config.json and three columns
of metrics.csv (of long runs every k-th row), and a line in RESULTS/NAME/runs.csv: its
command, what it came to, versions. An interrupted run starts anew, so each curve is what its
command gives.
"""

import csv
import importlib.metadata
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import zlib
from collections import Counter
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import tyro

from tools import add_row, fail, parse, printing_utf_8

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

FOUR = ["vanilla_pg", "is_pg", "trpo", "ppo"]
SEVEN = [  # of Schulman et al. 2017, section 6.1
    "HalfCheetah",
    "Hopper",
    "InvertedDoublePendulum",
    "InvertedPendulum",
    "Reacher",
    "Swimmer",
    "Walker2d",
]
NINE = ["Ant", "Humanoid", *SEVEN]
MUJOCO = [f"{task}-v5 --total-steps 1000000" for task in NINE]
TABLE1 = [f"{task}-v5 --total-steps 1000000" for task in SEVEN]
# As in v2 and v3, where these forces were 0 (openai/gym#1541)
NO_FORCES = '{"include_cfrc_ext_in_observation":false}'
AS_IN_V3 = [
    f"{task}-v5 --env-kwargs '{NO_FORCES}' --total-steps 1000000" for task in ("Ant", "Humanoid")
]
# Enough for 100 episodes of up to 1,000 steps
RANDOM = [f"{task}-v5 --total-steps 150000" for task in NINE]
LANDER = "LunarLander-v3 --total-steps 300000"
CLASSIC = ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", LANDER]
OTHERS = [
    "LunarLanderContinuous-v3 --total-steps 1000000",
    "FrozenLake-v1",
    """FrozenLake-v1 --env-kwargs '{"is_slippery":false}'""",
    "CliffWalking-v1 --total-steps 500000",
    "Blackjack-v1",
    "minigrid:MiniGrid-Empty-5x5-v0 --wrappers minigrid.wrappers:ImgObsWrapper"
    " --total-steps 100000",
]
PONG = (
    """ale_py:ALE/Pong-v5 --env-kwargs '{"img_height":42,"img_width":42}' --num-steps 128"""
    " --policy-epochs 4 --value-epochs 4 --entropy-coef 0.01 --gamma 0.99 --total-steps 1000000"
)


def reuse(*learning_rates):
    """Scripts that show what ten steps on one batch of 8 × 256 transitions come to."""
    batch = [f"--num-steps 256 --policy-lr {lr} --policy-epochs" for lr in learning_rates]
    vanilla = [f"vanilla_pg {options} {epochs}" for options in batch for epochs in (1, 10)]
    weighted = [f"is_pg {options} 10" for options in batch]
    return [*vanilla, *weighted, "trpo", "ppo", f"ppo --policy-lr {learning_rates[-1]}"]


def weightings(learning_rate):
    """The same ten steps with each kind of importance weight."""
    options = f"--num-steps 256 --policy-lr {learning_rate} --policy-epochs 10"
    kinds = ("step", "trajectory", "per-decision")
    return [f"is_pg {options} --weighting {kind}" for kind in kinds]


# RL Baselines3 Zoo's TRPO, of sb3-contrib: for Swimmer it has another γ
ZOO = (
    "trpo --gamma 0.99 --value-epochs 20 --minibatch-size 128 --cg-iters 25 --num-envs 2"
    " --num-steps 1024 --max-kl 0.01"
)
SWIMMER = ["trpo --gamma 0.9999", ZOO.replace("0.99", "0.9999")]
CLIPS = [f"ppo --clip-eps {clip_eps}" for clip_eps in ("0.1", "0.3", "inf")]
REGIONS = [f"trpo --max-kl {max_kl}" for max_kl in ("0.003", "0.01", "0.03")]
SLOWER = ["vanilla_pg --policy-lr 2e-3 --num-steps 64", "is_pg --policy-lr 1e-3"]
SUITES = {  # scripts, environments, number of seeds
    "benchmark": [(FOUR, CLASSIC, 5), (FOUR[:2], MUJOCO, 3), (FOUR[2:], MUJOCO, 5)],
    "random": [(["vanilla_pg --policy-lr 0 --value-epochs 1"], RANDOM, 3)],
    "table1": [([*CLIPS, *REGIONS], TABLE1, 3)],  # the defaults are in benchmark
    "reuse": [
        (reuse("3e-3", "1e-2"), ["CartPole-v1"], 10),
        (reuse("1e-3", "3e-3"), ["HalfCheetah-v5 --total-steps 300000"], 10),
    ],
    "weightings": [
        (weightings("3e-3"), ["CartPole-v1"], 10),
        (weightings("1e-3"), ["HalfCheetah-v5 --total-steps 300000"], 10),
    ],
    "as_in_v3": [(["trpo", "ppo"], AS_IN_V3, 3)],
    "trpo": [
        (SWIMMER, ["Swimmer-v5 --total-steps 1000000"], 3),
        ([ZOO], [f"{task}-v5 --total-steps 1000000" for task in ("Hopper", "Walker2d")], 3),
        (["trpo --max-kl 0.01"], [LANDER], 5),
    ],
    "solved": [  # with other options, since the defaults fail
        (["ppo --entropy-coef 0.05"], ["CliffWalking-v1 --total-steps 500000"], 3),
        (["trpo"], ["LunarLander-v3 --total-steps 1000000"], 3),
        (["ppo --gae-lambda 0.98"], ["LunarLanderContinuous-v3 --total-steps 1000000"], 3),
        (SLOWER, ["Pendulum-v1 --total-steps 1000000"], 3),
        (["trpo --gamma 0.9999 --gae-lambda 0.99"], ["Swimmer-v5 --total-steps 1000000"], 3),
    ],
    "others": [(["trpo", "ppo"], OTHERS, 3), (["ppo"], [PONG], 1)],
}
PACKAGES = ["torch", "gymnasium", "numpy", "mujoco", "box2d", "ale-py", "minigrid"]
COLUMNS = ["command", "exit_code", "step", "episodes", "return_last100", "seconds", "versions"]
MOST_ROWS = 1000  # that are kept of a curve


@dataclass
class Args:
    # one of these: benchmark random table1 reuse weightings as_in_v3 trpo solved others
    suite: tyro.conf.Positional[str] = ""
    scripts: tuple[str, ...] = ()  # of a sweep of your own: trpo "ppo --clip-eps 0.1"
    envs: tuple[str, ...] = ()  # its environments: CartPole-v1 "Hopper-v5 --total-steps 1000000"
    seeds: int = 3  # of a sweep of your own: how many, 1, 2, …
    name: str = "sweep"  # of a sweep of your own: its folder in RESULTS
    jobs: int = os.cpu_count() or 1  # runs at the same time
    results: str = "results"  # folder of the results
    runs: str = "runs/sweep"  # folder of the whole runs, with their checkpoints
    only: str = ""  # run only the commands that contain this


class Run(NamedTuple):
    command: str  # as one would type it
    place: Path  # ENV/SCRIPT/seedN


def slug(words):
    return re.sub(r"[^\w.]+", "-", words).strip("-")


def expand(scripts, envs, seeds):
    """The runs of scripts × environments × seeds, one seed after the other."""
    for seed, env, script in product(range(1, seeds + 1), envs, scripts):
        env_id, *options = shlex.split(env)
        name, *own = shlex.split(script)
        words = ["python", f"{name}.py", "--env-id", env_id, *options, *own, "--seed", str(seed)]
        env_name = env_id
        if "--env-kwargs" in options and "ALE/" not in env_id:
            env_name += options[options.index("--env-kwargs") + 1]
        place = Path(slug(env_name), slug(script), f"seed{seed}")
        yield Run(shlex.join(words), place)


def commit():
    """The commit of the scripts, with a + if they have changed since; empty without git."""
    answers = []
    for words in ("rev-parse --short HEAD", "status --porcelain -- :(glob)*.py common"):
        try:
            done = subprocess.run(["git", *words.split()], capture_output=True, encoding="utf-8")
        except OSError:
            return ""
        if done.returncode:
            return ""
        answers.append(done.stdout.strip())
    revision, changes = answers
    return f"commit {revision}+" if changes else f"commit {revision}"


def versions():
    known = [f"python {platform.python_version()}"]
    revision = commit()
    if revision:
        known.append(revision)
    for package in PACKAGES:
        try:
            known.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(known)


def keep(run_dir, place):
    """Keep config.json and three metrics of a run. Returns what the run came to."""
    with open(run_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    stride = math.ceil(len(rows) / MOST_ROWS)
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "metrics.csv", "w", encoding="utf-8", newline="\n") as file:
        file.write("step,episodes,return_last100\n")
        for end in range((len(rows) - 1) % stride, len(rows), stride):  # up to the last row
            merged = rows[max(end - stride + 1, 0) : end + 1]
            episodes = sum(int(row["episodes"]) for row in merged)
            file.write(f"{rows[end]['step']},{episodes},{rows[end]['return_last100']}\n")
    shutil.copy(run_dir / "config.json", place)
    return dict(
        step=rows[-1]["step"],
        episodes=sum(int(row["episodes"]) for row in rows),
        return_last100=rows[-1]["return_last100"],
        seconds=rows[-1]["seconds"],
    )


class Children:
    """The processes of the runs, which several threads start."""

    def __init__(self):
        self.running = []
        self.is_over = threading.Event()

    def start(self, words):
        """A process whose output is a pipe. Those that start too late for `end` end here."""
        if self.is_over.is_set():
            raise CancelledError
        pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
        # A library may print what is not UTF-8, and the run is good all the same
        child = subprocess.Popen(words, **pipe, errors="replace", env=printing_utf_8())
        self.running.append(child)
        if self.is_over.is_set():
            child.terminate()
        return child

    def end(self):
        """End all of them. From now on, none starts."""
        self.is_over.set()
        for child in [*self.running]:  # a copy: the threads remove those that end
            child.terminate()


def train(run, runs, children):
    """Run the command to its end in a new folder. Returns exit code and last line."""
    run_dir = runs / run.place
    if run_dir.exists():  # left by an interrupted run
        shutil.rmtree(run_dir)
    _, script, *options = shlex.split(run.command)
    words = [sys.executable, script, *options, "--run-dir", str(run_dir)]
    child = children.start(words)
    output, _ = child.communicate()
    children.running.remove(child)
    lines = output.strip().splitlines()
    return child.returncode, lines[-1] if lines else ""


def has_result(code, words, metrics):
    """Whether the run came to its end, or diverged, which is a result too."""
    diverged = code == 1 and "NaN or infinity" in words
    over = code == 0 or diverged
    return over and metrics.exists() and metrics.stat().st_size > 0


def append(ledger, row):
    add_row(ledger, row, COLUMNS)


def commands_of(ledger):
    """The commands of the runs that are done; a row that lacks cells, as a full disk may leave
    it, is not one. Exits if the last row breaks off within quotation marks.
    """
    try:
        with open(ledger, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames
            rows = list(reader)
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, csv.Error) as error:
        fail(f"cannot read {ledger}: {error}: restore it, or remove a line that is cut off")
    if columns not in (None, COLUMNS):  # None: the file is empty
        known = ",".join(COLUMNS)
        fail(f"{ledger} must begin with {known}, without a byte order mark: restore it")
    return {row["command"] for row in rows if None not in row.values()}


def check_arguments(args):
    given = [bool(x) for x in (args.suite, args.scripts, args.envs)]
    if given not in ([True, False, False], [False, True, True]):
        fail(f"name a suite ({', '.join(SUITES)}), or give --scripts and --envs")
    if args.suite not in ("", *SUITES):
        fail(f"there is no suite {args.suite}, only {', '.join(SUITES)}")
    if args.suite and (args.seeds, args.name) != (Args.seeds, Args.name):
        fail("--seeds and --name are for a sweep of your own: a suite has its own")
    if args.jobs < 1 or args.seeds < 1:
        fail("--jobs and --seeds must be at least 1")
    for line in (*args.scripts, *args.envs):
        check_words(line)


def check_words(line):
    """Exit if a script or an environment cannot be read."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        fail(f"cannot read {line!r}: {error}")
    if not words:
        fail("a script or an environment is empty")
    if words[-1] == "--env-kwargs":
        fail(f"--env-kwargs has no value in {line!r}")


def refuse_shared_folders(wanted, todo, results):
    """Exit if two runs have one folder, or if a new run would overwrite another."""
    counts = Counter(run.place for run in wanted)
    for place, count in counts.items():
        if count > 1:
            fail(f"{place} would be the folder of two runs: have them differ in --scripts")
    for run in todo:
        where = results / run.place
        try:
            is_taken = where.exists()
        except OSError as error:
            fail(f"`{run.command}` cannot have a folder: {error.strerror}")
        if is_taken:
            fail(f"{where} has another run than `{run.command}`: give a --name, or remove it")


def claim_folder(todo, runs, results, file):
    """Write in the file which results these whole runs belong to.

    Exits if they belong to other results that still exist, or if no sweep has made them: new runs
    would replace them.
    """
    if not todo:
        return
    file.seek(0)
    owner = file.read()
    found = [runs / run.place for run in todo if (runs / run.place).exists()]
    if found and not owner:
        fail(f"{found[0]} is a run that no sweep has made: give another --runs")
    if owner and Path(owner) != results.resolve() and Path(owner, "runs.csv").exists():
        fail(f"{runs} has the whole runs of {owner}: give another --runs")
    file.truncate(0)
    file.write(str(results.resolve()))
    file.flush()


def claim(todo, file):
    """Lock a byte of the file for each run's folder, so that no other sweep trains there too.

    The system unlocks them when this process ends, however it ends.
    """
    for run in todo if fcntl else []:
        byte = zlib.crc32(run.place.as_posix().encode())
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):
            way_out = "wait for it, choose others with --only, or give another --name"
            fail(f"another sweep trains in the folder of `{run.command}`: {way_out}")
        except OSError:  # a network drive may have no locks
            return


def record(run, code, known, run_dir, results):
    """Keep the curve of a run and its line, or neither. Returns what the run came to."""
    how = dict(command=run.command, exit_code=code, versions=known)
    try:
        outcome = keep(run_dir, results / run.place)
        append(results / "runs.csv", how | outcome)
    except BaseException:  # Ctrl-C too: the next sweep would take the curve for another run's
        shutil.rmtree(results / run.place, ignore_errors=True)
        raise
    return outcome


def train_and_date(run, runs, children):
    """Versions, exit code and last line."""
    known = versions()  # now, since the scripts may change before the run ends
    return known, *train(run, runs, children)


def run_all(todo, jobs, runs, results):
    """Train side by side, keeping each result. Returns the number of failures."""
    children = Children()
    failures = 0
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(train_and_date, run, runs, children): run for run in todo}
        for count, future in enumerate(as_completed(futures), 1):
            run = futures[future]
            known, code, words = future.result()
            metrics = runs / run.place / "metrics.csv"
            if has_result(code, words, metrics):
                outcome = record(run, code, known, metrics.parent, results)
                end = f"return {float(outcome['return_last100'] or 'nan'):.1f}"
            else:
                failures += 1
                end = f"FAILED, exit code {code}: {words}"
            with suppress(OSError):  # whoever read the output may be gone
                print(f"{count}/{len(todo)}  {run.command}  {end}", flush=True)
    except BaseException:  # Ctrl-C, or a full disk: end all runs
        pool.shutdown(wait=False, cancel_futures=True)
        children.end()
        raise
    return failures


def make_results(folder):
    """Make the folder, and see now that files can be written in it, not after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        fail(f"cannot write in {folder}: {error}")


def main(args):
    check_arguments(args)
    groups = SUITES[args.suite] if args.suite else [(args.scripts, args.envs, args.seeds)]
    wanted = [run for group in groups for run in expand(*group) if args.only in run.command]
    if not wanted:
        fail(f"no command has {args.only!r} in it")
    results = Path(args.results, args.suite or args.name)
    runs = Path(args.runs, results.name)
    if runs.resolve() == results.resolve():
        fail(f"--results and --runs would both be in {runs}: give two folders")
    ledger = results / "runs.csv"
    done = commands_of(ledger)
    todo = [run for run in wanted if run.command not in done]
    refuse_shared_folders(wanted, todo, results)
    if todo:
        make_results(results)
    print(f"{len(wanted)} runs, of which {len(wanted) - len(todo)} are done")
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with open(runs / "claimed", "a+", encoding="utf-8") as file:
            claim(todo, file)
            claim_folder(todo, runs, results, file)
            failures = run_all(todo, args.jobs, runs, results)
    except OSError as error:
        fail(f"cannot keep a run: {error}", 1)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on: {ledger} has what is done")
        raise SystemExit(130) from None
    if failures:
        fail(f"failed runs: {failures}; the same command tries them again", 1)


if __name__ == "__main__":
    main(parse(Args))
