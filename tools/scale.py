"""Steps per second with more workers, what they send each other, and what it would come to.

Run: python -m tools.scale --workers 1 2 --output docs/scale.csv

Each run is one of torchrun's on this machine. The first worker counts what it sends: calls and
bytes of the all-reduce and all-gather operations of an iteration. The model of many workers is
that of a ring or a tree (Thakur et al. 2005): among K workers, an all-reduce of n bytes takes
2 (K−1) α or 2 ⌈log₂ K⌉ α, and 2 (K−1)/K n/β. An all-gather of n bytes from each takes (K−1) n/β,
and as much α as an all-reduce, since the sizes are gathered before the objects. α and β come
from the times that two workers here need for a message of one number and for one of a million.
"""

import csv
import importlib
import json
import math
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from tools import fail, keep_row, parse, refuse_missing_folder

SENT = ["reduces", "reduced", "gathers", "gathered"]  # all-reduces, their bytes, and so on
MEASURED = ["steps_per_second", "iteration", *SENT, "waiting", "one_number", "million_numbers"]
COLUMNS = ["setting", "workers", *MEASURED]
PONG = dict(env_id="ale_py:ALE/Pong-v5", num_steps=128, policy_epochs=4, value_epochs=4)
SETTINGS = {  # script, options, environment steps of each worker
    "ppo, CartPole-v1": ("ppo", {}, 30_000),
    "trpo, CartPole-v1": ("trpo", {}, 30_000),
    "ppo, HalfCheetah-v5": ("ppo", dict(env_id="HalfCheetah-v5"), 20_000),
    "trpo, HalfCheetah-v5": ("trpo", dict(env_id="HalfCheetah-v5"), 20_000),
    "ppo, Pong": ("ppo", PONG, 2_500),
}
MANY = 8, 64, 1000  # workers, in the model


@dataclass
class Args:
    workers: tuple[int, ...] = (1, 2)  # numbers of workers to try
    repeats: int = 3  # runs of each
    only: str = ""  # settings whose name has this in it
    output: str = "scale.csv"  # CSV file to write anew, a row for each run; medians are printed
    child: str = ""  # for the tool itself: the task of a worker


def watched(name, size, counts):
    """Count the calls of an operation of torch.distributed, their bytes and seconds."""
    original = getattr(torch.distributed, name)

    def operation(*args):
        before = time.perf_counter()
        original(*args)
        elapsed = time.perf_counter() - before
        calls, sent, seconds = counts[name]
        counts[name] = [calls + 1, sent + size(args), seconds + elapsed]

    counts[name] = [0, 0, 0.0]
    setattr(torch.distributed, name, operation)


def reduced_bytes(args):
    return args[0].nbytes


def gathered_bytes(args):
    """The length of the gathered object in the form in which it is sent."""
    return len(pickle.dumps(args[1]))


def message_times():
    """Median seconds of an all-reduce of one number and of a million."""
    times = {}
    for column, size in (("one_number", 1), ("million_numbers", 10**6)):
        message = torch.ones(size)
        seconds = []
        for _ in range(60):
            before = time.perf_counter()
            torch.distributed.all_reduce(message)
            seconds.append(time.perf_counter() - before)
        times[column] = statistics.median(seconds)
    return times


