"""update_policy of each script, against gradients and weights worked out by other means."""

import copy
import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from recording import Recorder, make_batch
from torch import nn
from torch.distributions import kl_divergence
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import is_pg
import ppo
import trpo
import vanilla_pg
from common.networks import BernoulliHead, Normalizer, Policy

# A string for each environment and a letter for each step: . acts, E acts and ends the episode,
# d is the dummy step after it
ROLLOUT = [".....E", "...Ed.", "d...Ed", "EdEd.E", "....Ed"]
GRID = np.array([list(column) for column in ROLLOUT]).T  # (T, N)
INDEX = np.cumsum(GRID != "d").reshape(GRID.shape) - 1  # where a step is in the flat batch
SPANS = [(n, m.span()) for n, column in enumerate(ROLLOUT) for m in re.finditer("[^d]+", column)]
EPISODES = [INDEX[slice(*span), n].tolist() for n, span in SPANS]
B, GAMMA, LAMBDA = 24, 0.9, 0.8
FIRST_ORDER = {
    "vanilla_pg": (vanilla_pg, {}),
    "step": (is_pg, {"weighting": "step"}),
    "trajectory": (is_pg, {"weighting": "trajectory"}),
    "per-decision": (is_pg, {"weighting": "per-decision"}),
    "ppo": (ppo, {}),
}


NVEC = [3, 2]
SPACES = {
    "discrete": Discrete(3),
    "multi-discrete": MultiDiscrete(NVEC),
    "multi-binary": MultiBinary(2),
    "box": Box(-1, 1, (2,)),
}
pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.fixture(params=SPACES)
def case(request):
    return make(SPACES[request.param])


def close(actual, expected, rtol=1e-8):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-11)


def discounted_sum(terms):
    return sum((GAMMA * LAMBDA) ** i * term for i, term in enumerate(terms))


@torch.no_grad()
def move(policy, scale):
    for parameter in policy.parameters():
        parameter += scale * torch.randn_like(parameter)


@torch.no_grad()
def make(space):
    """A policy that has left its first weights, and a rollout that it acted in."""
    torch.manual_seed(0)
    obs, normalizer = 1 + 3 * torch.randn(B, 3), Normalizer((3,))
    normalizer.update(obs)
    policy = Policy(normalizer, space, hidden_size=4)
    move(policy, 0.5)
    old_dist, delta, advantages = policy(obs), torch.randn(B), torch.zeros(B)
    for episode in EPISODES:
        for k, t in enumerate(episode):
            advantages[t] = discounted_sum(delta[episode[k:]])
    batch = make_batch(
        is_pg,
        old_dist,
        obs=obs,
        actions=old_dist.sample(),
        advantages=advantages,
        returns=torch.randn(B),
        values=torch.randn(B),
        valid=torch.from_numpy(GRID != "d"),
        done=torch.from_numpy(GRID == "E"),
    )
    old_policy = copy.deepcopy(policy)
    return SimpleNamespace(policy=policy, old_policy=old_policy, batch=batch, delta=delta)


def update(case, name, lr=0.0, **options):
    """Run the script's own update. Returns its steps, each (gradient, weights), and its metrics."""
    script, chosen = FIRST_ORDER[name]
    shared = dict(gamma=GAMMA, gae_lambda=LAMBDA, max_grad_norm=math.inf, policy_epochs=1)
    optimizer = Recorder(case.policy, lr)
    args = script.Args(**{**shared, **chosen, **options})
    metrics = script.update_policy(case.policy, optimizer, case.batch, args)
    return list(zip(optimizer.gradients, optimizer.weights)), metrics


def trust_region_update(case, **options):
    """Returns the weights before and after, and the metrics."""
    args = trpo.Args(**{"cg_iters": 200, "cg_tolerance": 1e-13, **options})
    before = parameters_to_vector(case.policy.parameters()).detach()
    metrics = trpo.update_policy(case.policy, case.batch, args)
    return before, parameters_to_vector(case.policy.parameters()).detach(), metrics


# Other means: log π by the textbook from the network's outputs, expectations by exact sums


def log_tables(policy, obs):
    """log π of each value of each component of a discrete action, a list of (B, values)."""
    outputs = policy.outputs(obs)
    if isinstance(policy.head, BernoulliHead):
        tables = [torch.stack([0 * x, x], 1) for x in outputs.unbind(1)]  # e^x to 1
    elif outputs.dim() == 3:
        tables = [outputs[:, i, :n] for i, n in enumerate(NVEC)]
    else:
        tables = [outputs]
    return [x - x.exp().sum(1, keepdim=True).log() for x in tables]


