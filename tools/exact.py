"""Bias and variance of the importance weights, without sampling: every expectation is a sum.

Run: python -m tools.exact --output docs/bias_variance.png

In a random problem of 4 steps, where all probabilities of transitions and of the old policy
are multiples of a quarter, a batch can hold every path as often as the old policy takes it.
Then the mean over the batch is the expectation. The figure follows the estimates of ∇J as the
policy moves away along ∇J.
"""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical, kl_divergence

import is_pg
from common.returns import gae
from tools import fail, parse, plot

HORIZON, STATES, ACTIONS, END = 4, 3, 3, 3  # the states are 0, 1, 2 and the end
# none: ∇log π A, as in vanilla_pg.py
WEIGHTINGS = ["none", "step", "trajectory", "per-decision"]


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
    """A random MDP that begins in state 0. Its rewards, (HORIZON, S+1, A), may depend on time."""

    def __init__(self, seed, gamma):
        rng = np.random.default_rng(seed)
        self.gamma = gamma
        self.rewards = np.tile(rng.normal(size=(STATES + 1, ACTIONS)), (HORIZON, 1, 1))
        self.rewards[:, END] = 0
        # One of four equally likely draws gives the next state, or the old policy's action
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

    @torch.no_grad()
    def old_dist(self, states):
        return self.old_policy()(states)

    def paths(self):
        draws = np.indices((4,) * (2 * HORIZON)).reshape(2 * HORIZON, -1)
        draws = draws[:, draws[-1] == 0]  # where the last step leads makes no difference
        state = np.zeros(draws.shape[1], int)
        index = np.arange(len(state))
        steps = []
        for t in range(HORIZON):
            action = self.old_actions[state, draws[2 * t]]
            next_state = self.next_states[state, action, draws[2 * t + 1]]
            time = np.full_like(state, t)
            reward = self.rewards[t, state, action]
            valid = state != END
            last = (next_state == END) | (t == HORIZON - 1)
            steps.append((state, action, time, reward, valid & last, valid, index))
            state = next_state
        halves = (np.hsplit(np.array(grid), 2) for grid in zip(*steps))
        return Paths(*(np.concatenate(pair) for pair in halves))

    def batch(self, values, gae_lambda=1.0):
        """All paths as a batch, with advantages by the project's own gae. values: (H, S+1)."""
        paths = self.paths()
        grid = values[paths.times, paths.states]
        grid = np.concatenate([grid, grid[:1]])  # (T+1, N); after an end no value counts
        ends = paths.done, paths.done
        advantages = gae(paths.rewards, grid, *ends, self.gamma, gae_lambda)
        arrays = [x[paths.valid] for x in (paths.states, paths.actions, advantages)]
        obs, actions, advantages = map(torch.from_numpy, arrays)
        return is_pg.Batch(
            obs=obs,
            actions=actions,
            advantages=advantages,
            returns=advantages,  # no policy update takes notice of returns and values
            values=advantages,
            old_dist=self.old_dist(obs),
            old_log_probs=self.old_dist(obs).log_prob(actions),
            valid=torch.from_numpy(paths.valid),
            done=torch.from_numpy(paths.done),
            fewest=1,  # so that all of it is one minibatch
        )

    # By dynamic programming, not by paths; probs: (S+1, A), differentiable

    def transitions(self):
        """P(s'|s, a), (S+1, A, S+1)."""
        return torch.from_numpy(np.eye(STATES + 1)[self.next_states].mean(2))

    def action_values(self, probs):
        """Q_t(s, a), (H, S+1, A), and V_t(s), (H, S+1)."""
        all_q, all_v = [], []
        v = torch.zeros(STATES + 1).double()
        for t in reversed(range(HORIZON)):
            q = torch.from_numpy(self.rewards[t]) + self.gamma * self.transitions() @ v
            v = (probs * q).sum(1)
            all_q.insert(0, q)
            all_v.insert(0, v)
        return torch.stack(all_q), torch.stack(all_v)

    def visits(self, probs):
        """d_t(s), (H, S+1): how likely the policy is in a state at a step."""
        visits = [torch.eye(STATES + 1).double()[0]]
        for _ in range(HORIZON - 1):
            next_visits = torch.einsum("s,sa,sax->x", visits[-1], probs, self.transitions())
            visits.append(next_visits)
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
    """∇log π(a|s) for all s and a, (S+1, A, P): in the row of s 1 − π at a, −π elsewhere."""
    rows = torch.eye(ACTIONS).double() - policy.probs().detach()[:, None]  # (S+1, A, A)
    state = torch.eye(STATES + 1).double()
    return torch.einsum("sab,sx->saxb", rows, state).flatten(2)


