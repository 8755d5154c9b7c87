"""Advantages and reward scaling, on time-major (T, N) arrays."""

import numpy as np
import torch
from numpy import ndarray as Array
from torch import nn

from common.networks import Normalizer


def gae(
    rewards: Array, values: Array, terminated: Array, done: Array, gamma: float, gae_lambda: float
) -> Array:
    """Generalized advantage estimation: A_t = Σ_l (γλ)^l δ_{t+l} (Schulman et al. 2016, eq. 16).
    All are (T, N), except values, (T+1, N): V(s_0) … V(s_T). δ_t = r_t + γ V(s_{t+1}) − V(s_t),
    without V(s_{t+1}) if the step terminated. The sum ends with a step that is done.
    """
    next_values = np.where(terminated, 0.0, values[1:])  # 0 · NaN would be NaN
    delta = rewards + gamma * next_values - values[:-1]
    advantages = np.empty_like(delta)
    advantage = 0.0
    for t in reversed(range(len(delta))):
        advantage = delta[t] + np.where(done[t], 0.0, gamma * gae_lambda * advantage)
        advantages[t] = advantage
    return advantages


class RewardScaler(nn.Module):
    """Divides rewards by the running standard deviation of the discounted return.
    R_t = γ R_{t-1} + r_t (Engstrom et al. 2020), but here from 0 in each episode.
    """

    def __init__(self, num_envs: int, gamma: float, enabled: bool = True):
        super().__init__()
        self.gamma = gamma
        self.moments = Normalizer((1,), enabled)
        self.discounted = np.zeros(num_envs)  # R of the episodes that are under way

    def forward(self, rewards: Array, done: Array, valid: Array) -> Array:  # all (T, N)
        history = np.empty(rewards.shape)
        for t in range(len(rewards)):
            reward = np.where(valid[t], rewards[t], 0.0)
            self.discounted = self.gamma * self.discounted + reward
            history[t] = self.discounted
            self.discounted = np.where(done[t], 0.0, self.discounted)
        self.moments.update(torch.from_numpy(history[valid]))
        std = self.moments.std.item()
        return rewards / std if std > 1e-8 else rewards  # if returns differ at all
