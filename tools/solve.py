"""Seconds from the command to the answer: our scripts, stable-baselines3 and sb3-contrib.

Run: python -m tools.speed --solve --repeats 3 --output docs/speed_solve.csv

A run ends when the mean of the last 100 returns is found to be at the bar: ours look after each
iteration, the others after each step. The seconds begin with the process, imports and all. The
programs take turns, on one core. Ours have their defaults, and train for as many steps as in the
benchmark. The others have their own defaults, or the options that RL Baselines3 Zoo has tuned for
the environment (hyperparams/ppo.yml and trpo.yml). They have a million steps, but the tuned PPO on
CartPole has the Zoo's 100,000, since its learning rate is 0 after them. A run that is in the file
already is not made again.
"""

import csv
import importlib
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from tools import fail, keep_row

TASKS = {  # environment: the bar, steps of our runs
    "CartPole-v1": (475, 200_000),
    "Acrobot-v1": (-100, 200_000),
    "Pendulum-v1": (-200, 200_000),
    "LunarLander-v3": (200, 300_000),
    "HalfCheetah-v5": (3000, 1_000_000),
    "Hopper-v5": (2000, 1_000_000),
}
LIMIT = 1_000_000  # steps of the others' runs
OURS = "ppo.py", "trpo.py"
OTHERS = "PPO, tuned", "PPO", "TRPO, tuned", "TRPO"
PROGRAMS = (*OURS, *OTHERS)
COLUMNS = "environment", "program", "seed", "steps", "seconds"  # no seconds if not solved

WIDE_RELU = dict(log_std_init=-2, ortho_init=False, activation="ReLU", sizes=[256, 256])
MUJOCO_TRPO = dict(
    normalize=True,
    num_envs=2,
    n_steps=1024,
    batch_size=128,
    gamma=0.99,
    gae_lambda=0.95,
    cg_max_steps=25,
    cg_damping=0.1,
    n_critic_updates=20,
    learning_rate=1e-3,
    sub_sampling_factor=1,
)
# By the names of stable-baselines3, but for num_envs, normalize (VecNormalize) and steps. lin_0.1
# falls linearly from 0.1 to 0. MuJoCo's are of v3 and v4 there, and LunarLander's PPO of v2.
TUNED = {
    ("PPO", "CartPole-v1"): dict(
        steps=100_000,
        num_envs=8,
        n_steps=32,
        batch_size=256,
        n_epochs=20,
        gamma=0.98,
        gae_lambda=0.8,
        ent_coef=0.0,
        learning_rate="lin_0.001",
        clip_range="lin_0.2",
    ),
    ("PPO", "Acrobot-v1"): dict(
        normalize=True,
        num_envs=16,
        n_steps=256,
        n_epochs=4,
        gamma=0.99,
        gae_lambda=0.94,
        ent_coef=0.0,
    ),
    ("PPO", "Pendulum-v1"): dict(
        num_envs=4,
        n_steps=1024,
        n_epochs=10,
        gamma=0.9,
        gae_lambda=0.95,
        ent_coef=0.0,
        learning_rate=1e-3,
        clip_range=0.2,
        use_sde=True,
        sde_sample_freq=4,
    ),
    ("PPO", "LunarLander-v3"): dict(
        num_envs=16,
        n_steps=1024,
        batch_size=64,
        n_epochs=4,
        gamma=0.999,
        gae_lambda=0.98,
        ent_coef=0.01,
    ),
    ("PPO", "HalfCheetah-v5"): dict(
        normalize=True,
        n_steps=512,
        batch_size=64,
        n_epochs=20,
        gamma=0.98,
        gae_lambda=0.92,
        ent_coef=0.000401762,
        learning_rate=2.0633e-05,
        clip_range=0.1,
        max_grad_norm=0.8,
        vf_coef=0.58096,
        network=WIDE_RELU,
    ),
    ("PPO", "Hopper-v5"): dict(
        normalize=True,
        n_steps=512,
        batch_size=32,
        n_epochs=5,
        gamma=0.999,
        gae_lambda=0.99,
        ent_coef=0.00229519,
        learning_rate=9.80828e-05,
        clip_range=0.2,
        max_grad_norm=0.7,
        vf_coef=0.835671,
        network=WIDE_RELU,
    ),
    ("TRPO", "CartPole-v1"): dict(
        num_envs=2,
        n_steps=512,
        batch_size=512,
        gamma=0.99,
        gae_lambda=0.98,
        cg_damping=1e-3,
        n_critic_updates=20,
        learning_rate=1e-3,
    ),
    ("TRPO", "Acrobot-v1"): dict(normalize=True, num_envs=2, n_steps=1024),
    ("TRPO", "Pendulum-v1"): dict(
        num_envs=2,
        n_steps=1024,
        gamma=0.9,
        n_critic_updates=15,
        use_sde=True,
        sde_sample_freq=4,
    ),
    ("TRPO", "LunarLander-v3"): dict(
        num_envs=2,
        n_steps=512,
        gamma=0.99,
        gae_lambda=0.98,
        cg_damping=0.01,
        n_critic_updates=15,
        learning_rate=1e-3,
    ),
    ("TRPO", "HalfCheetah-v5"): MUJOCO_TRPO | dict(target_kl=0.04),
    ("TRPO", "Hopper-v5"): MUJOCO_TRPO,
}


