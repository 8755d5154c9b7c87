"""GAE, reward scaling, and the batch that `collect` makes of episodes whose numbers are known."""

from types import SimpleNamespace

import gymnasium as gym
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

import ppo
from common.returns import RewardScaler, gae

# With γ = ½ the TD errors r + γ V' − V are 1, 2, 3; an ended step without γ V' has −2 or −5
REWARDS, VALUES = [1.0, 2.0, 3.0], [2.0, 4.0, 8.0, 16.0]
NEVER, MIDDLE, LAST = [False] * 3, [False, True, False], [False, False, True]


@pytest.mark.parametrize(
    ("terminated", "truncated", "gae_lambda", "expected"),
    [
        pytest.param(NEVER, NEVER, 0.5, [1 + 2.75 / 4, 2 + 3 / 4, 3], id="rollout-boundary"),
        pytest.param(MIDDLE, NEVER, 0.5, [1 - 2 / 4, -2, 3], id="terminated"),
        pytest.param(NEVER, MIDDLE, 0.5, [1 + 2 / 4, 2, 3], id="truncated"),
        pytest.param(MIDDLE, MIDDLE, 0.5, [1 - 2 / 4, -2, 3], id="both: termination wins"),
        pytest.param(LAST, NEVER, 0.5, [1 + 0.75 / 4, 2 - 5 / 4, -5], id="terminated-at-the-end"),
        pytest.param(NEVER, LAST, 0.5, [1 + 2.75 / 4, 2 + 3 / 4, 3], id="truncated-at-the-end"),
        pytest.param(NEVER, NEVER, 0.0, [1, 2, 3], id="lambda=0: TD errors"),
        pytest.param(  # r + γr + γ²r + γ³V − V, and so on
            NEVER, NEVER, 1.0, [1 + 1 + 0.75 + 2 - 2, 2 + 1.5 + 4 - 4, 3 + 8 - 8], id="lambda=1"
        ),
        pytest.param(LAST, NEVER, 1.0, [1 + 1 + 0.75 - 2, 2 + 1.5 - 4, 3 - 8], id="Monte Carlo"),
    ],
)
def test_gae_by_hand(terminated, truncated, gae_lambda, expected):
    # Beside it an environment with 0 for all rewards and values but its last: columns don't mix
    rewards, values = np.c_[REWARDS, [0, 0, 4]], np.c_[VALUES, [0, 0, 0, 0]]
    terminated = np.c_[terminated, NEVER]
    done = terminated | np.c_[truncated, NEVER]
    neighbour = [gae_lambda**2, 2 * gae_lambda, 4]
    advantages = gae(rewards, values, terminated, done, 0.5, gae_lambda)
    assert_allclose(advantages, np.c_[expected, neighbour])


def test_gae_around_the_dummy_step():
    # Truncated at step 1, whose final observation has V 8; step 2 is the dummy
    rewards, values = np.array([[1.0, 2, 0, 3, 1]]).T, np.array([[2.0, 4, 8, 6, 2, 4]]).T
    terminated, done = np.zeros((5, 1), bool), np.array([[0, 1, 0, 0, 0]], bool).T
    before, after = [1 + 2 / 4, 2], [(3 + 1 - 6) + 1 / 4, 1 + 2 - 2]
    for noise in [0, 100]:
        rewards[2:] += noise
        values[3:] += noise
        assert_allclose(gae(rewards, values, terminated, done, 0.5, 0.5)[:2, 0], before)
    rewards[:2], values[:3], rewards[3:], values[3:] = 100, 100, [[3], [1]], [[6], [2], [4]]
    assert_allclose(gae(rewards, values, terminated, done, 0.5, 0.5)[3:, 0], after)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 7), st.integers(1, 3), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_its_definition(data, num_steps, num_envs, gamma, gae_lambda):
    floats, shape = st.floats(-10, 10), (num_steps, num_envs)
    rewards = data.draw(hnp.arrays(float, shape, elements=floats))
    values = data.draw(hnp.arrays(float, (num_steps + 1, num_envs), elements=floats))
    terminated, truncated = (data.draw(hnp.arrays(bool, shape)) for _ in range(2))
    done = terminated | truncated
    expected = np.zeros(shape)
    for t, n in np.ndindex(shape):  # A_t = Σ_l (γλ)^l δ_{t+l}, up to the first end
        for k in range(t, num_steps):
            bootstrap = 0 if terminated[k, n] else gamma * values[k + 1, n]
            delta = rewards[k, n] + bootstrap - values[k, n]
            expected[t, n] += (gamma * gae_lambda) ** (k - t) * delta
            if done[k, n]:
                break
    advantages = gae(rewards, values, terminated, done, gamma, gae_lambda)
    assert_allclose(advantages, expected, atol=1e-9)


def test_reward_scaler_by_hand_and_restored():
    scaler, restored, ended = (
        RewardScaler(1, 0.5),
        RewardScaler(1, 0.5),
        np.array([[False], [True]]),
    )
    scaled = scaler(np.array([[1.0], [1]]), ended, ~np.zeros((2, 1), bool))
    assert_allclose(scaled, [[4], [4]])  # discounted returns 1 and 1.5
    restored.load_state_dict(scaler.state_dict())
    scaled = restored(np.array([[0.0], [5.5]]), ~ended, ended)  # a dummy step, then 5.5: mean 8/3
    assert_allclose(scaled[1], 5.5 / ((25 + 12.25 + 72.25) / 27) ** 0.5, rtol=1e-6)


