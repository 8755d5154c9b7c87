"""Bias and variance of the importance weights, without sampling: every expectation is a sum.

Run: python -m tools.exact --output docs/bias_variance.png

In a random problem of 4 steps, with all probabilities of its transitions and of the old policy in
quarters, a batch can hold every path as often as the old policy takes it: its mean is the
expectation. The figure follows the estimates of ∇J as the policy moves away along ∇J.
"""

import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical

import is_pg
from common.returns import gae

HORIZON, STATES, ACTIONS, END = 4, 3, 3, 3  # the states are 0, 1, 2 and the end
WEIGHTINGS = ["none", "step", "trajectory", "per-decision"]  # none: ∇log π A, as vanilla_pg.py


class Paths(NamedTuple):
    """Time-major grids, (T, N): two paths to a column, N·2 paths, each equally likely."""

    states: np.ndarray
    actions: np.ndarray
    times: np.ndarray  # steps since the episode began
    rewards: np.ndarray
    done: np.ndarray
    valid: np.ndarray  # False after an early end, up to the next path of the column
    index: np.ndarray  # which path it is


class Problem:
    """A random MDP that begins in state 0, with time-dependent rewards, (HORIZON, S+1, A)."""

    def __init__(self, seed, gamma):
        rng = np.random.default_rng(seed)
        self.gamma = gamma
        self.rewards = np.tile(rng.normal(size=(STATES + 1, ACTIONS)), (HORIZON, 1, 1))
        self.rewards[:, END] = 0
        # The next state, and the old policy's action, by one of four equally likely draws
        self.next_states = rng.integers(0, STATES + 1, (STATES + 1, ACTIONS, 4))
        self.next_states[:STATES, :, 0] = rng.integers(0, STATES, (STATES, ACTIONS))
        self.next_states[END] = END
        extra = rng.integers(0, ACTIONS, (STATES + 1, 1))
        self.old_actions = np.c_[np.tile(np.arange(ACTIONS), (STATES + 1, 1)), extra]

    def with_discounted_rewards(self):
        """The same J, of rewards γᵗ r_t and without a discount."""
        problem = copy.copy(self)
        problem.rewards = self.rewards * self.gamma ** np.arange(HORIZON)[:, None, None]
        problem.gamma = 1.0
        return problem

    def old_policy(self):
        counts = np.eye(ACTIONS)[self.old_actions].sum(1)  # (S+1, A)
        return Tabular(torch.from_numpy(counts / 4).log())

    def paths(self):
        draws = np.indices((4,) * (2 * HORIZON)).reshape(2 * HORIZON, -1)
        draws = draws[:, draws[-1] == 0]  # where the last step leads to makes no difference
        state, grids = np.zeros(draws.shape[1], int), []
        for t in range(HORIZON):
            action = self.old_actions[state, draws[2 * t]]
            next_state = self.next_states[state, action, draws[2 * t + 1]]
            valid, last = state != END, (next_state == END) | (t == HORIZON - 1)
            time, index = np.full_like(state, t), np.arange(len(state))
            reward = self.rewards[t, state, action]
            grids.append((state, action, time, reward, valid & last, valid, index))
            state = next_state
        halves = (np.hsplit(np.array(grid), 2) for grid in zip(*grids))
        return Paths(*(np.concatenate(pair) for pair in halves))

    def batch(self, values, gae_lambda=1.0):
        """All paths as a batch, with advantages by the project's own gae. values: (H, S+1)."""
        paths = self.paths()
        grid = values[paths.times, paths.states]
        grid = np.concatenate([grid, grid[:1]])  # (T+1, N); after an end no value counts
        ends = paths.done, paths.done
        advantages = gae(paths.rewards, grid, *ends, self.gamma, gae_lambda)
        arrays = [x[paths.valid] for x in (paths.states, paths.actions, advantages)]
        arrays += [None, None, paths.valid, paths.done]
        return is_pg.Batch(*(x if x is None else torch.from_numpy(x) for x in arrays))

    # By dynamic programming, not by paths; probs: (S+1, A), differentiable

    def transitions(self):
        return torch.from_numpy(np.eye(STATES + 1)[self.next_states].mean(2))  # (S+1, A, S+1)

    def action_values(self, probs):
        """Q_t(s, a), (H, S+1, A), and V_t(s), (H, S+1)."""
        q, v, after = [], [], torch.zeros(STATES + 1).double()
        for t in reversed(range(HORIZON)):
            q.insert(0, torch.from_numpy(self.rewards[t]) + self.gamma * self.transitions() @ after)
            after = (probs * q[0]).sum(1)
            v.insert(0, after)
        return torch.stack(q), torch.stack(v)

    def visits(self, probs):
        """d_t(s), (H, S+1): how likely the policy is in a state at a step."""
        visits = [torch.eye(STATES + 1).double()[0]]
        for _ in range(HORIZON - 1):
            visits.append(torch.einsum("s,sa,sax->x", visits[-1], probs, self.transitions()))
        return torch.stack(visits)

    def expected_return(self, probs):
        """J = E[ Σ γᵗ r_t ]"""
        return self.action_values(probs)[1][0, 0]


class Tabular(nn.Module):
    """π(a|s) = softmax of a row of logits, (S+1, A)."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, states):
        return Categorical(logits=self.logits[states])

    def probs(self):
        return self.logits.softmax(1)


def score_table(policy):
    """∇log π(a|s) for all s and a, (S+1, A, P): in the row of s 1 − π at a and −π elsewhere."""
    rows = torch.eye(ACTIONS).double() - policy.probs().detach()[:, None]  # (S+1, A, A)
    return torch.einsum("sab,sx->saxb", rows, torch.eye(STATES + 1).double()).flatten(2)


@torch.no_grad()
def estimates(problem, policy, batch, weighting):
    """The estimate of ∇J that each path makes, (paths, P), and the weights, (B,)."""
    paths, old_dist = problem.paths(), problem.old_policy()(batch.obs)
    if weighting == "none":
        weights, weighted = torch.ones_like(batch.advantages), batch.advantages
    else:
        log_ratio = policy(batch.obs).log_prob(batch.actions) - old_dist.log_prob(batch.actions)
        args = is_pg.Args(weighting=weighting, gamma=problem.gamma, gae_lambda=1.0)
        weights, weighted = is_pg.weighted_advantages(log_ratio, batch, args)
    terms = weighted[:, None] * score_table(policy)[batch.obs, batch.actions]
    index = torch.from_numpy(paths.index[paths.valid])
    return terms.new_zeros(index.max() + 1, terms.shape[1]).index_add(0, index, terms), weights


def gradient_of_return(problem, policy):
    (gradient,) = torch.autograd.grad(problem.expected_return(policy.probs()), policy.logits)
    return gradient.flatten()


def bias_and_variance(problem, policy, batch, weighting):
    """‖E[ĝ] − ∇J‖ and √(E‖ĝ − E[ĝ]‖²), of one path, and (E w)² / E w² over the steps."""
    each, weights = estimates(problem, policy, batch, weighting)
    mean = each.mean(0)
    bias = (mean - gradient_of_return(problem, policy)).norm()
    deviation = (each - mean).square().sum(1).mean().sqrt()
    return bias.item(), deviation.item(), (weights.mean() ** 2 / weights.square().mean()).item()
