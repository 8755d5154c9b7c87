"""The batch that `collect` makes of episodes whose numbers are known."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn
from torch.distributions import Normal

import ppo


class Counting(gym.Env):
    """Observes the steps of the episode so far; the reward is the action; the seed is the length.

    After 2 steps it is truncated, after 3 terminated, and after 4 both.
    """

    observation_space = gym.spaces.Box(0, 9, (1,))
    action_space = gym.spaces.Discrete(9)

    def reset(self, *, seed=None, options=None):
        self.length, self.count = seed or self.length, 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.count += 1
        over, obs = self.count == self.length, np.full(1, self.count, np.float32)
        return obs, float(action), over and self.length != 2, over and self.length != 3, {}


class CountingVector(gym.vector.VectorEnv):
    """The same, vectorized by hand; its observations are one array that each step overwrites."""

    single_observation_space = Counting.observation_space
    single_action_space = Counting.action_space

    def __init__(self, num_envs, autoreset_mode=AutoresetMode.NEXT_STEP):
        self.metadata, self.num_envs = {"autoreset_mode": autoreset_mode}, num_envs

    def reset(self, *, seed=None, options=None):
        self.lengths, self.over = seed + np.arange(self.num_envs), np.zeros(self.num_envs, bool)
        self.obs = np.zeros((self.num_envs, 1), np.float32)
        return self.obs, {}

    def step(self, actions):
        self.obs[:, 0] = np.where(self.over, 0, self.obs[:, 0] + 1)
        rewards = np.where(self.over, 0.0, actions)
        self.over = self.obs[:, 0] == self.lengths
        terminated, truncated = self.over & (self.lengths != 2), self.over & (self.lengths != 3)
        return self.obs, rewards, terminated, truncated, {}


class CountingPolicy(nn.Module):
    """At count k it samples k, and sends 2 (k + 1) to the environment."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    head = property(lambda self: self)

    def forward(self, obs):
        return Normal(self.weight * obs[:, 0], 1.0)

    def sample(self, obs):
        return obs[:, 0].long()

    def to_env(self, actions):
        return 2 * (actions.numpy() + 1)


gym.register("Counting-v0", entry_point=Counting, vector_entry_point=CountingVector)

# Halved rewards are k + 1, V is k, γ = ½, λ = ¼. So δ is (k + 1) + ½ (k + 1) − k, or 1 at
# termination, and the λ-returns of whole episodes, for k = 0, 1, … and 2, 3 and 4 steps:
TWO, THREE = [1.5 + 2 / 8, 3], [1.5 + 2 / 8 + 1 / 64, 3 + 1 / 8, 3]
FOUR = [1.5 + 2 / 8 + 2.5 / 64 + 1 / 512, 3 + 2.5 / 8 + 1 / 64, 4.5 + 1 / 8, 4]
X = -1  # dummy step
COUNTS = [  # by environment and step
    [[0, 1, X, 0, 1], [0, 1, 2, X, 0], [0, 1, 2, 3, X]],
    [[X, 0, 1, X, 0], [1, 2, X, 0, 1], [0, 1, 2, 3, X]],
]
RETURNS = [  # where a rollout cuts an episode off, V(k + 1) stands for the rest of it
    [[*TWO, X, *TWO], [*THREE, X, 1.5], [*FOUR, X]],
    [[X, *TWO, X, 1.5], [*THREE[1:], X, *TWO], [*FOUR, X]],
]
HALF_LOG_2PI = np.log(2 * np.pi) / 2
DONE = [{(1, 0), (2, 1), (3, 2), (4, 0)}, {(1, 1), (2, 0), (3, 2)}]  # (step, environment)
EPISODES = [[(6, 2), (12, 3), (20, 4), (6, 2)], [(12, 3), (6, 2), (20, 4)]]  # raw rewards


@pytest.mark.parametrize("mode", ["sync", "vector_entry_point"])
def test_collect(mode):
    sizes = dict(num_steps=5, num_envs=3, gamma=0.5, gae_lambda=0.25)
    args = ppo.Args(env_id="Counting-v0", **sizes)
    envs = ppo.make_envs(args, 3, vectorization_mode=mode)
    scaler_saw = []

    def scaler(*grids):
        scaler_saw[:] = grids
        return grids[0] / 2

    obs, done = envs.reset(seed=2)[0], np.zeros(3, bool)
    for rollout in range(2):
        batch, obs, done = ppo.collect(
            envs, obs, done, CountingPolicy(), nn.Flatten(0), scaler, args
        )
        grid = np.transpose(COUNTS[rollout])
        valid, counts = grid != X, grid[grid != X]
        returns = np.transpose(RETURNS[rollout])[valid]
        assert_array_equal(batch.obs, counts[:, None])  # 12 real steps, then 11
        assert_array_equal(batch.actions, counts)
        assert_array_equal(batch.values, counts)
        assert_allclose(batch.returns, returns)
        raw = returns - counts
        standardized = (raw - raw.mean()) / raw.std()
        assert_allclose(batch.advantages, standardized, rtol=1e-5, atol=1e-6)
        assert_array_equal(batch.valid, valid)
        assert {tuple(at) for at in batch.done.nonzero().tolist()} == DONE[rollout]
        assert list(zip(envs.return_queue, envs.length_queue)) == EPISODES[rollout]
        envs.return_queue.clear()
        envs.length_queue.clear()
        assert_array_equal(scaler_saw[0], np.where(valid, 2 * (grid + 1), 0))
        assert_array_equal(scaler_saw[1], batch.done)
        assert_array_equal(scaler_saw[2], valid)
        assert_array_equal(batch.old_dist.mean, 3 * batch.obs[:, 0])
        assert_allclose(
            batch.old_log_probs, -((batch.actions - 3 * batch.obs[:, 0]) ** 2) / 2 - HALF_LOG_2PI
        )
        assert not batch.old_dist.mean.requires_grad
        assert batch.fewest == len(counts)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
@pytest.mark.parametrize("vectorization", ["sync", "vector_entry_point"])
def test_other_autoreset_modes_are_refused(vectorization, mode):
    own = {"autoreset_mode": mode}
    kwargs = {"vector_kwargs": own} if vectorization == "sync" else own
    args = ppo.Args(env_id="Counting-v0")
    with pytest.raises(ValueError, match=f"{mode.name}.*not NEXT_STEP"):
        ppo.make_envs(args, 2, vectorization_mode=vectorization, **kwargs)
