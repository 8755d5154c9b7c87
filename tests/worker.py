"""One of several workers: RANK, WORLD_SIZE and MASTER_ADDR tell it which, as torchrun does."""

import importlib
import os
import random
import socket
import sys
from contextlib import suppress

import gymnasium as gym
import numpy as np
import torch
from processes import CONTEXT

from common.networks import Policy


class Drift(gym.Env):
    """A random walk that pays for actions in its direction; it ends at random, in either way."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def __init__(self, continuous=False):
        self.action_space = gym.spaces.Box(-1, 1, (2,)) if continuous else gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.end = self.np_random.uniform(0.02, 0.2)  # so that workers have unequal shares
        self.obs = self.np_random.normal(1, 2, size=3)
        return self.obs, {}

    def step(self, action):
        reward = self.obs[0] * np.sum(action)
        self.obs = self.obs + self.np_random.normal(size=3)
        terminated, truncated = self.np_random.random(2) < self.end
        return self.obs, reward, terminated, truncated, {}


class Image(gym.ObservationWrapper):
    """The walk as pixels."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (8, 9, 3), np.uint8)

    def observation(self, obs):
        return np.resize(np.clip(100 + 20 * obs, 0, 255).astype(np.uint8), (8, 9, 3))


gym.register("Drift-v0", Drift)


def act_by_rule(self, obs):
    """Actions that hang on the observation alone, whichever worker has it."""
    key = (obs.double().flatten(1).sum(1) * 1e4).long()
    if self.head.shape == (2,):
        return torch.stack([(key % 7 - 3) / 2.0, (key % 5 - 2) / 2.0], 1)
    return key % 3


def train(name, arguments, by_rule=False, double=False):
    """A run of a script. Returns the weights of both networks after each iteration."""
    script, weights = importlib.import_module(name), []
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    update_value, collect, sample = script.update_value, script.collect, Policy.sample

    def in_one_precision(*args):
        batch, *rest = collect(*args)
        if not double:
            return batch, *rest
        floats = dict(advantages=batch.advantages.double(), returns=batch.returns.double())
        return batch._replace(**floats), *rest

    def spy(value, *rest):
        update_value(value, *rest)
        policy = sys._getframe(1).f_locals["policy"]
        weights.append([x.detach().clone() for x in (*policy.parameters(), *value.parameters())])

    script.update_value, script.collect = spy, in_one_precision
    Policy.sample = act_by_rule if by_rule else sample
    try:
        script.main(script.Args(**arguments))
    finally:
        script.update_value, script.collect, Policy.sample = update_value, collect, sample
    return weights


def work(folder, rank, count, runs):
    """Take part in the runs of start_workers. What is said on stderr goes to a file."""
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    with open(folder / f"stderr-{rank}", "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")
    for port, script, arguments, options in runs:
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        weights = train(script, arguments, **options)
        torch.save(weights, f"{arguments['run_dir']}-weights-{rank}.pt")
        torch.save(torch.initial_seed(), f"{arguments['run_dir']}-seed-{rank}.pt")


def free_port():
    """One below those that the system gives away, so that it is free until it is used."""
    while True:
        port = random.randrange(20_000, 32_000)
        with suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


def start_workers(folder, count, runs):
    """Processes that train together, once for each (script, arguments, options) in runs."""
    with_ports = [[free_port(), *run] for run in runs]
    processes = [
        CONTEXT.Process(target=work, args=(folder, rank, count, with_ports), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes
