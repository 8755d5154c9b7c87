"""The shared tail: the columns of metrics.csv, the value update, seeds and random numbers."""

import copy
import csv
import math
import os
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from recording import Recorder, make_batch
from torch.distributions import Normal
from torch.nn.utils import parameters_to_vector

import ppo

SIZES = dict(num_envs=8, num_steps=256, policy_epochs=2, value_epochs=2)


@pytest.fixture
def watched(monkeypatch):
    """What each iteration of a run began with and collected."""
    iterations, collect = [], ppo.collect

    def spy(envs, obs, done, policy, value, *rest):
        networks = copy.deepcopy(policy), copy.deepcopy(value)
        batch, obs, done = collect(envs, obs, done, policy, value, *rest)
        episodes = list(zip(envs.return_queue, envs.length_queue))
        iterations.append((*networks, batch, episodes))
        return batch, obs, done

    monkeypatch.setattr(ppo, "collect", spy)
    return iterations


def probabilities(policy, obs):
    exps = np.exp(policy.outputs(obs).detach().double().numpy())
    return exps / exps.sum(1, keepdims=True)


class Noise(gym.Env):
    """Shows normal numbers, and pays the first of them or its negative; ends at random."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = self.np_random.normal(size=2)
        return self.obs, {}

    def step(self, action):
        reward = self.obs[0] if action else -self.obs[0]
        self.obs = self.np_random.normal(size=2)
        return self.obs, reward, self.np_random.random() < 0.1, False, {}


gym.register("SignNoise-v0", Noise)


def expected_row(old_policy, new_policy, batch, episodes):
    """What a row says of one iteration alone, worked out from the networks' outputs."""
    old, new = (probabilities(policy, batch.obs) for policy in (old_policy, new_policy))
    index = np.arange(len(batch.obs)), batch.actions.numpy()
    ratio = new[index] / old[index]
    returns, lengths = zip(*episodes)
    targets, values = batch.returns.double().numpy(), batch.values.double().numpy()
    return {
        "episodes": len(episodes),
        "return_mean": np.mean(returns),
        "return_min": min(returns),
        "return_max": max(returns),
        "length_mean": np.mean(lengths),
        "kl": (old * np.log(old / new)).sum(1).mean(),
        "entropy": -(new * np.log(new)).sum(1).mean(),
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "ess": ratio.sum() ** 2 / (ratio**2).sum() / len(ratio),
        "explained_variance": 1 - np.var(targets - values) / np.var(targets),
        "value_loss": np.mean((targets - values) ** 2),
    }


def test_columns(watched, tmp_path):
    # Large steps, so that what is mirrored or upside down is far off; nothing else moves a policy
    options = dict(policy_lr=0.02, normalize_obs=False, total_steps=8000, env_id="SignNoise-v0")
    ppo.main(ppo.Args(run_dir=str(tmp_path / "run"), **SIZES, **options))
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    recent, step = [], 0
    for row, before, after in zip(rows, watched, watched[1:]):
        old_policy, old_value, batch, episodes = before
        new_policy, new_value, *_ = after
        recent = (recent + [episode_return for episode_return, _ in episodes])[-100:]
        step += len(batch.obs)
        expected = expected_row(old_policy, new_policy, batch, episodes)
        expected |= dict(step=step, return_last100=np.mean(recent))
        actual = [float(row[name]) for name in expected]
        np.testing.assert_allclose(actual, list(expected.values()), rtol=2e-4, atol=1e-6)
        error = [(v(batch.obs) - batch.returns).square().mean() for v in (old_value, new_value)]
        assert error[1] < error[0]
    assert len(watched) >= 4
    assert len(recent) == 100


@pytest.mark.parametrize("max_grad_norm", [math.inf, 0.1])
def test_value_update(max_grad_norm):
    """∇ of the mean of (V(s) − R)² is the mean of 2 (V(s) − R) ∇V(s), here a sample at a time."""
    torch.manual_seed(0)
    value, obs, returns = ppo.Value(ppo.Normalizer((3,)), 8), torch.randn(12, 3), torch.randn(12)
    expected = torch.zeros_like(parameters_to_vector(value.parameters()))
    for s, target in zip(obs.split(1), returns):
        output = value(s).squeeze()
        gradients = torch.autograd.grad(output, list(value.parameters()))
        slope = torch.cat([gradient.flatten() for gradient in gradients])
        expected = expected + 2 * (output.detach() - target) * slope / 12
    batch = make_batch(ppo, None, obs=obs, advantages=-returns, returns=returns)
    args = ppo.Args(value_epochs=3, max_grad_norm=max_grad_norm)
    recorder = Recorder(value)
    ppo.update_value(value, recorder, batch, args)
    assert len(recorder.gradients) == 3
    expected = expected * min(1, max_grad_norm / expected.norm().item())
    for gradient in recorder.gradients:
        torch.testing.assert_close(gradient, -expected, rtol=1e-4, atol=1e-6)
    recorder = Recorder(value)
    args = ppo.Args(value_epochs=2, max_grad_norm=math.inf, minibatch_size=4)
    ppo.update_value(value, recorder, batch._replace(fewest=12), args)
    epochs = torch.stack(recorder.gradients).reshape(2, 3, -1)  # each takes each transition once
    torch.testing.assert_close(epochs[0].mean(0), epochs[1].mean(0), rtol=1e-4, atol=1e-6)
    assert (epochs[0] - epochs[1]).norm() > 0.01  # in an order of its own


def test_seeds_of_the_environments(tmp_path, monkeypatch):
    """Environment i has the given seed plus i: no two runs, nor a resumed one, share a stream."""
    make_envs, seeds = ppo.make_envs, []

    def spy(*args):
        envs = make_envs(*args)
        reset = envs.reset
        envs.reset = lambda seed: seeds.append(seed) or reset(seed=seed)
        return envs

    monkeypatch.setattr(ppo, "make_envs", spy)
    for seed in (1, 2):
        ppo.main(ppo.Args(seed=seed, total_steps=100, run_dir=str(tmp_path / str(seed)), **SIZES))
    resumed = dict(resume=str(tmp_path / "1"), run_dir=str(tmp_path / "1"), total_steps=3000)
    ppo.main(ppo.Args(**SIZES, **resumed))
    assert min(abs(a - b) for a, b in zip(seeds, seeds[1:] + seeds[:1])) >= SIZES["num_envs"]


def test_no_seed_shares_an_environment_with_another(monkeypatch):
    """Of seeds 1 to 100, with 8 workers of 8 environments each."""
    seeds = []

    class Stop(Exception):
        pass

    def spy(*_):
        envs = gym.make_vec("CartPole-v1", 8)

        def reset(seed):
            seeds.append(seed)
            raise Stop

        envs.reset = reset
        return envs

    monkeypatch.setattr(ppo, "make_envs", spy)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)
    monkeypatch.setenv("WORLD_SIZE", "8")
    for rank in range(8):
        monkeypatch.setenv("RANK", str(rank))
        for seed in range(1, 101):
            with pytest.raises(SystemExit):
                ppo.main(ppo.Args(seed=seed, num_envs=8))
    assert len(seeds) == 800
    seeds.sort()
    assert np.diff(seeds).min() >= 8
    assert 0 <= seeds[0] < seeds[-1] + 8 <= 2**31


def test_seeds_of_the_weights(tmp_path):
    weights = []
    for seed in (1, 2):  # with a learning rate of 0 they are the first ones
        options = dict(seed=seed, total_steps=100, policy_lr=0.0, run_dir=str(tmp_path / str(seed)))
        ppo.main(ppo.Args(**SIZES, **options))
        weights.append(ppo.load_checkpoint(options["run_dir"])["policy"]["net.layers.0.weight"])
    assert not torch.equal(*weights)


def test_resume_goes_on_with_the_saved_random_numbers(tmp_path):
    run = tmp_path / "run"
    ppo.main(ppo.Args(total_steps=100, run_dir=str(run), **SIZES))
    other = shutil.copytree(run, tmp_path / "other")
    checkpoint = ppo.load_checkpoint(other)
    checkpoint["rng"] = torch.Generator().manual_seed(99).get_state()
    torch.save(checkpoint, other / "checkpoint.pt")
    weights = []
    for folder in (run, other):
        resumed = dict(resume=str(folder), run_dir=str(run), total_steps=3000)
        ppo.main(ppo.Args(**SIZES, **resumed))
        weights.append(ppo.load_checkpoint(folder)["policy"]["net.layers.0.weight"])
    assert not torch.equal(*weights)


def state_after(run_dir, **options):
    ppo.main(ppo.Args(total_steps=100, run_dir=str(run_dir), **(SIZES | options)))
    return ppo.load_checkpoint(run_dir)


def test_options_reach_what_they_are_for(tmp_path):
    state = state_after(tmp_path / "defaults")
    policy, value = state["policy"], state["value"]
    for name in ("mean", "std", "count"):  # one normalizer, of the real steps
        assert torch.equal(policy[f"net.normalizer.{name}"], value[f"net.normalizer.{name}"])
    assert policy["net.normalizer.count"] == state["progress"][1] > 0
    assert policy["net.normalizer.mean"].abs().min() > 0
    options = dict(hidden_size=16, normalize_obs=False, normalize_rewards=False, value_lr=0.0)
    state = state_after(tmp_path / "others", **options)
    assert state["policy"]["net.layers.1.weight"].shape == (16, 16)
    assert state["value"]["net.layers.1.weight"].shape == (16, 16)
    assert state["policy"]["net.normalizer.count"] == 0
    assert state["scaler"]["moments.count"] == 0
    assert not state["value"]["net.layers.2.bias"].any()  # as it was at first
    assert state["policy"]["net.layers.2.bias"].any()
    # Without a future each return is a reward, and CartPole's are all 1
    moments = state_after(tmp_path / "myopic", gamma=0.0)["scaler"]
    assert (moments["moments.mean"], moments["moments.std"]) == (1, 1e-8)


def test_a_minibatch_has_all_of_a_transition():
    """Transition i has i in each of its fields."""
    names = ["obs", "actions", "advantages", "returns", "values", "old_log_probs"]
    numbers = dict.fromkeys(names, torch.arange(10.0))
    batch = make_batch(ppo, Normal(torch.zeros(10), 1), **numbers, fewest=10)
    parts = ppo.minibatches(batch, ppo.Args(minibatch_size=4))
    assert [len(part.obs) for part in parts] == [4, 4, 2]
    for part in parts:
        for name in names:
            assert torch.equal(getattr(part, name), part.obs), name


def test_number_of_threads(tmp_path, monkeypatch):
    during = []
    collect = ppo.collect

    def spy(*args):
        during.append(torch.get_num_threads())
        return collect(*args)

    monkeypatch.setattr(ppo, "collect", spy)
    for threads in (1, 2, 10**6):
        run_dir = str(tmp_path / str(threads))
        ppo.main(ppo.Args(total_steps=100, num_threads=threads, run_dir=run_dir, **SIZES))
    cores = os.cpu_count()
    assert during == [1, min(2, cores), cores]  # far more of them end the process
    assert torch.get_num_threads() == 1  # as before


def test_minibatches_are_in_proportion_to_those_of_the_worker_with_the_least():
    """Here this one has twice as many transitions, and so as many minibatches, but larger ones."""
    args = ppo.Args(minibatch_size=32)
    for least, most in [(80, 160), (80, 163), (64, 64), (65, 100), (7, 7)]:
        obs = torch.arange(most)
        parts = ppo.minibatches(make_batch(ppo, None, obs=obs, fewest=least), args)
        assert sorted(torch.cat([part.obs for part in parts]).tolist()) == list(range(most))
        ends = np.cumsum([len(part.obs) for part in parts])
        assert ends.tolist() == [32 * i * most // least for i in range(1, len(ends))] + [most]
        assert len(ends) == math.ceil(least / 32)


def test_the_worker_with_the_least_is_found(monkeypatch):
    args = ppo.Args(num_envs=2, num_steps=100)
    envs = ppo.make_envs(args, 2)
    normalizer = ppo.Normalizer((4,))
    policy, value = ppo.Policy(normalizer, gym.spaces.Discrete(2)), ppo.Value(normalizer)
    obs, done = envs.reset(seed=1)[0], np.zeros(2, bool)

    def with_another(x):
        """This worker, and one that has half of it."""
        return [x, x // 2 if isinstance(x, int) else x[: len(x) // 2]]

    monkeypatch.setattr(ppo, "gather", with_another)
    scaler = ppo.RewardScaler(2, 0.99)
    batch, *_ = ppo.collect(envs, obs, done, policy, value, scaler, args)
    assert batch.fewest == len(batch.obs) // 2 > 64


def test_progress_and_event_files(tmp_path, capsys, monkeypatch):
    """The line on the screen says what is left, and the event files are metrics.csv once more."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, sizes = tmp_path / "run", dict(num_envs=2, num_steps=32, minibatch_size=64)
    clock = iter(range(10**6))
    monkeypatch.setattr(ppo.time, "time", lambda: 60.0 * next(clock))  # a minute for each look
    options = dict(env_id="Pendulum-v1", total_steps=256, tensorboard=True)
    ppo.main(ppo.Args(run_dir=str(run), **sizes, **options))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["64", "128", "192", "256"]
    for line, row in zip(lines, rows, strict=True):
        step, minutes = int(row["step"]), float(row["seconds"]) / 60
        assert line.startswith(f"step {step}/256 ({step / 256:.0%})  ")
        assert f"ETA {minutes / step * (256 - step):.1f} min" in line
        assert f"KL {float(row['kl']):.4f}" in line
    events = EventAccumulator(str(run)).Reload()
    for column in ("kl", "value_loss", "clip_fraction"):
        scalars = [(scalar.step, scalar.value) for scalar in events.Scalars(column)]
        expected = [(int(row["step"]), float(row[column])) for row in rows]
        np.testing.assert_allclose(scalars, expected, rtol=1e-6)


def test_environments_of_a_run_begin_apart(watched, tmp_path):
    """Each has a seed of its own, so the first observations differ."""
    options = dict(total_steps=100, run_dir=str(tmp_path / "run"), vectorization_mode="sync")
    ppo.main(ppo.Args(**SIZES, **options))
    _, _, batch, _ = watched[0]
    num_envs = SIZES["num_envs"]
    assert len(batch.obs[:num_envs].unique(dim=0)) == num_envs
