"""Steps per second with more workers, what they send each other, and what that would come to.

Run: python -m tools.scale --workers 1 2 --output docs/scale.csv

Each run is one of torchrun's on this machine. What is sent is counted in the first worker: calls
and bytes of the all-reduce and all-gather operations of an iteration. The model of many workers is
that of a ring or a tree (Thakur et al. 2005): an all-reduce of n bytes among K takes 2 (K−1) α or
2 ⌈log₂ K⌉ α, and 2 (K−1)/K n/β, with α and β from the times that two workers here take for a
message of one number and for one of a million. An all-gather of n bytes each takes (K−1) n/β, and
as much α as half an all-reduce.
"""

import csv
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from tools import fail

COLUMNS = ["setting", "workers", "steps_per_second", "iteration", "reduces", "reduced"]
COLUMNS += ["gathers", "gathered", "waiting", "one_number", "million_numbers"]
PONG = dict(env_id="ale_py:ALE/Pong-v5", num_steps=128, policy_epochs=4, value_epochs=4)
SETTINGS = {  # script, options, environment steps of each worker
    "ppo, CartPole-v1": ("ppo", {}, 30_000),
    "trpo, CartPole-v1": ("trpo", {}, 30_000),
    "ppo, HalfCheetah-v5": ("ppo", dict(env_id="HalfCheetah-v5"), 20_000),
    "trpo, HalfCheetah-v5": ("trpo", dict(env_id="HalfCheetah-v5"), 20_000),
    "ppo, Pong": ("ppo", PONG, 2_500),
}
MANY = 8, 64, 1000


@dataclass
class Args:
    workers: tuple[int, ...] = (1, 2)  # numbers of workers to try
    repeats: int = 3  # runs of each
    only: str = ""  # settings whose name has this in it
    output: str = "scale.csv"  # file with a row for each run; tables of medians are printed
    child: str = ""  # what a worker is to do, as this tool itself tells it


def watched(name, size, counts):
    """Count the calls of an operation of torch.distributed, their bytes and their seconds."""
    original = getattr(torch.distributed, name)

    def operation(*args):
        before = time.perf_counter()
        original(*args)
        counts[name] = [x + y for x, y in zip(counts[name], (1, size(args), 0))]
        counts[name][2] += time.perf_counter() - before

    counts[name] = [0, 0, 0.0]
    setattr(torch.distributed, name, operation)


def work(task):
    """Be a worker: train, and let the first one write down what was sent."""
    script, counts = importlib.import_module(task["script"]), {}
    watched("all_reduce", lambda args: args[0].nbytes, counts)
    watched("all_gather_object", lambda args: len(json.dumps(args[1], default=nbytes)), counts)
    run_dir, result = task["options"]["run_dir"], {}
    init_process_group = torch.distributed.init_process_group

    def init_and_time(backend):
        init_process_group(backend)
        for column, size in (("one_number", 1), ("million_numbers", 10**6)):
            message, times = torch.ones(size), []
            for _ in range(60):
                before = time.perf_counter()
                torch.distributed.all_reduce(message)
                times.append(time.perf_counter() - before)
            result[column] = statistics.median(times)
        counts["all_reduce"] = [0, 0, 0.0]  # those of the run alone

    torch.distributed.init_process_group = init_and_time
    script.main(script.Args(**task["options"]))
    if os.environ["RANK"] == "0":
        with open(Path(run_dir, "metrics.csv"), newline="") as file:
            rows = [{k: float(x or "nan") for k, x in row.items()} for row in csv.DictReader(file)]
        first, last, n = rows[0], rows[-1], len(rows)
        seconds = last["seconds"] - first["seconds"]
        result |= dict(steps_per_second=(last["step"] - first["step"]) / seconds)
        result |= dict(iteration=seconds / (n - 1), waiting=sum(x[2] for x in counts.values()) / n)
        for name, columns in [
            ("all_reduce", ("reduces", "reduced")),
            ("all_gather_object", ("gathers", "gathered")),
        ]:
            result |= {column: x / n for column, x in zip(columns, counts[name])}
        Path(task["result"]).write_text(json.dumps(result))


