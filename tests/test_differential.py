"""The same weights and the same batch, updated here and by the libraries.

Where a library does something else on purpose, the name of the test says so, or an option sets
both alike: advantages are not normalized again per minibatch, and gradients are not clipped, since
Stable-Baselines3 clips those of both networks together.
"""

import types

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch
from recording import make_batch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import configure
from torch.nn.utils import parameters_to_vector
from torch.optim import Adam

import ppo
import trpo
from common.returns import gae

B, H, LR = 96, 16, 3e-3
ENVIRONMENTS = {"discrete": "CartPole-v1", "continuous": "Pendulum-v1"}


class Pair:
    """Our two networks and those of a library's model, with the same weights; and a batch."""

    def __init__(self, script, library, env_id, **options):
        torch.manual_seed(1)
        env = gym.make(env_id)
        shape = env.observation_space.shape
        normalizer = script.Normalizer(shape, enabled=False)
        self.policy = script.Policy(normalizer, env.action_space, H)
        self.value = script.Value(normalizer, H)
        options |= dict(n_steps=B, learning_rate=LR, normalize_advantage=False)
        options |= dict(policy_kwargs=dict(net_arch=dict(pi=[H, H], vf=[H, H])))
        self.model = library("MlpPolicy", env, **options)
        self.model.set_logger(configure(None, []))
        for layer in [*self.policy.net.layers, *self.value.net.layers]:  # no special weights
            torch.nn.init.normal_(layer.weight, std=0.5)
            torch.nn.init.normal_(layer.bias, std=0.5)
        with torch.no_grad():
            for here, there in zip(self.ours(), self.theirs(), strict=True):
                there.copy_(here)
        self.fill(script, shape)

    def ours(self):
        deviations = self.policy.head.parameters()  # log_std, of a Box
        return [*self.policy.net.parameters(), *deviations, *self.value.parameters()]

    def theirs(self):
        """In the order of ours."""
        policy = self.model.policy
        actor = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
        deviations = [policy.log_std] if hasattr(policy, "log_std") else []
        critic = [*policy.mlp_extractor.value_net.parameters(), *policy.value_net.parameters()]
        return [*actor, *deviations, *critic]

    def fill(self, script, shape):
        """One random batch, as ours and in the library's buffer."""
        obs, advantages, returns = torch.randn(B, *shape), torch.randn(B), torch.randn(B)
        with torch.no_grad():
            actions = self.policy.sample(obs)
            old_dist = self.policy(obs)
            there = self.model.policy.evaluate_actions(obs, actions)
            torch.testing.assert_close(self.value(obs), there[0].flatten())
            torch.testing.assert_close(old_dist.log_prob(actions), there[1])
            torch.testing.assert_close(old_dist.entropy(), there[2])
        columns = dict(obs=obs, actions=actions, advantages=advantages, returns=returns)
        self.batch = make_batch(script, old_dist, **columns)._replace(fewest=B)
        buffer = self.model.rollout_buffer
        buffer.reset()
        for observation, action, log_prob in zip(obs, actions, self.batch.old_log_probs):
            row = observation.numpy()[None], action.numpy().reshape(1, -1)
            buffer.add(*row, 0, 0, torch.zeros(1), log_prob[None])
        buffer.advantages[:, 0] = advantages
        buffer.returns[:, 0] = returns

    def assert_updated_alike(self, before, tolerance):
        """Differences are small beside what the update has changed."""
        here, there = parameters_to_vector(self.ours()), parameters_to_vector(self.theirs())
        assert (here - there).abs().max() < tolerance * (here - before).abs().max()


@pytest.fixture
def same_orders(monkeypatch):
    """Minibatches in the same order: the k-th permutation of each kind is the same."""
    count = types.SimpleNamespace(ours=0, theirs=0)

    def order(k, n):
        return np.random.default_rng(k).permutation(n)

    def ours(n):
        count.ours += 1
        return torch.from_numpy(order(count.ours, n))

    def theirs(n):
        count.theirs += 1
        return order(count.theirs, n)

    monkeypatch.setattr(torch, "randperm", ours)
    monkeypatch.setattr(np.random, "permutation", theirs)
    return count