def is_solved(returns: list[float], bar: float) -> bool:
    """Whether the mean of the last 100 returns is at the bar; not before there are 100."""
    return len(returns) >= 100 and np.mean(returns[-100:]) >= bar


def solve_ours(program: str, env_id: str, seed: int, started: float) -> dict:
    """Train until solved. Returns steps, and seconds since `started` if it is solved."""
    script = importlib.import_module(program.removesuffix(".py"))
    bar, steps = TASKS[env_id]
    result = {"steps": steps}
    log = script.Run.log

    def log_and_look(run: Any, *rest: Any) -> None:
        log(run, *rest)
        if is_solved(run.recent_returns, bar):
            result.update(steps=run.step, seconds=time.time() - started)
            run.is_over = True

    script.Run.log = log_and_look
    with tempfile.TemporaryDirectory() as folder:
        options = dict(env_id=env_id, seed=seed, total_steps=steps, run_dir=f"{folder}/run")
        script.main(script.Args(**options))
    return result


def solve_other(program: str, env_id: str, seed: int, started: float) -> dict:
    """The same with an algorithm of stable-baselines3 or sb3-contrib."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    torch.set_num_threads(1)
    name, *is_tuned = program.split(", ")
    options = dict(TUNED[name, env_id]) if is_tuned else {}
    steps = options.pop("steps", LIMIT)
    result = {"steps": steps}

    class StopWhenSolved(BaseCallback):
        last = None

        def _on_step(self) -> bool:
            episodes = self.model.ep_info_buffer
            if not episodes or episodes[-1] is self.last:
                return True
            self.last = episodes[-1]
            if not is_solved([episode["r"] for episode in episodes], TASKS[env_id][0]):
                return True
            result.update(steps=self.num_timesteps, seconds=time.time() - started)
            return False

    envs, options = with_envs(env_id, seed, options)
    agent = algorithm(name)("MlpPolicy", envs, seed=seed, device="cpu", **options)
    agent.learn(steps, StopWhenSolved())
    return result


def algorithm(name: str) -> type:
    package = "sb3_contrib" if name == "TRPO" else "stable_baselines3"
    return getattr(importlib.import_module(package), name)


def with_envs(env_id: str, seed: int, options: dict) -> tuple:
    """The environments, and the options in the form in which the algorithm takes them."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.utils import LinearSchedule
    from stable_baselines3.common.vec_env import VecNormalize
    from torch import nn

    options = dict(options)
    envs = make_vec_env(env_id, options.pop("num_envs", 1), seed=seed)
    if options.pop("normalize", False):
        envs = VecNormalize(envs, gamma=options.get("gamma", 0.99))
    for key, x in options.items():
        if isinstance(x, str):
            options[key] = LinearSchedule(float(x.removeprefix("lin_")), 0.0, 1.0)
    if network := dict(options.pop("network", {})):
        network["activation_fn"] = getattr(nn, network.pop("activation"))
        sizes = network.pop("sizes")
        network["net_arch"] = dict(pi=sizes, vf=sizes)
        options["policy_kwargs"] = network
    return envs, options