def nbytes(x):
    """An array or a tensor as so many characters."""
    return "x" * x.nbytes


def measure(setting, count):
    """A run of torchrun. Returns a row."""
    script, options, steps = SETTINGS[setting]
    with tempfile.TemporaryDirectory() as folder:
        options = options | dict(run_dir=f"{folder}/run", total_steps=steps * count)
        task = json.dumps(dict(script=script, options=options, result=f"{folder}/result"))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, f"--nproc-per-node={count}", "-m", "tools.scale", "--child", task]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            fail(f"{setting} with {count} workers ended with {done.stderr.strip()[:1500]}")
        row = json.loads(Path(folder, "result").read_text())
    return dict(setting=setting, workers=count) | row


def medians(rows):
    """{setting: {workers: {column: median of the runs}}}"""
    groups = {}
    for row in rows:
        group = groups.setdefault(row["setting"], {}).setdefault(int(row["workers"]), [])
        group.append({column: float(row.get(column) or "nan") for column in COLUMNS[2:]})
    return {
        setting: {
            count: {column: statistics.median(run[column] for run in runs) for column in runs[0]}
            for count, runs in by_count.items()
        }
        for setting, by_count in groups.items()
    }


def seconds_of_messages(two, count, rounds):
    """What an iteration spends on messages among so many workers, by the model."""
    alpha = two["one_number"] / 2
    per_byte = max(two["million_numbers"] - two["one_number"], 0) / 4e6
    latency = (two["reduces"] + two["gathers"] / 2) * rounds * alpha
    reduced = 2 * (count - 1) / count * two["reduced"] * per_byte
    return latency + reduced + (count - 1) * two["gathered"] * per_byte


def tables(rows):
    """What was measured, and what the model says of many workers, as Markdown."""
    found = medians(rows)
    lines = ["| | workers | steps/s | of one, times | s an iteration | waiting, s | all-reduces |"]
    lines[0] += " KiB | all-gathers | KiB |"
    lines.append("|" + "---|" * 10)
    for setting, runs in found.items():
        for count, x in runs.items():
            times = x["steps_per_second"] / runs[1]["steps_per_second"]
            cells = [setting, count, f"{x['steps_per_second']:,.0f}", f"{times:.2f}"]
            cells += [f"{x['iteration']:.3g}", f"{x['waiting']:.2g}", f"{x['reduces']:.0f}"]
            cells += [f"{x['reduced'] / 1024:,.0f}", f"{x['gathers']:.0f}"]
            cells += [f"{x['gathered'] / 1024:,.0f}"]
            known = ("" if cell == "nan" else f" {cell}" for cell in cells)  # one sends nothing
            lines.append("|" + " |".join(known) + " |")
    lines += ["", "| an iteration takes longer than alone, times |"]
    lines[-1] += "".join(f" {count}, ring | {count}, tree |" for count in MANY)
    lines.append("|" + "---|" * (1 + 2 * len(MANY)))
    for setting, runs in found.items():
        cells = [setting]
        for count in MANY if 2 in runs else ():
            for rounds in (2 * (count - 1), 2 * math.ceil(math.log2(count))):
                more = seconds_of_messages(runs[2], count, rounds)
                cells.append(f"{1 + more / runs[1]['iteration']:.3g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args):
    if args.child:
        return work(json.loads(args.child))
    if args.repeats < 1 or not args.workers or min(args.workers) < 1:
        fail("--repeats and --workers must be at least 1")
    settings = [setting for setting in SETTINGS if args.only in setting]
    if not settings:
        fail(f"no setting has {args.only!r} in its name")
    if not Path(args.output).parent.is_dir():
        fail(f"there is no folder {Path(args.output).parent} to write {args.output} in")
    rows = []
    for setting in settings:
        for _ in range(args.repeats):
            for count in args.workers:
                rows.append(measure(setting, count))
                with open(args.output, "w", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    writer.writeheader()
                    writer.writerows(rows)
    print(tables(rows))
    print(f"all runs: {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