@pytest.mark.parametrize("name", ENVIRONMENTS)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.02])
def test_ppo_of_stable_baselines3_has_one_optimizer_for_both_networks(
    name, entropy_coef, same_orders
):
    """Three epochs of three minibatches; Adam treats each parameter by itself."""
    options = dict(n_epochs=3, batch_size=32, ent_coef=entropy_coef, vf_coef=1.0)
    options |= dict(clip_range=0.1, max_grad_norm=float("inf"))
    pair = Pair(ppo, stable_baselines3.PPO, ENVIRONMENTS[name], **options)
    before = parameters_to_vector(pair.ours()).detach()
    args = ppo.Args(policy_epochs=3, value_epochs=3, minibatch_size=32, entropy_coef=entropy_coef)
    args.clip_eps, args.max_grad_norm = 0.1, float("inf")
    metrics = ppo.update_policy(
        pair.policy, Adam(pair.policy.parameters(), LR, eps=1e-5), pair.batch, args
    )
    same_orders.ours = 0
    ppo.update_value(pair.value, Adam(pair.value.parameters(), LR, eps=1e-5), pair.batch, args)
    pair.model.train()
    assert same_orders.ours == same_orders.theirs == 3
    pair.assert_updated_alike(before, 3e-4)
    assert 0.1 < metrics["clip_fraction"] < 0.9
    there = pair.model.logger.name_to_value["train/clip_fraction"]
    assert metrics["clip_fraction"].item() == pytest.approx(there, abs=1e-6)


@pytest.mark.parametrize("name", ENVIRONMENTS)
@pytest.mark.parametrize(("max_kl", "damping", "fraction"), [(0.01, 0.1, 1), (0.3, 3e-3, 0.7)])
def test_trpo_of_sb3_contrib_searches_with_the_kl_the_other_way_round(
    name, max_kl, damping, fraction, same_orders, monkeypatch
):
    """At π_old both KLs have the Hessian F. They start conjugate gradient at noise, ours at 0."""
    options = dict(cg_max_steps=7, cg_damping=damping, target_kl=max_kl, n_critic_updates=3)
    options |= dict(batch_size=32, line_search_shrinking_factor=0.7)
    pair = Pair(trpo, sb3_contrib.TRPO, ENVIRONMENTS[name], **options)
    pair.batch.advantages.mul_(100)  # so that their absolute tolerance ends no search
    pair.model.rollout_buffer.advantages *= 100
    before = parameters_to_vector(pair.ours()).detach()
    args = trpo.Args(cg_iters=7, cg_tolerance=0.0, cg_damping=damping, max_kl=max_kl)
    args.value_epochs, args.minibatch_size, args.backtrack_coef = 3, 32, 0.7
    args.max_grad_norm = float("inf")
    metrics = trpo.update_policy(pair.policy, pair.batch, args)
    same_orders.ours = 1  # they order the batch for the policy too
    trpo.update_value(pair.value, Adam(pair.value.parameters(), LR, eps=1e-5), pair.batch, args)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", torch.zeros_like)
        pair.model.train()
    assert metrics["step_fraction"] == pytest.approx(fraction)
    pair.assert_updated_alike(before, 3e-4)


@pytest.mark.parametrize("seed", range(5))
def test_gae_of_stable_baselines3_adds_the_value_of_a_last_observation_to_the_reward(seed):
    """At a truncation. Ours has the last observation in a row of its own, the step that resets."""
    random = np.random.default_rng(seed)
    steps, gamma, gae_lambda = 60, 0.9, 0.8
    values = random.normal(size=(steps + 1, 1))
    rewards = random.normal(size=(steps, 1))
    resets, terminated, truncated = np.zeros((3, steps, 1), bool)
    for t in range(steps):
        resets[t] = t > 0 and (terminated[t - 1] or truncated[t - 1])
        if not resets[t]:
            kind = random.integers(8)
            terminated[t], truncated[t] = kind == 0, kind == 1
    done = terminated | truncated
    rewards[resets] = 0
    ours = gae(rewards, values, terminated, done, gamma, gae_lambda)

    valid = ~resets[:, 0]
    space = gym.spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(valid.sum(), space, space, "cpu", gae_lambda, gamma)
    nothing, starts = np.zeros((1, 1)), True
    for t in np.flatnonzero(valid):
        reward = rewards[t] + gamma * values[t + 1] * truncated[t]
        value = torch.from_numpy(values[t])
        buffer.add(nothing, nothing, reward, np.array([starts]), value, torch.zeros(1))
        starts = done[t, 0]
    buffer.compute_returns_and_advantage(torch.from_numpy(values[-1]), done[-1])
    assert truncated.any()
    assert terminated.any()
    np.testing.assert_allclose(ours[valid], buffer.advantages, rtol=1e-4, atol=1e-5)
    lambda_returns = (ours + values[:-1])[valid]
    np.testing.assert_allclose(lambda_returns, buffer.returns, rtol=1e-4, atol=1e-5)