@pytest.mark.parametrize("lengths", [[20], [6, 1, 13], [1] * 20])
def test_reward_scaler_against_the_whole_history(lengths):
    rewards, returns = np.random.default_rng(0).normal(3, 2, (20, 2)), np.full((20, 2), np.nan)
    done, valid = np.zeros((2, 20, 2), bool)
    # By environment, first step and end of each episode; a dummy step comes between two
    episodes = [[(0, 5), (6, 9), (10, 12), (13, 20)], [(0, 10), (11, 13), (14, 20)]]
    for n, spans in enumerate(episodes):
        for start, end in spans:
            valid[start:end, n], done[end - 1, n] = True, end < 20
            for t in range(start, end):
                returns[t, n] = sum(0.9 ** (t - k) * rewards[k, n] for k in range(start, t + 1))
    rewards[~valid] = 0
    scaler, stop = RewardScaler(2, 0.9), 0
    for length in lengths:
        span = slice(stop, stop := stop + length)
        scaled = scaler(rewards[span], done[span], valid[span])
        assert_allclose(scaled, rewards[span] / np.nanstd(returns[:stop]), rtol=1e-5)


@pytest.mark.parametrize(
    ("rewards", "gamma", "enabled"),
    [
        pytest.param([[1.0], [7.0]], 0.9, False, id="disabled"),
        pytest.param([[0.0], [0.0]], 0.9, True, id="no-rewards"),
        pytest.param([[3.0], [3.0]], 0.0, True, id="all-alike"),
    ],
)
def test_reward_scaler_leaves_rewards_alone(rewards, gamma, enabled):
    done, valid = np.zeros((2, 1), bool), np.ones((2, 1), bool)
    scaled = RewardScaler(1, gamma, enabled)(np.array(rewards), done, valid)
    assert_array_equal(scaled, rewards)


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
    """The same, vectorised by hand; its observations are one array that each step overwrites."""

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

    def forward(self, obs):
        return self.weight * obs

    def sample(self, obs):
        return obs[:, 0].long()

    def to_env(self, actions):
        return 2 * (actions.numpy() + 1)


gym.register("Counting-v0", entry_point=Counting, vector_entry_point=CountingVector)

# Halved rewards are k + 1, V is k, γ = λ = ½. So δ is (k + 1) + ½ (k + 1) − k, or 1 at termination,
# and the λ-returns of whole episodes, for k = 0, 1, … and episodes of 2, 3 and 4 steps:
TWO, THREE, FOUR = [2, 3], [2.0625, 3.25, 3], [2.171875, 3.6875, 4.75, 4]
X = -1  # dummy step
COUNTS = [  # by environment and step
    [[0, 1, X, 0, 1], [0, 1, 2, X, 0], [0, 1, 2, 3, X]],
    [[X, 0, 1, X, 0], [1, 2, X, 0, 1], [0, 1, 2, 3, X]],
]
RETURNS = [  # where a rollout cuts an episode off, V(k + 1) stands for the rest of it
    [[*TWO, X, *TWO], [*THREE, X, 1.5], [*FOUR, X]],
    [[X, *TWO, X, 1.5], [*THREE[1:], X, 2, 3], [*FOUR, X]],
]
DONE = [{(1, 0), (2, 1), (3, 2), (4, 0)}, {(1, 1), (2, 0), (3, 2)}]  # (step, environment)
EPISODES = [[(6, 2), (12, 3), (20, 4), (6, 2)], [(12, 3), (6, 2), (20, 4)]]  # raw rewards


@pytest.mark.parametrize("mode", ["sync", "vector_entry_point"])
def test_collect(mode):
    envs = ppo.make_envs("Counting-v0", 3, vectorization_mode=mode)
    args = SimpleNamespace(num_steps=5, num_envs=3, gamma=0.5, gae_lambda=0.5, device="cpu")
    scaler_saw = []

    def scaler(*grids):
        scaler_saw[:] = grids
        return grids[0] / 2

    state = envs.reset(seed=2)[0], np.zeros(3, bool), 0.0
    for rollout in range(2):
        batch, old_dist, state, episodes = ppo.collect(
            envs, CountingPolicy(), nn.Flatten(0), scaler, state, args
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
        assert episodes == EPISODES[rollout]
        assert_array_equal(scaler_saw[0], np.where(valid, 2 * (grid + 1), 0))
        assert_array_equal(scaler_saw[1], batch.done)
        assert_array_equal(scaler_saw[2], valid)
        assert_array_equal(old_dist, 3 * batch.obs)
        assert not old_dist.requires_grad


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
@pytest.mark.parametrize("vectorization", ["sync", "vector_entry_point"])
def test_other_autoreset_modes_are_refused(vectorization, mode):
    own = {"autoreset_mode": mode}
    kwargs = {"vector_kwargs": own} if vectorization == "sync" else own
    with pytest.raises(ValueError, match=f"{mode.name}.*not NEXT_STEP"):
        ppo.make_envs("Counting-v0", 2, vectorization_mode=vectorization, **kwargs)