def log_prob(policy, obs, actions):
    if not hasattr(policy.head, "log_std"):
        columns = actions.long().reshape(len(obs), -1).split(1, 1)
        return sum(x.gather(1, a)[:, 0] for x, a in zip(log_tables(policy, obs), columns))
    std = policy.head.log_std.exp()
    z = (actions - policy.outputs(obs)) / std
    return (-(z**2) / 2 - (std * math.sqrt(2 * math.pi)).log()).sum(1)


def nodes(policy, obs):
    """Pairs of actions and weights w with Σ w f(a) = E[f(a)]; to degree 5 for normals (Gauss)."""
    if not hasattr(policy.head, "log_std"):
        values = [range(x.shape[1]) for x in log_tables(policy, obs)]
        joint = [torch.tensor(a).expand(len(obs), -1) for a in itertools.product(*values)]
        joint = [a if len(values) > 1 else a[:, 0] for a in joint]
        return [(a, log_prob(policy, obs, a).exp()) for a in joint]
    points, weights = np.polynomial.hermite_e.hermegauss(3)
    grid = torch.tensor(list(itertools.product(points, repeat=2)))  # (9, 2)
    weights, std = np.outer(weights, weights).flatten(), policy.head.log_std.exp()
    weights = torch.tensor(weights / weights.sum()).expand(len(obs), -1).T
    return [(policy.outputs(obs) + std * z, w) for z, w in zip(grid, weights)]


class KL(nn.Module):
    """E[KL(old ‖ new)] over the states, (B, …), by the sum over the actions."""

    def __init__(self, old, new):
        super().__init__()
        self.old, self.new = [old], new  # a list: only the new policy's parameters are the module's

    def forward(self, obs):
        pairs, (old,) = nodes(self.old[0], obs), self.old
        terms = [w * (log_prob(old, obs, a) - log_prob(self.new, obs, a)) for a, w in pairs]
        return sum(terms).mean()


@torch.no_grad()
def mean_kl(old, new, obs):
    return KL(old, new)(obs).item()


