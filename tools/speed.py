"""Steps per second of whole training runs, next to stable-baselines3 at the same settings.

Run: python -m tools.speed

CartPole-v1, 4 environments x 128 steps, 4 epochs of 4 minibatches, two networks of 64 x 64, one
thread. The two take turns, A B A B …, so that both see the same machine.
"""

import contextlib
import io
import statistics
import tempfile
import time
from dataclasses import dataclass

import torch
import tyro

import ppo
from tools import fail


@dataclass
class Args:
    repeats: int = 5  # runs of each
    total_steps: int = 30_720  # environment steps in a run


def run_ours(steps):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        sizes = dict(num_envs=4, num_steps=128, minibatch_size=128, policy_epochs=4, value_epochs=4)
        ppo.main(ppo.Args(total_steps=steps, run_dir=f"{folder}/run", **sizes))


def run_sb3(steps):
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    envs = make_vec_env("CartPole-v1", n_envs=4)
    sizes = dict(n_steps=128, batch_size=128, n_epochs=4)
    PPO("MlpPolicy", envs, device="cpu", seed=1, **sizes).learn(steps)


def main(args):
    try:
        import stable_baselines3
    except ImportError:
        fail("this needs the package to compare with: pip install stable-baselines3")
    torch.set_num_threads(1)
    runs = {"ppo.py": run_ours, f"stable-baselines3 {stable_baselines3.__version__}": run_sb3}
    speeds = {name: [] for name in runs}
    for repeat in range(args.repeats + 1):  # the first is to warm up
        for name, run in runs.items():
            start = time.perf_counter()
            run(args.total_steps)
            speed = args.total_steps / (time.perf_counter() - start)
            speeds[name] += [speed] if repeat else []
            print(f"{'run' if repeat else 'warm-up'} {repeat}  {name}: {speed:,.0f} steps/s")
    ours, theirs = (statistics.median(values) for values in speeds.values())
    ratios = [one / other for one, other in zip(*speeds.values())]
    print(
        f"medians: {ours:,.0f} and {theirs:,.0f} steps/s, {ours / theirs:.2f} times as fast", end=""
    )
    print(f" (pairwise {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main(tyro.cli(Args))