def has_times(path: str) -> bool:
    """Whether a file is one of this module's."""
    if not Path(path).is_file():
        return False
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        return next(csv.reader(file), None) == list(COLUMNS)


def read(path: str) -> list[dict]:
    """The runs that are done. A row that a full disk has cut off is not one."""
    if not Path(path).exists():
        return []
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames not in (None, list(COLUMNS)):  # None: the file is empty
            fail(f"{path} has no times to a solution: give another --output")
        return [row for row in reader if None not in row.values()]


def solve(args: Any, in_a_new_process: Callable) -> None:
    """Make the runs that are not in the file yet, one after the other."""
    if not any(args.only in f"{program} {env_id}" for env_id in TASKS for program in PROGRAMS):
        fail(f"no program or task has {args.only!r} in it")
    done = {(row["environment"], row["program"], row["seed"]) for row in read(args.output)}
    for env_id, seed, program in product(TASKS, range(1, args.repeats + 1), PROGRAMS):
        is_wanted = args.only in f"{program} {env_id}"
        if not is_wanted or (env_id, program, str(seed)) in done:
            continue
        train = solve_ours if program in OURS else solve_other
        result = in_a_new_process(train, program, env_id, seed, time.time())
        row = dict(environment=env_id, program=program, seed=seed) | result
        keep_row(args.output, row, COLUMNS)
        seconds = f"{result['seconds']:.1f} s" if "seconds" in result else "not solved"
        print(f"{program} {env_id}, seed {seed}: {seconds}", flush=True)


def of_whole_seeds(rows: list[dict]) -> list[dict]:
    """Those of seeds with which all programs have run, so that medians are of the same seeds.

    Of an environment without such a seed, these are all rows.
    """
    programs = defaultdict(set)
    for row in rows:
        programs[row["environment"], row["seed"]].add(row["program"])
    whole = {key for key, found in programs.items() if found.issuperset(PROGRAMS)}
    compared = {env_id for env_id, _ in whole}
    return [
        row
        for row in rows
        if row["environment"] not in compared or (row["environment"], row["seed"]) in whole
    ]


def times(rows: list[dict]) -> dict:
    """{(environment, program): seconds of its runs}, infinite for those that did not solve it."""
    seconds = defaultdict(list)
    for row in rows:
        seconds[row["environment"], row["program"]].append(float(row["seconds"] or "inf"))
    return seconds


def cell(seconds: list[float]) -> str:
    """The median, and how many runs solved the environment if not all did."""
    if not seconds:
        return ""
    solved = sum(map(math.isfinite, seconds))
    share = "" if solved == len(seconds) else f"{solved} of {len(seconds)}"
    median = statistics.median(seconds)
    if math.isinf(median):
        return share
    return f"{median:,.1f} s ({share})" if share else f"{median:,.1f} s"


def times_as_fast(seconds: dict, env_id: str) -> str:
    """The best median of the others as a multiple of our best; empty until all runs are made."""
    if len({len(seconds[env_id, program]) for program in PROGRAMS}) > 1:
        return ""
    ours, others = (
        min(statistics.median(seconds[env_id, program]) for program in programs)
        for programs in (OURS, OTHERS)
    )
    if math.isinf(ours):
        return "not solved"
    return "only ours" if math.isinf(others) else f"{others / ours:.1f}"


def table(rows: list[dict]) -> str:
    """A line for each environment with runs, as Markdown."""
    seconds = times(of_whole_seeds(rows))
    heads = ["environment (bar)", *(f"`{x}`" for x in OURS), *OTHERS, "their best ÷ ours"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for env_id, (bar, _) in TASKS.items():
        if not any(seconds[env_id, program] for program in PROGRAMS):
            continue
        cells = [cell(seconds[env_id, program]) for program in PROGRAMS]
        name = f"{env_id} ({bar:,})".replace("(-", "(−")
        lines.append(f"| {' | '.join([name, *cells, times_as_fast(seconds, env_id)])} |")
    return "\n".join(lines)
