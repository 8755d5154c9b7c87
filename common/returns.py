"""Advantages and reward scaling, on time-major (T, N) arrays."""

import numpy as np
import torch
from torch import nn

from common.networks import Normalizer


def gae(rewards, values, terminated, done, gamma, gae_lambda):
    """Generalized advantage estimation: A_t = Σ_l (γλ)^l δ_{t+l} (Schulman et al. 2016, eq. 16).

    rewards, terminated, done: (T, N); values: (T+1, N), V(s_0) … V(s_T). All NumPy.
    δ_t = r_t + γ V(s_{t+1}) − V(s_t), where a terminated step has no V(s_{t+1}) and a truncated
    one keeps it; the sum ends after either (done = terminated or truncated). Returns (T, N).
    """
    delta = rewards + gamma * values[1:] * ~terminated - values[:-1]
    decay = gamma * gae_lambda * ~done
    advantages, advantage = np.empty_like(delta), 0.0
    for t in reversed(range(len(delta))):
        advantages[t] = advantage = delta[t] + decay[t] * advantage
    return advantages


class RewardScaler(nn.Module):
    """Divides rewards by the running standard deviation of the discounted return.

    R_t = γ R_{t-1} + r_t, from 0 at the start of each episode (Engstrom et al. 2020).
    """

    def __init__(self, num_envs, gamma, enabled=True):
        super().__init__()
        self.gamma, self.moments = gamma, Normalizer((1,), enabled)
        self.discounted = np.zeros(num_envs)  # R of the episodes that are under way

    def forward(self, rewards, done, valid):
        """rewards, done, valid: (T, N) arrays; only valid steps count. Returns (T, N)."""
        history = np.empty(rewards.shape)
        for t in range(len(rewards)):
            history[t] = self.discounted = self.gamma * self.discounted + rewards[t]
            self.discounted = self.discounted * ~done[t]
        self.moments.update(torch.from_numpy(history[valid]))
        std = self.moments.std.item()
        return rewards / std if std > 1e-8 else rewards  # all alike: nothing to scale by
