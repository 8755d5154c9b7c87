"""Numerical trouble: a run has finite weights at its end, or stops with one clear sentence."""

import csv
import importlib
import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

SCRIPTS = ["vanilla_pg", "is_pg", "trpo", "ppo"]
SMALL = dict(num_envs=3, num_steps=40, minibatch_size=32, value_epochs=3, total_steps=700)


class Odd(gym.Env):
    """An environment with something odd about it, else of two numbers and episodes of 9 steps."""

    def __init__(self, reward=1.0, noise=1.0, feature="", actions=2, length=9, nan_at=math.inf):
        self.reward, self.noise, self.feature = reward, noise, feature
        self.length, self.nan_at = length, nan_at
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gym.spaces.Box(-1, 1, (1,))
        if actions:
            self.action_space = gym.spaces.Discrete(actions)
        self.steps = 0

    def observe(self):
        obs = self.np_random.normal(size=2)
        scale = dict(constant=[0, 0], huge=[1, 1e30], tiny=[1, 1e-30]).get(self.feature, [1, 1])
        obs = obs * scale + (7 if self.feature == "constant" else 0)
        return np.full(2, np.nan) if self.steps >= self.nan_at else obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        self.t, self.steps = self.t + 1, self.steps + 1
        reward = self.noise * self.np_random.normal() + float(np.sum(action))
        return self.observe(), self.reward * reward, self.t >= self.length, False, {}


gym.register("Odd-v0", Odd)
CASES = {
    "rewards of 1e8": dict(reward=1e8),
    "rewards of 1e-8": dict(reward=1e-8),
    "no rewards": dict(reward=0.0),
    "constant observations": dict(feature="constant"),
    "a huge feature": dict(feature="huge"),
    "a tiny feature": dict(feature="tiny"),
    "a single action": dict(actions=1),
    "episodes of one step": dict(length=1),
    "no episode ends": dict(length=10**9),
}
OPTIONS = {
    "as they are": {},
    "not normalized": dict(normalize_obs=False, normalize_rewards=False),
    "continuous": {},
}


def train(script, run_dir, odd, **options):
    script = importlib.import_module(script)
    options = SMALL | dict(run_dir=str(run_dir), env_kwargs=json.dumps(odd)) | options
    options = {key: x for key, x in options.items() if key in script.Args.__annotations__}
    return script.main(script.Args(env_id="Odd-v0", **options))


def check(run_dir, steps):
    """Weights are finite, and so are metrics, or empty where there is nothing to say."""
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    tensors = [*checkpoint["policy"].values(), *checkpoint["value"].values()]
    assert all(x.isfinite().all() for x in tensors)
    with open(run_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["step"]) >= steps
    numbers = [float(x) for row in rows for x in row.values() if x]
    assert all(map(math.isfinite, numbers))
    assert all(row["kl"] and row["entropy"] and row["value_loss"] for row in rows)
    return checkpoint


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_odd_environments(script, case, options, tmp_path):
    odd = CASES[case] | (dict(actions=0) if options == "continuous" else {})
    assert train(script, tmp_path / "run", odd, **OPTIONS[options]) == 0
    check(tmp_path / "run", 700)


@pytest.mark.filterwarnings("ignore:var")  # PyTorch's, that one number has no variance
@pytest.mark.parametrize("script", SCRIPTS)
def test_batches_of_one_transition(script, tmp_path):
    """One environment, two steps, of which the second only resets."""
    sizes = dict(num_envs=1, num_steps=2, total_steps=40)
    assert train(script, tmp_path / "run", dict(length=1), **sizes) == 0
    check(tmp_path / "run", 40)


@pytest.mark.parametrize("actions", [0, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_policy_driven_to_determinism(script, actions, tmp_path, capsys):
    """Where the larger action always pays more, and steps are far too large."""
    options = dict(policy_lr=0.5, policy_epochs=10, max_kl=1.0, total_steps=4000, anneal_lr=False)
    options |= dict(clip_eps=1e9, max_grad_norm=1e9)
    stopped, odd = None, dict(noise=0.0, actions=actions)
    try:
        train(script, tmp_path / "run", odd, checkpoint_interval=1e-9, **options)
    except SystemExit as stop:  # a normal distribution as narrow as can be
        stopped = stop.code, "NaN or infinity" in capsys.readouterr().err
    assert stopped in (None, (1, True))
    check(tmp_path / "run", 1 if stopped else 4000)


@pytest.mark.parametrize("script", SCRIPTS)
def test_nan_from_step_1000_on(script, tmp_path, capsys):
    """The last checkpoint is the one before it."""
    sizes = dict(num_envs=1, num_steps=150, total_steps=3000, checkpoint_interval=1e-9)
    with pytest.raises(SystemExit) as stop:
        train(script, tmp_path / "run", dict(nan_at=1000), **sizes)
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert f"{script}.py: NaN or infinity at step" in message
    assert str(tmp_path / "run") in message
    checkpoint = check(tmp_path / "run", 1)
    assert 800 < checkpoint["progress"][1] < 1000


def test_trpo_without_a_gradient_leaves_the_policy_alone(tmp_path):
    """Where there is one action, no weight makes a difference."""
    weights = []
    for steps in (1, 700):
        run_dir = tmp_path / str(steps)
        train("trpo", run_dir, dict(actions=1), total_steps=steps, normalize_obs=False)
        weights.append(check(run_dir, steps)["policy"])
    assert all(torch.equal(weights[1][name], x) for name, x in weights[0].items())
