"""GAE, reward scaling and normalization, by hand and by definition."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from common.networks import Normalizer
from common.returns import RewardScaler, gae

# With γ = ½ the TD errors r + γ V' − V are 1, 2, 3; without γ V' they are −2 or −5
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
    # Beside it another environment, whose numbers are 0 but the last: columns don't mix
    rewards, values = np.c_[REWARDS, [0, 0, 4]], np.c_[VALUES, [0, 0, 0, 0]]
    terminated = np.c_[terminated, NEVER]
    done = terminated | np.c_[truncated, NEVER]
    neighbor = [gae_lambda**2, 2 * gae_lambda, 4]
    advantages = gae(rewards, values, terminated, done, 0.5, gae_lambda)
    assert_allclose(advantages, np.c_[expected, neighbor])


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


LAMBDAS = st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 8), st.integers(1, 3), st.floats(0, 1), LAMBDAS)
def test_gae_is_its_definition(data, num_steps, num_envs, gamma, gae_lambda):
    floats, shape = st.floats(-10, 10), (num_steps, num_envs)
    rewards = data.draw(hnp.arrays(float, shape, elements=floats))
    values = data.draw(hnp.arrays(float, (num_steps + 1, num_envs), elements=floats))
    terminated, truncated = (data.draw(hnp.arrays(bool, shape)) for _ in range(2))
    dummy = np.zeros(shape, bool)
    for t in range(1, num_steps):  # a step after an end merely resets, and ends nothing
        dummy[t] = (terminated | truncated)[t - 1]
        terminated[t] &= ~dummy[t]
        truncated[t] &= ~dummy[t]
    done = terminated | truncated
    advantages = gae(rewards, values, terminated, done, gamma, gae_lambda)
    for t, n in np.argwhere(~dummy):
        over = np.flatnonzero(done[t:, n])
        length = over[0] + 1 if len(over) else num_steps - t
        last, reward, value = t + length - 1, rewards[t:, n], values[t:, n]
        bootstraps = gamma * value[1 : length + 1]
        bootstraps[-1] *= not terminated[last, n]
        delta = reward[:length] + bootstraps - value[:length]
        expected = sum((gamma * gae_lambda) ** k * delta[k] for k in range(length))
        if gae_lambda == 0:
            expected = delta[0]
        elif gae_lambda == 1:  # the discounted return, as far as it is known, less V(s_t)
            rest = gamma ** (length - 1) * bootstraps[-1]
            expected = sum(gamma**k * reward[k] for k in range(length)) + rest - value[0]
        assert_allclose(advantages[t, n], expected, rtol=1e-10, atol=1e-10)


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


@pytest.mark.usefixtures("double_precision")
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
        assert_allclose(scaled, rewards[span] / np.nanstd(returns[:stop]), rtol=1e-10)


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


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.float64, bool])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=str)
def test_normalizer_against_the_whole_history(shape, dtype, precision):
    tolerance = 1e-4 if precision == torch.float32 else 1e-10
    rng = np.random.default_rng(0)
    obs = rng.integers(0, 2 if dtype is bool else 200, (90, *shape)).astype(dtype)
    history, flat = torch.from_numpy(obs), obs.reshape(90, -1).astype(float)
    for sizes in ([90], [1, 2, 37, 50]):
        normalizer, count = Normalizer(shape).to(precision), 0
        for part in history.split(sizes):
            restored = Normalizer(shape).to(precision)
            restored.load_state_dict(normalizer.state_dict())
            restored.update(part)
            normalizer.update(part)
            count += len(part)
            mean, std = flat[:count].mean(0), flat[:count].std(0).clip(1e-8)  # of one row it is 0
            expected = ((flat - mean) / std).clip(-10, 10)
            for each in (normalizer, normalizer, restored):  # twice: acting moves nothing
                assert_allclose(each(history), expected, rtol=tolerance, atol=tolerance)