def means_of_a_run(run_dir, counts):
    """Steps per second, and what an iteration takes, sends and waits."""
    with open(Path(run_dir, "metrics.csv"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    first, last, n = rows[0], rows[-1], len(rows)
    steps = float(last["step"]) - float(first["step"])
    seconds = float(last["seconds"]) - float(first["seconds"])
    reduces, reduced, reducing = counts["all_reduce"]
    gathers, gathered, gathering = counts["all_gather_object"]
    return dict(
        steps_per_second=steps / seconds,
        iteration=seconds / (n - 1),
        waiting=(reducing + gathering) / n,
        reduces=reduces / n,
        reduced=reduced / n,
        gathers=gathers / n,
        gathered=gathered / n,
    )


def work(task):
    """Be a worker: train, and let the first one write down what was sent."""
    script = importlib.import_module(task["script"])
    counts, times = {}, {}
    watched("all_reduce", reduced_bytes, counts)
    watched("all_gather_object", gathered_bytes, counts)
    init_process_group = torch.distributed.init_process_group

    def init_and_time(backend):
        init_process_group(backend)
        times.update(message_times())
        counts["all_reduce"] = [0, 0, 0.0]  # from here on, those of the run

    torch.distributed.init_process_group = init_and_time
    script.main(script.Args(**task["options"]))
    if os.environ["RANK"] == "0":
        result = times | means_of_a_run(task["options"]["run_dir"], counts)
        Path(task["result"]).write_text(json.dumps(result), encoding="utf-8")


def torchrun(command):
    """Run a command of torchrun to its end. Returns the exit code and what it printed as errors."""
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with subprocess.Popen(command, **pipes, encoding="utf-8", errors="replace") as launcher:
        try:
            _, errors = launcher.communicate()
        except BaseException:  # Ctrl-C: its workers would go on if it were killed
            launcher.terminate()
            raise
    return launcher.returncode, errors


def measure(setting, count):
    """A run of torchrun with so many workers. Returns a row."""
    script, options, steps = SETTINGS[setting]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with tempfile.TemporaryDirectory() as folder:
        options = options | dict(run_dir=f"{folder}/run", total_steps=steps * count)
        task = dict(script=script, options=options, result=f"{folder}/result")
        worker = ["-m", "tools.scale", "--child", json.dumps(task)]
        command = [*launcher, f"--nproc-per-node={count}", *worker]
        code, errors = torchrun(command)
        if code:
            fail(f"{setting} with {count} workers ended with {errors.strip()}", 1)
        row = json.loads(Path(folder, "result").read_text(encoding="utf-8"))
    return dict(setting=setting, workers=count) | row


def number(cell):
    """A cell as a number, whether it was just measured or comes from a file. NaN if it is empty."""
    return math.nan if cell in (None, "") else float(cell)


def medians(rows):
    """{setting: {workers: {column: median of the runs}}}"""
    groups = defaultdict(list)
    for row in rows:
        numbers = {column: number(row.get(column)) for column in MEASURED}
        groups[row["setting"], int(row["workers"])].append(numbers)
    found = defaultdict(dict)
    for (setting, count), runs in groups.items():
        found[setting][count] = {
            column: statistics.median(run[column] for run in runs) for column in MEASURED
        }
    return found


def seconds_of_messages(two, count, rounds):
    """What an iteration spends on messages among so many workers, by the model."""
    alpha = two["one_number"] / 2
    per_byte = max(two["million_numbers"] - two["one_number"], 0) / 4e6
    latency = (two["reduces"] + two["gathers"]) * rounds * alpha
    reduced = 2 * (count - 1) / count * two["reduced"] * per_byte
    return latency + reduced + (count - 1) * two["gathered"] * per_byte


def tables(rows):
    """What was measured, and what the model says of many workers, as Markdown."""
    found = medians(rows)
    return "\n".join([*measured_lines(found), "", *model_lines(found)])


def measured_lines(found):
    heads = ["workers", "steps/s", "multiple of one worker's", "s an iteration", "waiting, s"]
    heads += ["all-reduces", "KiB", "all-gathers", "KiB"]
    lines = [f"| | {' | '.join(heads)} |", "|" + "---|" * (1 + len(heads))]
    for setting, runs in found.items():
        for count, x in runs.items():
            cells = [
                setting,
                count,
                f"{x['steps_per_second']:,.0f}",
                f"{x['steps_per_second'] / runs[1]['steps_per_second']:.2f}",
                f"{x['iteration']:.3g}",
                f"{x['waiting']:.2g}",
                f"{x['reduces']:.0f}",
                f"{x['reduced'] / 1024:,.0f}",
                f"{x['gathers']:.0f}",
                f"{x['gathered'] / 1024:,.0f}",
            ]
            # A worker alone sends nothing
            known = ("" if cell == "nan" else f" {cell}" for cell in cells)
            lines.append("|" + " |".join(known) + " |")
    return lines


def model_lines(found):
    heads = "".join(f" {count}, ring | {count}, tree |" for count in MANY)
    lines = ["| time of an iteration, as a multiple of one worker's |" + heads]
    lines.append("|" + "---|" * (1 + 2 * len(MANY)))
    for setting, runs in found.items():
        cells = [setting]
        if 2 in runs:
            cells += [f"{ratio:.3g}" for ratio in slowdowns(runs[1], runs[2])]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def slowdowns(one, two):
    """By the model: iterations of many workers, in a ring and a tree, over that of one."""
    ratios = []
    for count in MANY:
        for rounds in (2 * (count - 1), 2 * math.ceil(math.log2(count))):
            more = seconds_of_messages(two, count, rounds)
            ratios.append(1 + more / one["iteration"])
    return ratios


def main(args):
    if args.child:
        work(json.loads(args.child))
        os._exit(0)  # gloo's threads may abort a normal exit
    if args.repeats < 1 or 1 not in args.workers or min(args.workers) < 1:
        fail("--repeats must be at least 1, and --workers must have 1 in it, to compare with")
    settings = [setting for setting in SETTINGS if args.only in setting]
    if not settings:
        fail(f"no setting has {args.only!r} in its name")
    refuse_missing_folder(args.output)
    rows = []
    for setting in settings:
        for _ in range(args.repeats):
            for count in args.workers:
                row = measure(setting, count)
                keep_row(args.output, row, COLUMNS, anew=not rows)
                rows.append(row)
    print(tables(rows))
    print(f"all runs: {args.output}")


if __name__ == "__main__":
    main(parse(Args))
