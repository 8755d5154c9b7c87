"""Steps per second of whole training loops, next to stable-baselines3 and sb3-contrib.

Run: python -m tools.speed --output docs/speed.csv

At each setting ours, the other and the environment alone (random actions) take turns, A B C A B
C …, so that all see the same machine. Every run has a process of its own, one thread and, where
the system can, one core. Steps, epochs, minibatches, networks and tasks are the same, but each
has the tasks as it comes: here CartPole and Pong are Gymnasium's vectorized forms, there they
are single environments, one after the other. The others do less: they neither normalize
observations nor scale rewards. Steps per second are those after the first iteration; the
seconds to its end begin with the process, imports and all.
"""

import contextlib
import importlib.util
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path

from tools import ctrl_c_blocked, fail, keep_row, parse, refuse_missing_folder, solve

PEERS = {"vanilla_pg": "A2C", "trpo": "TRPO", "ppo": "PPO"}
PARTS = "collect", "prepare", "update", "log"
UNITS = {
    "steps_per_second": "1/s",
    **dict.fromkeys(PARTS, "µs per step"),
    "memory": "MiB",
    "first_iteration": "s",
}
CLEANRL = dict(num_envs=4, num_steps=128, minibatch_size=128, policy_epochs=4, value_epochs=4)
SB3 = dict(env_id="HalfCheetah-v5", num_envs=1, num_steps=2048, minibatch_size=64)
A2C = dict(num_envs=4, num_steps=5, minibatch_size=20, value_epochs=1)
PONG = dict(env_id="ale_py:ALE/Pong-v5", num_steps=128, policy_epochs=4, value_epochs=4)
SETTINGS = [  # script, name, its options, environment steps of a run
    ("ppo", "CartPole-v1, 4 × 128", CLEANRL, 30_000),
    ("ppo", "CartPole-v1", {}, 30_000),
    ("ppo", "LunarLander-v3", dict(env_id="LunarLander-v3"), 20_000),
    ("ppo", "HalfCheetah-v5, 1 × 2048", SB3, 10_000),
    ("ppo", "HalfCheetah-v5", dict(env_id="HalfCheetah-v5"), 20_000),
    ("ppo", "Hopper-v5", dict(env_id="Hopper-v5"), 20_000),
    ("ppo", "Pong, 8 × 128", PONG, 4_000),
    ("trpo", "CartPole-v1", {}, 30_000),
    ("trpo", "HalfCheetah-v5", dict(env_id="HalfCheetah-v5"), 20_000),
    ("vanilla_pg", "CartPole-v1, 4 × 5", A2C, 10_000),
]
GROWTH = [  # option, its values, what else is set, so that a batch has 2048 steps
    ("num_envs", [2**i for i in range(9)], lambda n: dict(num_envs=n, num_steps=2048 // n)),
    ("hidden_size", [64, 128, 256, 512, 1024], lambda n: dict(hidden_size=n)),
    ("minibatch_size", [2**i for i in range(5, 12)], lambda n: dict(minibatch_size=n)),
]


@dataclass
class Args:
    repeats: int = 5  # runs of each
    only: str = ""  # settings whose script or name (with --solve: program or task) has this in it
    output: str = (
        "speed.csv"  # CSV file with a row for each run, written anew; --solve continues it
    )
    against: str = ""  # folder of a changed copy of this project, to compare with instead
    solve: bool = False  # instead time tasks until they are solved, with seeds 1 to REPEATS
    table: bool = False  # with --solve: print the table of the runs in OUTPUT, and train nothing
    growth: str = ""  # instead draw how the cost of a step grows with the work, as this picture


class Watch:
    """Seconds spent in each part of each iteration, and the steps done before it."""

    def __init__(self):
        self.part = ""
        self.since = time.perf_counter()
        self.iterations = []

    def enter(self, part):
        """A part of the loop begins, and with it ends the one before."""
        now = time.perf_counter()
        if self.iterations:
            self.iterations[-1]["seconds"][self.part] += now - self.since
        self.part, self.since = part, now

    def begin(self, steps):
        """An iteration begins, and with it its collecting."""
        self.enter("collect")
        self.iterations.append(dict(time=time.time(), steps=steps, seconds=Counter()))

    def result(self, started):
        """Means over all iterations but the first and the last, whose end is not seen."""
        first, *inner, last = self.iterations[1:]
        whole = [first, *inner]
        seconds = sum((iteration["seconds"] for iteration in whole), Counter())
        steps = last["steps"] - first["steps"]
        return {
            "steps_per_second": steps / seconds.total(),
            "memory": peak_memory(),
            **{part: 1e6 * seconds[part] / steps for part in PARTS},
            "first_iteration": first["time"] - started,
        }


def peak_memory():
    """Maximum resident set of this process, in MiB; NaN where the system does not tell it."""
    try:
        import resource
    except ImportError:  # on Windows
        return math.nan
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def hook(owner, function, before=None, after=None):
    """Call something before a function, or after it with its result, whenever it runs."""
    original = getattr(owner, function)

    def hooked(*args, **kwargs):
        if before:
            before()
        result = original(*args, **kwargs)
        if after:
            after(result)
        return result

    setattr(owner, function, hooked)


def run_ours(name, options, steps, started):
    script = importlib.import_module(name)
    watch = watch_script(script)
    with tempfile.TemporaryDirectory() as folder:
        script.main(script.Args(total_steps=steps, run_dir=f"{folder}/run", **options))
    return watch.result(started)


def watch_script(script):
    """A watch that follows the loop: the script's own functions tell it where they are."""
    watch = Watch()
    steps = 0

    def begin():
        watch.begin(steps)

    def count(collected):
        nonlocal steps
        steps += len(collected[0].obs)

    def prepare():  # the first use of V in an iteration is right after its last step
        if watch.part == "collect":
            watch.enter("prepare")

    hook(script, "collect", before=begin, after=count)
    hook(script.Value, "forward", before=prepare)
    hook(script, "update_policy", before=lambda: watch.enter("update"))
    hook(script, "update_value", after=lambda _: watch.enter("log"))
    return watch


def run_peer(name, options, steps, started, against):
    if against:
        sys.path.insert(0, against)
        return run_ours(name, options, steps, started)
    import sb3_contrib
    import stable_baselines3
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    torch.set_num_threads(1)
    watch = Watch()

    class Callback(BaseCallback):
        def _on_rollout_start(self):
            watch.begin(self.num_timesteps)

        def _on_rollout_end(self):
            watch.enter("update")

        def _on_step(self):
            return True

    ours = importlib.import_module(name).Args(**options)
    package = sb3_contrib if name == "trpo" else stable_baselines3
    algorithm = getattr(package, PEERS[name])
    policy, envs, policy_options = peer_task(ours)
    sizes = peer_sizes(name, ours)
    agent = algorithm(policy, envs, device="cpu", seed=1, **sizes, **policy_options)
    agent.learn(steps, Callback())
    return watch.result(started)


def peer_task(ours):
    """The other's policy class, its environments, and its options for them."""
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack

    if "ALE/" not in ours.env_id:
        return "MlpPolicy", make_vec_env(ours.env_id, ours.num_envs), {}
    importlib.import_module("ale_py")
    envs = make_atari_env(ours.env_id.removeprefix("ale_py:"), ours.num_envs)
    two_networks = dict(share_features_extractor=False)  # as ours
    return "CnnPolicy", VecFrameStack(envs, 4), dict(policy_kwargs=two_networks)


def peer_sizes(name, ours):
    """The script's sizes of batches and updates, by the names that the other has."""
    if name == "vanilla_pg":
        return dict(n_steps=ours.num_steps)
    if name == "ppo":
        return dict(
            n_steps=ours.num_steps,
            batch_size=ours.minibatch_size,
            n_epochs=ours.policy_epochs,
        )
    return dict(
        n_steps=ours.num_steps,
        batch_size=ours.minibatch_size,
        n_critic_updates=ours.value_epochs,
        cg_max_steps=ours.cg_iters,
        line_search_max_iter=ours.backtrack_iters,
        target_kl=ours.max_kl,
    )


def run_environment(name, options, steps, started):
    script = importlib.import_module(name)
    args = script.Args(**options)
    envs = script.make_envs(args, args.num_envs)
    actions = itertools.cycle([envs.action_space.sample() for _ in range(100)])
    envs.reset(seed=1)
    taken, resetting = 0, 0
    start = time.perf_counter()
    while taken < steps:
        _, _, terminated, truncated, _ = envs.step(next(actions))
        taken += args.num_envs - resetting  # steps that only reset are not counted
        resetting = (terminated | truncated).sum()
    return {"steps_per_second": taken / (time.perf_counter() - start)}


RUNS = {"ours": run_ours, "peer": run_peer, "environment": run_environment}  # these take turns


def quietly(function, *job):
    """The function's result, on one core where the system can, and without what it prints."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        return function(*job)


def in_a_new_process(function, *job):
    """The function's result, from a process that starts now. Ctrl-C ends it."""
    others = active_children()
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    try:
        with ctrl_c_blocked():
            result = pool.submit(quietly, function, *job)
        return result.result()
    except KeyboardInterrupt:
        for child in set(active_children()) - set(others):
            child.terminate()
        raise
    finally:
        pool.shutdown()


def cells(rows):
    """A row of the table, of the runs at one setting: medians, and the range of pairs."""

    def column(what, name):
        return [float(row[name]) for row in rows if row["what"] == what]

    def medians_of_both(name, form):
        both = (statistics.median(column(what, name)) for what in ("ours", "peer"))
        return " / ".join(f"{number:{form}}" for number in both)

    speeds = {what: column(what, "steps_per_second") for what in RUNS}
    ours, peer, environment = map(statistics.median, speeds.values())
    pairs = [one / other for one, other in zip(speeds["ours"], speeds["peer"])]
    parts = [statistics.median(column("ours", part)) for part in PARTS]
    return {
        "script": f"`{rows[0]['script']}.py`",
        "setting": rows[0]["setting"],
        "steps/s": medians_of_both("steps_per_second", ",.0f"),
        "ratio": f"{ours / peer:.2f} ({min(pairs):.2f} to {max(pairs):.2f})",
        "of the environment alone": f"{ours / environment:.0%} of {environment:,.0f}",
        " / ".join(PARTS): " / ".join(f"{part / sum(parts):.0%}" for part in parts),
        "memory, MiB": medians_of_both("memory", ",.0f"),
        "first iteration, s": medians_of_both("first_iteration", ".1f"),
    }


def compare(args, write):
    check_what_is_compared(args)
    settings = [row for row in SETTINGS if args.only in f"{row[0]} {row[1]}"]
    if not settings:
        names = "; ".join(name for _, name, *_ in SETTINGS)
        fail(f"no setting has {args.only!r} in it: {names}")
    for script, name, options, steps in settings:
        rows = []
        for _, what in itertools.product(range(args.repeats), RUNS):
            more = [args.against] if what == "peer" else []
            result = in_a_new_process(RUNS[what], script, options, steps, time.time(), *more)
            row = dict(script=script, setting=name, what=what) | result
            rows.append(row)
            write(row)
        table = cells(rows)
        if name == settings[0][1]:
            print(f"| {' | '.join(table)} |\n|{'---|' * len(table)}")
        print(f"| {' | '.join(table.values())} |", flush=True)


def check_what_is_compared(args):
    if args.against:
        if not Path(args.against, "common", "networks.py").exists():
            fail(f"{args.against} is not a copy of this project: it has no common/networks.py")
        return
    for package in ("stable_baselines3", "sb3_contrib"):
        if not importlib.util.find_spec(package):
            fail(f"this compares with {package}: pip install {package.replace('_', '-')}")


def grow(args, write):
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        fail("plots need matplotlib: pip install matplotlib")
    from tools import plot  # only now, so that no program has to wait for its imports

    plot.refuse_picture(args.growth)
    rows = []
    for option, values, options in GROWTH:
        for value, _ in itertools.product(values, range(args.repeats)):
            setting = f"{option} {value}"
            result = in_a_new_process(run_ours, "ppo", options(value), 9_000, time.time())
            row = dict(script="ppo", setting=setting, what="ours") | result
            rows.append(row)
            write(row)
            print(f"{setting}: {row['steps_per_second']:,.0f} steps/s", flush=True)
    plot.save(draw(rows), args.growth, dpi=120)


def medians(groups, column):
    return [statistics.median(float(row[column]) for row in group) for group in groups]


def draw(rows):
    """A figure: above steps per second, below the parts of a step's cost; medians of the runs."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(GROWTH), layout="constrained", sharex="col")
    figure.set_size_inches(4.5 * len(GROWTH), 6)
    for (above, below), (option, values, _) in zip(panels.T, GROWTH):
        groups = [[row for row in rows if row["setting"] == f"{option} {x}"] for x in values]
        speeds = medians(groups, "steps_per_second")
        parts = [medians(groups, part) for part in PARTS]
        above.plot(values, speeds, "k.-")
        above.set_ylim(bottom=0)
        above.grid(alpha=0.3)
        below.stackplot(values, *parts, labels=PARTS)
        below.set_xscale("log", base=2)
        below.set(xlabel=option.replace("_", " "), xticks=values, xticklabels=values)
        below.minorticks_off()
    panels[0, 0].set_ylabel("steps per second")
    panels[1, 0].set_ylabel("µs per step, stacked")
    panels[1, 0].legend(frameon=False)
    return figure


def check_arguments(args):
    if args.repeats < 1:
        fail(f"--repeats must be at least 1, not {args.repeats}")
    if args.table and not args.solve:
        fail("--table needs --solve")
    if args.only and (args.table or args.growth):
        fail("--only chooses what runs: leave it out with --table and with --growth")
    if [bool(x) for x in (args.solve, args.growth, args.against)].count(True) > 1:
        fail("--solve, --growth and --against exclude each other")
    refuse_missing_folder(args.output)
    if not args.solve and solve.has_times(args.output):
        fail(f"{args.output} has times to a solution: give another --output")
    if args.growth:
        refuse_missing_folder(args.growth)
    if args.table and not Path(args.output).exists():
        fail(f"there is no {args.output}")


def main(args):
    check_arguments(args)
    rows = []

    def write(row):  # only now, so that a file that is there survives bad input
        columns = ("script", "setting", "what", *UNITS)
        keep_row(args.output, row, columns, anew=not rows)
        rows.append(row)

    if args.solve:
        if not args.table:
            check_what_is_compared(args)
            solve.solve(args, in_a_new_process)
        print(solve.table(solve.read(args.output)))
    elif args.growth:
        grow(args, write)
    else:
        compare(args, write)
    print(f"all runs: {args.output}")


if __name__ == "__main__":
    main(parse(Args))
