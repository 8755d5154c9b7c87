"""Train scripts × environments × seeds in parallel processes; what is done is not done again.

Run: python -m tools.sweep benchmark
     python -m tools.sweep --scripts ppo "ppo --clip-eps 0.1" --envs CartPole-v1 --seeds 5

A finished run leaves RESULTS/NAME/ENV/SCRIPT/seedN, with config.json and three columns of
metrics.csv (of long runs every k-th row), and a line in RESULTS/NAME/runs.csv: its command, what it
came to, versions. An interrupted one starts anew, so each curve is what its command gives.
"""

import csv
import importlib.metadata
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import tyro

from tools import fail

FOUR = ["vanilla_pg", "is_pg", "trpo", "ppo"]
TASKS = ["HalfCheetah", "Hopper", "InvertedDoublePendulum", "InvertedPendulum", "Reacher"]
TASKS += ["Swimmer", "Walker2d"]  # the seven of Schulman et al. 2017, section 6.1
MUJOCO = [f"{task}-v5 --total-steps 1000000" for task in TASKS]
RANDOM = [f"{task}-v5 --total-steps 150000" for task in TASKS]  # 100 episodes, 1,000 steps each
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


def reuse(*step_sizes):
    """Scripts for the question what ten steps on one batch of 8 × 256 transitions come to."""
    batch = [f"--num-steps 256 --policy-lr {size} --policy-epochs" for size in step_sizes]
    vanilla = [f"vanilla_pg {options} {epochs}" for options in batch for epochs in (1, 10)]
    weighted = [f"is_pg {options} 10" for options in batch]
    return [*vanilla, *weighted, "trpo", "ppo", f"ppo --policy-lr {step_sizes[-1]}"]


def weightings(step_size):
    """The same ten steps with each kind of importance weight."""
    options = f"is_pg --num-steps 256 --policy-lr {step_size} --policy-epochs 10 --weighting"
    return [f"{options} {weighting}" for weighting in ("step", "trajectory", "per-decision")]


# sb3-contrib's TRPO in RL Baselines3 Zoo: these for Hopper and Walker2d, for Swimmer another γ
ZOO = "trpo --gamma 0.99 --value-epochs 20 --minibatch-size 128 --cg-iters 25 --num-envs 2"
ZOO += " --num-steps 1024 --max-kl 0.01"
SWIMMER = ["trpo --gamma 0.9999", ZOO.replace("0.99", "0.9999")]
CONSTRAINTS = ["ppo --clip-eps 0.1", "ppo --clip-eps 0.3", "ppo --clip-eps inf"]
CONSTRAINTS += ["trpo --max-kl 0.003", "trpo --max-kl 0.01", "trpo --max-kl 0.03"]
SUITES = {  # scripts, environments, number of seeds
    "benchmark": [(FOUR, CLASSIC, 5), (FOUR, MUJOCO, 3)],
    "random": [(["vanilla_pg --policy-lr 0 --value-epochs 1"], RANDOM, 3)],
    "table1": [(CONSTRAINTS, MUJOCO, 3)],  # with the defaults, which are in benchmark
    "reuse": [
        (reuse("3e-3", "1e-2"), ["CartPole-v1"], 10),
        (reuse("1e-3", "3e-3"), ["HalfCheetah-v5 --total-steps 300000"], 10),
    ],
    "weightings": [
        (weightings("3e-3"), ["CartPole-v1"], 10),
        (weightings("1e-3"), ["HalfCheetah-v5 --total-steps 300000"], 10),
    ],
    "trpo": [
        (SWIMMER, ["Swimmer-v5 --total-steps 1000000"], 3),
        ([ZOO], [f"{task}-v5 --total-steps 1000000" for task in ("Hopper", "Walker2d")], 3),
        (["trpo --max-kl 0.01"], [LANDER], 5),
    ],
    "others": [(["trpo", "ppo"], OTHERS, 3), (["ppo"], [PONG], 1)],
}
PACKAGES = ["torch", "gymnasium", "numpy", "mujoco", "box2d", "ale-py", "minigrid"]
COLUMNS = ["command", "exit_code", "step", "episodes", "return_last100", "seconds", "versions"]
MOST_ROWS = 1000  # of a curve that is kept


@dataclass
class Args:
    suite: tyro.conf.Positional[str] = ""  # benchmark random table1 reuse weightings trpo others
    scripts: tuple[str, ...] = ()  # for a sweep of your own: trpo "ppo --clip-eps 0.1"
    envs: tuple[str, ...] = ()  # and so: CartPole-v1 "Hopper-v5 --total-steps 1000000"
    seeds: int = 3  # 1, 2, … so many
    name: str = "sweep"  # folder in RESULTS of a sweep of your own
    jobs: int = os.cpu_count() or 1  # runs at the same time
    results: str = "results"  # folder that the results are kept in
    runs: str = "runs/sweep"  # folder of the whole runs, with their checkpoints
    only: str = ""  # just the commands that have this in them


class Run(NamedTuple):
    command: str  # as one would type it
    place: Path  # ENV/SCRIPT/seedN


def slug(words):
    return re.sub(r"[^\w.]+", "-", words).strip("-")