@torch.no_grad()
def estimates(problem, policy, batch, weighting):
    """The estimate of ∇J that each path makes, (paths, P), and the weights, (B,)."""
    paths = problem.paths()
    if weighting == "none":
        weights, weighted = torch.ones_like(batch.advantages), batch.advantages
    else:
        log_ratio = policy(batch.obs).log_prob(batch.actions) - batch.old_log_probs
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
    std = (each - mean).square().sum(1).mean().sqrt()
    ess = weights.mean() ** 2 / weights.square().mean()
    return bias.item(), std.item(), ess.item()


DISTANCES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)


@dataclass
class Args:
    output: str = "bias_variance.png"  # picture to write
    problems: int = 20  # random problems; the figure has medians over them
    distances: tuple[float, ...] = DISTANCES  # how far θ is from φ, along ∇J


def measure(args):
    """Bias, standard deviation, effective sample size and E[KL(φ ‖ θ)].

    The first two are in lengths of ∇J at φ. Returns (problems, weightings, distances, 4).
    """
    rows = np.empty((args.problems, len(WEIGHTINGS), len(args.distances), 4))
    for seed in range(args.problems):
        problem = Problem(seed, 1.0)
        old = problem.old_policy()
        _, values = problem.action_values(old.probs())
        batch = problem.batch(values.detach().numpy())
        slope = gradient_of_return(problem, old)
        length = slope.norm()
        uphill = (slope / length).reshape(old.logits.shape)
        for j, distance in enumerate(args.distances):
            policy = problem.old_policy()
            policy.logits.data += distance * uphill
            kl = kl_divergence(old(batch.obs), policy(batch.obs)).mean().item()
            for i, weighting in enumerate(WEIGHTINGS):
                bias, std, ess = bias_and_variance(problem, policy, batch, weighting)
                rows[seed, i, j] = bias / length.item(), std / length.item(), ess, kl
    return rows


def in_words(quartiles):
    """Medians and quartiles of the four measures, (3, 4)."""
    names = ["bias", "standard deviation", "effective sample size", "KL"]
    parts = [
        f"{name} {median:.3f} ({low:.3f} to {high:.3f})"
        for name, (low, median, high) in zip(names, quartiles.T)
    ]
    return ", ".join(parts)


def main(args):
    if args.problems < 1 or not args.distances:
        fail("--problems must be at least 1, and --distances must have one distance")
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        fail("plots need matplotlib: pip install matplotlib")
    plot.refuse_picture(args.output)
    quartiles = np.quantile(measure(args), [0.25, 0.5, 0.75], axis=0)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for i, weighting in enumerate(WEIGHTINGS):
        bias, std, ess, kl = quartiles[1, i].T  # medians
        style = dict(
            color=f"C{4 + i}",  # other colors than the scripts have
            label=weighting,
            linestyle="--" if weighting == "per-decision" else "-",
            marker="o",
        )
        left.plot(bias, std, **style)
        right.plot(kl, ess, **style)
        print(f"{weighting}: median (quartiles)")
        for j, distance in enumerate(args.distances):
            if distance >= 1:  # there is room for it
                place = dict(xytext=(6, 3), textcoords="offset points", fontsize=8)
                left.annotate(f"{distance:g}", (bias[j], std[j]), **place)
            print(f"  {distance:g}: {in_words(quartiles[:, i, j])}")
    left.set(xlabel="bias, ‖E[ĝ] − ∇J(θ)‖", ylabel="standard deviation of ĝ, from one episode")
    left.set_title("in lengths of ∇J(φ); beside the points the distance from φ to θ", fontsize=10)
    right.set(xlabel="E[ KL(φ ‖ θ) ]", ylabel="effective sample size, as a fraction")
    right.set_title("the last two have the same weights", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(title="importance weights", frameon=False)
    figure.suptitle(f"∇J from episodes of an old policy φ: medians of {args.problems} problems")
    plot.save(figure, args.output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(parse(Args))