def gradient_of(output, policy):
    gradients = torch.autograd.grad(output, list(policy.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def scores(policy, obs, actions):
    """∇log π(a|s), one sample after the other, (B, P)."""
    pairs = zip(obs.split(1), actions.split(1))
    return torch.stack([gradient_of(log_prob(policy, *pair).sum(), policy) for pair in pairs])


def policy_gradient(case, weighted):
    """E[ weighted · ∇log π ]"""
    return weighted @ scores(case.policy, *case.batch[:2]) / len(weighted)


def fisher(policy, obs):
    """E[ ∇log π ∇log πᵀ ] over states and actions: the covariance of the score, whose mean is 0."""
    terms = [(w.detach(), scores(policy, obs, a.detach())) for a, w in nodes(policy, obs)]
    return sum((score.T * w) @ score for w, score in terms) / len(obs)


@torch.no_grad()
def ratios(case):
    obs, actions = case.batch[:2]
    return (log_prob(case.policy, obs, actions) - log_prob(case.old_policy, obs, actions)).exp()


def weigh(case, weighting, cap):
    """Weights and weighted advantages by their definitions, an episode at a time."""
    ratio, weights, weighted = ratios(case), torch.zeros(B), torch.zeros(B)
    for episode in EPISODES:
        for k, t in enumerate(episode):
            weight = ratio[t] if weighting == "step" else math.prod(ratio[episode[: k + 1]])
            weights[t] = min(weight, cap)
            weighted[t] = weights[t] * case.batch.advantages[t]
        for k, t in enumerate(episode if weighting == "per-decision" else []):
            weighted[t] = discounted_sum(weights[episode[k:]] * case.delta[episode[k:]])
    return weights, weighted


def set_ratio(case, ratio):
    """Have the old policy say what makes π/π_old this."""
    log_probs = log_prob(case.policy, *case.batch[:2]).detach() - torch.tensor(ratio).log()
    case.batch = case.batch._replace(old_log_probs=log_probs)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_first_gradient_is_the_policy_gradient(case, name):
    [(gradient, _)], _ = update(case, name)
    close(gradient, policy_gradient(case, case.batch.advantages))


@pytest.mark.parametrize("cap", [math.inf, 1.1])
@pytest.mark.parametrize("weighting", ["step", "trajectory", "per-decision"])
def test_later_gradient_has_importance_weights(case, weighting, cap):
    move(case.policy, 0.2)
    weights, weighted = weigh(case, weighting, cap)
    assert weights.min() < 1
    assert weights.max() > 1.1 if cap == math.inf else (weights == cap).any()
    [(gradient, _)], metrics = update(case, weighting, weight_cap=cap)
    close(gradient, policy_gradient(case, weighted))
    close(metrics["weight_ess"], weights.sum() ** 2 / (B * (weights**2).sum()))


def test_later_gradient_of_vanilla_pg_has_none(case):
    ((_, weights), (gradient, _)), _ = update(case, "vanilla_pg", lr=0.3, policy_epochs=2)
    vector_to_parameters(weights, case.policy.parameters())
    close(gradient, policy_gradient(case, case.batch.advantages))


def test_per_decision_gradient_is_unbiased():
    """Over all paths of a two-step problem, each as frequent as π_old makes it, it is ∇J(θ)."""
    case, paths = make(Discrete(3)), torch.tensor(list(itertools.product(range(3), repeat=2)))
    states, values, reward, last_reward = (torch.randn(n) for n in [(4, 3), (4,), (3,), (9,)])
    visited = torch.stack([torch.zeros(9, dtype=torch.int64), 1 + paths[:, 0]])  # (T, 9)
    obs, actions, reward = states[visited.flatten()], paths.T.flatten(), reward[paths[:, 0]]

    def probability(policy):
        return log_prob(policy, obs, actions).reshape(2, 9).sum(0).exp()

    last = last_reward - values[visited[1]]
    first = reward + values[visited[1]] - values[visited[0]]
    advantages = torch.stack([first + last, last]) * probability(case.old_policy).detach()
    done = torch.tensor([[False], [True]]).expand(2, 9)
    with torch.no_grad():
        old_dist = case.old_policy(obs)
    fields = dict(obs=obs, actions=actions, advantages=advantages.flatten())
    case.batch = make_batch(is_pg, old_dist, **fields, valid=done | True, done=done)
    move(case.policy, 0.5)
    [(gradient, _)], _ = update(case, "per-decision", gamma=1.0, gae_lambda=1.0)
    expected_return = (probability(case.policy) * (reward + last_reward)).sum()
    close(18 * gradient, gradient_of(expected_return, case.policy))  # a sum, not a mean of 18


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_entropy_bonus(case, name):
    move(case.policy, 0.2)
    [(plain, _)], _ = update(case, name)
    [(gradient, _)], _ = update(case, name, entropy_coef=0.3)
    policy, obs = case.policy, case.batch.obs
    entropy = -sum(w * log_prob(policy, obs, a) for a, w in nodes(policy, obs)).mean()
    close(gradient - plain, 0.3 * gradient_of(entropy, policy))


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_long_gradients_are_scaled_down(case, name):
    expected = policy_gradient(case, case.batch.advantages)
    for factor in (0.25, 4):
        [(gradient, _)], _ = update(case, name, max_grad_norm=factor * expected.norm().item())
        close(gradient, min(factor, 1) * expected, rtol=1e-4)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0])
def test_ppo_is_flat_only_past_the_bound_that_the_advantage_pulls_to(case, ratio, advantage):
    obs, actions = case.batch.obs[:1], case.batch.actions[:1]
    fields = dict(obs=obs, actions=actions, advantages=torch.tensor([advantage]))
    case.batch = make_batch(is_pg, case.batch.old_dist, **fields)
    set_ratio(case, [ratio])
    [(gradient, _)], _ = update(case, "ppo", clip_eps=0.2)
    flat = ratio > 1.2 if advantage > 0 else ratio < 0.8
    close(gradient, (0 if flat else ratio * advantage) * scores(case.policy, obs, actions)[0])


@pytest.mark.parametrize("minibatch_size", [B, B // 4])
def test_ppo_minibatches(case, minibatch_size):
    set_ratio(case, [0.79, 0.81, 0.9, 1.0, 1.1, 1.19, 1.21, 3.0] * 3)  # 3 in 8 out of bounds
    [(whole, _)], _ = update(case, "ppo", clip_eps=0.2)
    case.batch = case.batch._replace(fewest=B)
    options = dict(policy_epochs=3, minibatch_size=minibatch_size)
    steps, metrics = update(case, "ppo", clip_eps=0.2, **options)
    assert metrics["clip_fraction"].item() == pytest.approx(3 / 8)
    epochs = torch.stack([gradient for gradient, _ in steps]).reshape(3, B // minibatch_size, -1)
    close(epochs.mean(1), whole.expand(3, -1))  # each epoch takes each transition once
    if minibatch_size < B:  # in an order of its own
        assert (epochs[0] - epochs[1]).norm() > 0.01


def test_ppo_without_a_clip_is_is_pg(case):
    options = dict(lr=0.1, policy_epochs=6)
    steps, _ = update(case, "step", **options)
    case.policy = case.old_policy
    others, _ = update(case, "ppo", clip_eps=math.inf, **options)
    assert len(steps) == len(others) == 6
    assert (steps[5][0] - steps[0][0]).norm() > 0.01
    close(others[5][1], steps[5][1])


def test_ppo_ends_at_the_target_kl(case):
    """No further epoch once KL(π_old ‖ π) of the whole batch is above the target."""
    case.batch = case.batch._replace(fewest=B)
    options = dict(lr=0.1, policy_epochs=3, minibatch_size=B // 3)
    torch.manual_seed(1)
    steps, _ = update(case, "ppo", **options)
    kls, targets = [], []
    for _, weights in steps:
        vector_to_parameters(weights, case.policy.parameters())
        kls.append(mean_kl(case.old_policy, case.policy, case.batch.obs))
        targets.append((kls[-1] + mean_kl(case.policy, case.old_policy, case.batch.obs)) / 2)
    for target in (kls[0] / 1000, *targets):
        case.policy = copy.deepcopy(case.old_policy)
        torch.manual_seed(1)
        taken, _ = update(case, "ppo", target_kl=target, **options)
        assert len(taken) == next((k for k in (3, 6) if kls[k - 1] > target), 9)


def test_ratio_is_1_and_kl_is_0_at_first(case, monkeypatch):
    weigh, log_ratios, kls = is_pg.weighted_advantages, [], []
    spy = lambda *args: log_ratios.append(args[0]) or weigh(*args)  # noqa: E731
    monkeypatch.setattr(is_pg, "weighted_advantages", spy)
    update(case, "step")
    assert (log_ratios[0] == 0).all()
    _, metrics = update(case, "ppo", clip_eps=1e-12, target_kl=5e-324)  # no step if the KL is more
    assert metrics["clip_fraction"] == 0
    spy = lambda *dists: kls.append(kl_divergence(*dists)) or kls[-1]  # noqa: E731
    monkeypatch.setattr(trpo, "kl_divergence", spy)
    trust_region_update(case)
    assert (kls[0] == 0).all()


def test_conjugate_gradient():
    """After k products x minimises ½ xᵀAx − bᵀx over the span of b, Ab, …, A^{k-1}b."""
    torch.manual_seed(0)
    root, b, given = torch.randn(20, 20), torch.randn(20), []
    matrix = root @ root.T + torch.eye(20)

    def solve(iters, tolerance):
        given.clear()
        matvec = lambda v: given.append(v) or matrix @ v  # noqa: E731
        x, residual = trpo.conjugate_gradient(matvec, b, iters, tolerance)
        assert residual == pytest.approx(((b - matrix @ x).norm() / b.norm()).item(), rel=1e-3)
        return x, residual, len(given)

    x, _, products = solve(4, 0.0)
    assert products == 4
    powers = [torch.linalg.matrix_power(matrix, i) @ b for i in range(4)]
    basis, _ = torch.linalg.qr(torch.stack(powers, 1))
    close(x, basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ b))
    _, residual, products = solve(200, 0.01)
    assert residual <= 0.01 < solve(products - 1, 0.0)[1]  # not one product too many
    close(solve(200, 1e-11)[0], torch.linalg.solve(matrix, b))


def test_conjugate_gradient_of_0():
    x, residual = trpo.conjugate_gradient(lambda v: v, torch.zeros(3), 10, 1e-5)
    assert (x == 0).all()
    assert residual == 0


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func says so
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_fisher_vector_product(case, damping, monkeypatch):
    """The Hessian of the KL at π_old is the covariance of the score."""
    seen, (policy, obs) = [], (case.policy, case.batch.obs)
    fake = lambda matvec, b, *_: seen.append(matvec) or (0 * b, 0.0)  # noqa: E731
    monkeypatch.setattr(trpo, "conjugate_gradient", fake)
    before, *_ = trust_region_update(case, cg_damping=damping)
    identity, kl = torch.eye(len(before)), KL(case.old_policy, copy.deepcopy(policy))

    def kl_at(weights):
        parts = weights.split([x.numel() for x in policy.parameters()])
        named = zip(kl.named_parameters(), parts)
        shaped = {name: part.reshape(x.shape) for (name, x), part in named}
        return torch.func.functional_call(kl, shaped, (obs,))

    products = torch.stack([seen[0](row) for row in identity]) - damping * identity
    close(products, torch.func.hessian(kl_at)(before))
    close(products, fisher(policy, obs))


@pytest.mark.parametrize(("max_kl", "damping"), [(0.01, 0.1), (1.0, 0.01), (1.0, 0.001)])
def test_trust_region_step(case, max_kl, damping):
    """s maximizes gᵀs on ½ sᵀ(F + damping I)s = δ; the longest fraction that will do is taken."""
    gradient = policy_gradient(case, case.batch.advantages)
    matrix = fisher(case.policy, case.batch.obs) + damping * torch.eye(len(gradient))
    full_step = torch.linalg.solve(matrix, gradient)
    full_step *= (2 * max_kl / (full_step @ matrix @ full_step)).sqrt()
    options = dict(max_kl=max_kl, cg_damping=damping, backtrack_coef=0.9)
    before, after, metrics = trust_region_update(case, **options)
    fractions = [0.9**i for i in range(10)]
    for fraction in fractions:
        vector_to_parameters(before + fraction * full_step, case.policy.parameters())
        gain = ((ratios(case) - 1) * case.batch.advantages).mean()
        if mean_kl(case.old_policy, case.policy, case.batch.obs) <= max_kl and gain > 0:
            break
    else:
        fraction = 0.0
    if damping != 0.01:  # with less damping the KL or the surrogate forbids the full step
        assert (fraction == 1) == (damping == 0.1)
    close(after, before + fraction * full_step)
    assert metrics["step_fraction"] == pytest.approx(fraction)
    assert metrics["line_search_failed"] == (fraction == 0)
    tries = fractions.index(fraction) + 1 if fraction else 10
    for iters in (tries, tries - 1):  # one try less, and it fails
        vector_to_parameters(before, case.policy.parameters())
        *_, metrics = trust_region_update(case, backtrack_iters=iters, **options)
        assert metrics["step_fraction"] == (pytest.approx(fraction) if iters == tries else 0)


def test_residual_of_the_trust_region_step(case):
    """x is s times gᵀs / sᵀMs, for the residual of conjugate gradient is orthogonal to x."""
    gradient = policy_gradient(case, case.batch.advantages)
    matrix = fisher(case.policy, case.batch.obs) + 0.1 * torch.eye(len(gradient))
    before, after, metrics = trust_region_update(case, cg_iters=3, cg_damping=0.1)
    step = after - before
    x = step * (gradient @ step) / (step @ matrix @ step)
    residual = ((gradient - matrix @ x).norm() / gradient.norm()).item()
    assert metrics["cg_residual"] == pytest.approx(residual)
    assert residual > 1e-4


TROUBLES = {
    "KL too large": ("kl_divergence", lambda *dists: kl_divergence(*dists) + 1),
    "surrogate falls": ("conjugate_gradient", lambda matvec, b, *_: (-b, 0.0)),
    "surrogate as before": ("average", lambda x, size: x if x.dim() else 0 * x),
    "negative curvature": ("kl_divergence", lambda *dists: -kl_divergence(*dists)),
    "no curvature": ("kl_divergence", lambda *dists: 0 * kl_divergence(*dists)),
    "no gradient": ("kl_divergence", kl_divergence),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_weights_are_left_as_they_were(case, trouble, monkeypatch):
    monkeypatch.setattr(trpo, *TROUBLES[trouble])
    if trouble == "no gradient":
        case.batch = case.batch._replace(advantages=torch.zeros(B))
    before, after, metrics = trust_region_update(case, cg_iters=10, cg_damping=0.0)
    assert torch.equal(before, after)
    searched = trouble in ("KL too large", "surrogate falls", "surrogate as before")
    assert (metrics["line_search_failed"], metrics["step_fraction"]) == (searched, 0)