def expand(scripts, envs, seeds):
    """The runs of scripts × environments × seeds; all of a seed, then all of the next."""
    for seed, env, script in product(range(1, seeds + 1), envs, scripts):
        env_id, *options = shlex.split(env)
        kwargs = options[options.index("--env-kwargs") + 1] if "--env-kwargs" in options else ""
        kwargs = "" if "ALE/" in env_id else kwargs
        name, *own = shlex.split(script)
        words = ["python", f"{name}.py", "--env-id", env_id, *options, *own, "--seed", str(seed)]
        place = Path(slug(env_id + kwargs), slug(script), f"seed{seed}")
        yield Run(shlex.join(words), place)


def commit():
    """The commit of the scripts, with a + if they have changed since; empty without git."""
    answers = []
    for words in ("rev-parse --short HEAD", "status --porcelain -- :(glob)*.py common"):
        try:
            done = subprocess.run(["git", *words.split()], capture_output=True, text=True)
        except OSError:
            return ""
        if done.returncode:
            return ""
        answers.append(done.stdout.strip())
    return f"commit {answers[0]}{'+' * bool(answers[1])}"


def versions():
    known = [f"python {platform.python_version()}", *filter(None, [commit()])]
    for package in PACKAGES:
        try:
            known.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(known)


def keep(run_dir, place):
    """Copy config.json and three columns of the metrics. Returns what the run came to."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    stride = math.ceil(len(rows) / MOST_ROWS)
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "metrics.csv", "w") as file:
        file.write("step,episodes,return_last100\n")
        for end in range((len(rows) - 1) % stride, len(rows), stride):  # the last one is in
            merged = rows[max(end - stride + 1, 0) : end + 1]
            episodes = sum(int(row["episodes"]) for row in merged)
            file.write(f"{rows[end]['step']},{episodes},{rows[end]['return_last100']}\n")
    shutil.copy(run_dir / "config.json", place)
    last = {key: rows[-1][key] for key in ("step", "return_last100", "seconds")}
    return last | dict(episodes=sum(int(row["episodes"]) for row in rows))


def train(run, runs, children):
    """Run the command to its end in a folder of its own. Returns exit code and its last words."""
    run_dir = runs / run.place
    shutil.rmtree(run_dir, ignore_errors=True)  # an interrupted one
    _, script, *options = shlex.split(run.command)
    words = [sys.executable, script, *options, "--run-dir", str(run_dir)]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    children.append(child)
    said, _ = child.communicate()
    children.remove(child)
    return child.returncode, (said.strip().splitlines() or [""])[-1]


def main(args):
    if bool(args.suite) == bool(args.scripts and args.envs):
        fail(f"name a suite ({', '.join(SUITES)}), or give --scripts and --envs")
    if args.suite not in ("", *SUITES):
        fail(f"there is no suite {args.suite}, only {', '.join(SUITES)}")
    if args.jobs < 1 or args.seeds < 1:
        fail("--jobs and --seeds must be at least 1")
    groups = SUITES[args.suite] if args.suite else [(args.scripts, args.envs, args.seeds)]
    results, runs = Path(args.results, args.suite or args.name), Path(args.runs)
    results.mkdir(parents=True, exist_ok=True)
    ledger, done = results / "runs.csv", set()
    if ledger.exists():
        with open(ledger, newline="") as file:
            done = {row["command"] for row in csv.DictReader(file)}
    wanted = [run for group in groups for run in expand(*group) if args.only in run.command]
    todo, children, failures = [run for run in wanted if run.command not in done], [], 0
    if shared := [run.place for run in wanted if [x.place for x in wanted].count(run.place) > 1]:
        fail(f"{shared[0]} would be the folder of two runs: have them differ in --scripts")
    if taken := [run for run in todo if (results / run.place).exists()]:
        where, command = results / taken[0].place, taken[0].command
        fail(f"{where} has another run than `{command}`: give a --name, or remove it")
    print(f"{len(wanted)} runs, of which {len(wanted) - len(todo)} are done")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    pool = ThreadPoolExecutor(args.jobs)
    futures = {pool.submit(train, run, runs / results.name, children): run for run in todo}
    try:
        for count, future in enumerate(as_completed(futures), 1):
            run, (code, words) = futures[future], future.result()
            print(f"{count}/{len(todo)}  {run.command}  ", end="")
            metrics = runs / results.name / run.place / "metrics.csv"
            diverged = code == 1 and "NaN or infinity at step" in words  # which is a result
            if not (code == 0 or diverged) or not metrics.exists() or metrics.stat().st_size == 0:
                failures += 1
                print(f"FAILED, exit code {code}: {words}", flush=True)
                continue
            row = keep(metrics.parent, results / run.place)
            row |= dict(command=run.command, exit_code=code, versions=versions())
            print(f"return {float(row['return_last100'] or 'nan'):.1f}", flush=True)
            with open(ledger, "a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in [*children]:
            child.terminate()
        print(f"\nstopped; the same command goes on: {ledger} has what is done")
        raise SystemExit(130) from None
    if failures:
        fail(f"{failures} runs failed; the same command tries them again", 1)


if __name__ == "__main__":
    main(tyro.cli(Args))
