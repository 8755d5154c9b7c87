"""What docs/language_models.md says, to 1e-10: sums over all sequences, by other formulas."""

import contextlib
import io
import itertools
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from recording import Recorder, make_batch
from scipy.stats import binom
from torch.func import grad

import is_pg
import ppo
import vanilla_pg
from tools import exact
from tools import language_models as lm

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "language_models.md"
PROBLEM = lm.Problem(0)
PROMPTS = [0, 1]
pytestmark = pytest.mark.usefixtures("double_precision")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def angle(x, y):
    return lm.length_and_angle(x, y)[1].item()


def moved(prompt, distance=2.0):
    return PROBLEM.moved(distance)[prompt]


# Expectations by a walk in plain Python


def walk(table, before=()):
    """Each sequence as pairs of prefix and token, and how likely a policy is to write it."""
    if len(before) == 4:
        yield (), 1.0
        return
    probs = table[lm.PREFIXES.index(before)].softmax(0).tolist()
    for a in range(3):
        rest = [((), 1.0)] if a == lm.END else walk(table, (*before, a))
        for pairs, chance in rest:
            yield ((before, a), *pairs), probs[a] * chance


def padded(pairs):
    tokens = [a for _, a in pairs]
    return tokens + [lm.END] * (4 - len(tokens))


def reward(prompt, pairs):
    return PROBLEM.rewards[prompt][PROBLEM.tokens.tolist().index(padded(pairs))].item()


def chosen(table, pairs):
    """π(a|prefix) of each token, (T,)."""
    return torch.stack([table.softmax(1)[lm.PREFIXES.index(before), a] for before, a in pairs])


def scores(table, pairs):
    """∇log π of each token, (T, P): in the row of its prefix 1 − π at the token, −π elsewhere."""
    rows = torch.zeros(len(pairs), *table.shape)
    for t, (before, a) in enumerate(pairs):
        state = lm.PREFIXES.index(before)
        rows[t, state] = -table[state].softmax(0)
        rows[t, state, a] += 1
    return rows.flatten(1)


def ratios(prompt, table, pairs):
    return chosen(table, pairs) / chosen(PROBLEM.old[prompt], pairs)


def weighted_sum(prompt, table, weigh):
    """E_φ[ Σ_t w_t ∇log π_t ], where weigh(ratios, advantage) gives w_1, w_2, …

    The advantage is R − E_φ[R].
    """
    baseline = PROBLEM.chances(PROBLEM.old[prompt]) @ PROBLEM.rewards[prompt]
    total = 0
    for pairs, chance in walk(PROBLEM.old[prompt]):
        weights = weigh(ratios(prompt, table, pairs), reward(prompt, pairs) - baseline)
        total = total + chance * weights @ scores(table, pairs)
    return total


def expected_reward(prompt, table):
    return PROBLEM.chances(table) @ PROBLEM.rewards[prompt]


def true_gradient(prompt, table):
    return grad(partial(expected_reward, prompt))(table).flatten()


def mean_of(objective, prompt, table, advantage=lm.leave_one_out, size=3):
    """What a group says on average, by the tool, (P,)."""
    logits = PROBLEM.old.clone()
    logits[prompt] = table
    each = lm.gradients(PROBLEM, prompt, logits, objective)
    chances = PROBLEM.chances(PROBLEM.old[prompt])
    return lm.group_moments(each, PROBLEM.rewards[prompt], chances, advantage, size)[0]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_all_sequences_are_there(prompt):
    """31: 1, 2 and 4 that end after one, two and three tokens, and 8 · 3 of four."""
    table = moved(prompt)
    walked = {tuple(padded(pairs)): (len(pairs), chance) for pairs, chance in walk(table)}
    assert len(walked) == len(PROBLEM.tokens) == 1 + 2 + 4 + 24
    assert sum(chance for _, chance in walked.values()) == pytest.approx(1)
    for tokens, length, chance in zip(PROBLEM.tokens, PROBLEM.lengths, PROBLEM.chances(table)):
        assert walked[tuple(tokens.tolist())] == pytest.approx((length.item(), chance.item()))
    strings = itertools.product(range(3), repeat=4)
    kept = {s if lm.END not in s else s[: s.index(lm.END)] for s in strings}
    assert len(kept) == 31  # of the 81 strings, up to the first end token


# 1. Advantages


def advantages_by_definition(name, rewards):
    """rewards: (groups, G)."""
    size = rewards.shape[1]
    if name == "leave one out":
        others = [np.delete(rewards, i, axis=1).mean(1) for i in range(size)]
        return rewards - np.stack(others, axis=1)
    away = rewards - rewards.mean(1, keepdims=True)
    if name == "centered":
        return away
    deviation = rewards.std(1, ddof=1, keepdims=True)
    return np.divide(away, deviation, out=np.zeros_like(away), where=deviation > 0)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("name", "advantage"),
    [
        ("leave one out", lm.leave_one_out),
        ("centered", lm.centered),
        ("standardized", lm.standardized),
    ],
)
def test_what_a_group_says_by_enumeration(name, advantage, size):
    """All 961 pairs, or 29,791 triples, of sequences of φ, with the ratio of the token."""
    table, walked = moved(0), list(walk(PROBLEM.old[0]))
    each = torch.stack([ratios(0, table, pairs) @ scores(table, pairs) for pairs, _ in walked])
    groups = np.array(list(itertools.product(range(31), repeat=size)))
    chances = torch.tensor([chance for _, chance in walked])[groups].prod(1)
    rewards = np.array([reward(0, pairs) for pairs, _ in walked])[groups]
    weights = torch.from_numpy(advantages_by_definition(name, rewards))
    estimates = torch.einsum("ng,ngp->np", weights, each[groups]) / size
    mean = chances @ estimates
    variance = chances @ (estimates - mean).square().sum(1)
    logits = PROBLEM.moved(2.0)
    by_tool = lm.gradients(PROBLEM, 0, logits, lm.token)
    old_chances = PROBLEM.chances(PROBLEM.old[0])
    found = lm.group_moments(by_tool, PROBLEM.rewards[0], old_chances, advantage, size)
    close(found[0], mean)
    close(found[1], variance)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("size", [2, 8])
def test_baselines_of_a_group(size, prompt):
    """Without itself: ∇J. With itself: (G − 1)/G times that. Neither changes the direction."""
    old = PROBLEM.old[prompt]
    gradient = true_gradient(prompt, old)
    close(mean_of(lm.token, prompt, old, lm.not_centered, size), gradient)
    close(mean_of(lm.token, prompt, old, lm.leave_one_out, size), gradient)
    close(mean_of(lm.token, prompt, old, lm.centered, size), gradient * (size - 1) / size)
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 3.0, -1.0, 0.0]])
    close(lm.centered(rewards), lm.leave_one_out(rewards) * 3 / 4)


def scale_of_the_deviation(p, size):
    """E[ √((G−1)/G · k/G (1−k/G)) ] / (p (1−p)) over k, how many of G are right."""
    k = np.arange(size + 1)
    root = np.sqrt((size - 1) / size * k / size * (1 - k / size))
    return binom.pmf(k, size, p) @ root / (p * (1 - p))


@pytest.mark.parametrize("size", [2, 8])
def test_dividing_by_the_deviation(size):
    """It stretches the gradient of a prompt, the more the rarer right or wrong answers are."""
    scales = []
    for prompt in PROMPTS:
        old = PROBLEM.old[prompt]
        scales.append(scale_of_the_deviation(expected_reward(prompt, old).item(), size))
        mean = mean_of(lm.token, prompt, old, lm.standardized, size)
        close(mean, true_gradient(prompt, old) * scales[-1])
    if size == 2:  # where each pair that differs has the same deviation
        assert scales == pytest.approx([0.5**0.5, 0.5**0.5])
    else:
        mean, _ = lm.estimate(PROBLEM, PROBLEM.old, lm.token, lm.standardized, size)
        assert scales[0] > 1.1 * scales[1]  # the hard prompt counts for more
        assert angle(mean, PROBLEM.gradient(PROBLEM.old).flatten()) > 1


@pytest.mark.parametrize("p", [0.1, 0.5, 0.79])
def test_large_groups_maximize_an_arcsine(p):
    """∇p / √(p (1−p)) is the gradient of 2 arcsin √p."""
    slope = grad(lambda x: 2 * x.sqrt().arcsin())(torch.tensor(p)).item()
    assert slope == pytest.approx((p * (1 - p)) ** -0.5)
    assert scale_of_the_deviation(p, 100_000) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_dividing_by_the_length(prompt):
    """It maximizes (R − E[R]) / length: short right answers, and long wrong ones."""
    old, lengths = PROBLEM.old[prompt], PROBLEM.lengths
    paid = (PROBLEM.rewards[prompt] - expected_reward(prompt, old)) / lengths
    of_pay = grad(lambda table: PROBLEM.chances(table) @ paid)(old).flatten()
    divided = mean_of(lm.per_token(lm.token), prompt, old)
    close(divided, of_pay)
    gradient = true_gradient(prompt, old)
    assert angle(divided, gradient) > 5


def test_dividing_by_all_tokens_of_the_group():
    """1 / Σ|o_i|, as in DAPO: by enumeration of all pairs. A bias, too."""
    old, walked = PROBLEM.old[0], list(walk(PROBLEM.old[0]))
    mean = 0
    for (first, p), (second, q) in itertools.product(walked, repeat=2):
        advantage = reward(0, first) - reward(0, second)
        difference = scores(old, first).sum(0) - scores(old, second).sum(0)
        mean = mean + p * q * advantage * difference / (len(first) + len(second))
    assert angle(mean, true_gradient(0, old)) > 5


# 2. One step per batch


def batch_of(script, prompt, table, advantages=None):
    """All sequences once, as a batch of one of the scripts, (T, N) grids flattened; φ has acted."""
    if advantages is None:
        advantages = PROBLEM.rewards[prompt] - 0.3
    mask = PROBLEM.mask.T
    lengths = PROBLEM.lengths
    obs, actions = PROBLEM.prefixes.T[mask], PROBLEM.tokens.T[mask]
    with torch.no_grad():
        old_dist = exact.Tabular(PROBLEM.old[prompt])(obs)
    return exact.Tabular(table), make_batch(
        script,
        old_dist,
        obs=obs,
        actions=actions,
        advantages=advantages.expand(4, -1)[mask],
        returns=torch.zeros(len(obs)),  # the policy has no need of them
        valid=mask,
        done=torch.arange(4)[:, None] == lengths - 1,
    )


def gradient_of_script(script, policy, batch, **options):
    """The gradient that the script's own update takes, (P,)."""
    recorder = Recorder(policy)
    args = script.Args(policy_epochs=1, max_grad_norm=float("inf"), **options)
    script.update_policy(policy, recorder, batch, args)
    (gradient,) = recorder.gradients
    return gradient


def gradient_per_token(objective, prompt, table):
    """∇ of an objective, summed over all sequences, by the number of their tokens."""
    old_log_probs = PROBLEM.log_probs(PROBLEM.old[prompt])
    advantages = (PROBLEM.rewards[prompt] - 0.3)[:, None]

    def mean(x):
        each = objective(PROBLEM.log_probs(x), old_log_probs, PROBLEM.mask, advantages)
        return each.sum() / PROBLEM.mask.sum()

    return grad(mean)(table).flatten()


def ratio_of_one(log_probs, old_log_probs, mask, advantages):
    """As in GRPO's code, where a batch is good for one step."""
    per_token_loss = -torch.exp(log_probs - log_probs.detach()) * advantages
    return -(per_token_loss * mask).sum(1)


@pytest.mark.parametrize("distance", [0.0, 2.0])
def test_a_ratio_of_one_is_vanilla_pg(distance):
    table = moved(0, distance)
    x = PROBLEM.log_probs(table).requires_grad_()
    ratio = torch.exp(x - x.detach())
    assert (ratio == 1).all()
    (slope,) = torch.autograd.grad(ratio.sum(), x)
    assert (slope == 1).all()  # and of x itself it is 1 as well
    advantages = lm.standardized(torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0]))
    close((torch.ones(5) * advantages).sum(), torch.tensor(0.0))  # the loss of a group is 0
    of_one = gradient_per_token(ratio_of_one, 0, table)
    close(of_one, gradient_of_script(vanilla_pg, *batch_of(vanilla_pg, 0, table)))
    of_ppo = gradient_of_script(ppo, *batch_of(ppo, 0, table), minibatch_size=1000)
    assert ((of_one - of_ppo).norm() < 1e-10) == (distance == 0)


# 3. Which ratio


@pytest.mark.parametrize("prompt", PROMPTS)
def test_which_ratio_is_an_importance_weight(prompt):
    """E_φ[ w f ] = E_θ[ f ] for any f of the sequence: for the product of all alone."""
    table, old = moved(prompt), PROBLEM.old[prompt]
    numbers = torch.from_numpy(np.random.default_rng(1).normal(size=31))
    f = dict(zip(map(tuple, PROBLEM.tokens.tolist()), numbers))

    def mean(policy, weigh):
        walked = list(walk(policy))
        return sum(c * weigh(ratios(prompt, table, p)) * f[tuple(padded(p))] for p, c in walked)

    exactly = mean(table, lambda ratio: 1.0)
    close(mean(old, lambda ratio: ratio.prod()), exactly)
    for weigh in (
        lambda ratio: 1.0,
        lambda ratio: ratio[-1],
        lambda ratio: ratio.prod() ** (1 / len(ratio)),
    ):
        assert abs(mean(old, weigh) - exactly) > 1e-3
    products = [(chance, ratios(prompt, table, p).prod(), len(p)) for p, chance in walk(old)]
    close(sum(chance * product for chance, product, _ in products), torch.tensor(1.0))
    geometric = sum(chance * product ** (1 / n) for chance, product, n in products)
    assert abs(geometric - 1) > 1e-3
    for state in range(15):  # given the prefix, the ratio of the token is one
        probs, old_probs = table[state].softmax(0), old[state].softmax(0)
        g = torch.randn(3)
        close(old_probs @ (probs / old_probs * g), probs @ g)


def visits(table):
    """How likely a policy is to come to each prefix, (15,)."""
    found = torch.zeros(15)
    for pairs, chance in walk(table):
        for before, _ in pairs:
            found[lm.PREFIXES.index(before)] += chance
    return found


def action_values(prompt, table):
    """E[ R | prefix, token ], (15, 3)."""
    total, weight = torch.zeros(15, 3), torch.zeros(15, 3)
    for pairs, chance in walk(table):
        for before, a in pairs:
            total[lm.PREFIXES.index(before), a] += chance * reward(prompt, pairs)
            weight[lm.PREFIXES.index(before), a] += chance
    return total / weight


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("distance", [0.0, 2.0])
def test_what_each_ratio_estimates(distance, prompt):
    """Σ d(prefix) Σ ∇π(token|prefix) Q(prefix, token), with d and Q of θ or of φ."""
    table, old = moved(prompt, distance), PROBLEM.old[prompt]

    def policy_gradient(d, q):
        return grad(lambda x: (d[:, None] * x.softmax(1) * q).sum())(table).flatten()

    q_old, q_new = action_values(prompt, old), action_values(prompt, table)
    gradient = true_gradient(prompt, table)
    close(mean_of(lm.token, prompt, table), policy_gradient(visits(old), q_old))
    close(mean_of(lm.prefix, prompt, table), policy_gradient(visits(table), q_old))
    close(mean_of(lm.sequence, prompt, table), policy_gradient(visits(table), q_new))
    close(mean_of(lm.sequence, prompt, table), gradient)
    for objective in (lm.without_ratio, lm.token, lm.prefix, lm.geometric_mean):
        bias = (mean_of(objective, prompt, table) - gradient).norm()
        assert (bias < 1e-10) == (distance == 0)


@pytest.mark.parametrize(
    ("objective", "weigh"),
    [
        (lm.without_ratio, lambda ratio, a: a * torch.ones_like(ratio)),
        (lm.token, lambda ratio, a: a * ratio),
        (lm.prefix, lambda ratio, a: a * ratio.cumprod(0)),
        (lm.sequence, lambda ratio, a: a * ratio.prod().expand_as(ratio)),
        (lm.geometric_mean, lambda ratio, a: a * ratio.log().mean().exp().expand_as(ratio)),
        (lm.clipped, lambda ratio, a: a * ratio * ~((ratio > 1.2) if a > 0 else (ratio < 0.8))),
        (
            partial(lm.clipped, high=0.28),
            lambda ratio, a: a * ratio * ~((ratio > 1.28) if a > 0 else (ratio < 0.8)),
        ),
        (partial(lm.capped, cap=1.2), lambda ratio, a: a * ratio.clamp(max=1.2)),
        (lm.recomputed, lambda ratio, a: a * torch.ones_like(ratio)),
        (lm.decoupled, lambda ratio, a: a * ratio),
        (partial(lm.decoupled, limit="capped"), lambda ratio, a: a * ratio.clamp(max=2)),
        (
            partial(lm.decoupled, limit="dropped"),
            lambda ratio, a: a * torch.where(ratio > 2, 0, ratio),
        ),
        (
            partial(lm.decoupled, whole=True, limit="capped"),
            lambda ratio, a: a * ratio.prod().clamp(max=2).expand_as(ratio),
        ),
    ],
)
def test_the_weights_of_each_objective(objective, weigh):
    """E_φ[ Σ_t w_t (R − E_φ[R]) ∇log π_t ], with the w_t of each."""
    for prompt in PROMPTS:
        table = moved(prompt, 4.0)
        close(mean_of(objective, prompt, table), weighted_sum(prompt, table, weigh))


def test_the_ratios_are_weightings_of_is_pg():
    """With the reward at the end, no discount and λ = 1, per-decision is the whole sequence."""
    table, rewards = moved(0), PROBLEM.rewards[0]
    _, batch = batch_of(is_pg, 0, table, rewards)
    log_ratio = PROBLEM.log_probs(table) - PROBLEM.log_probs(PROBLEM.old[0])
    at = PROBLEM.mask.T
    expected = {
        "step": log_ratio.exp(),
        "trajectory": log_ratio.cumsum(1).exp(),
        "per-decision": log_ratio.sum(1, keepdim=True).exp().expand(-1, 4),
    }
    for weighting, weights in expected.items():
        args = is_pg.Args(weighting=weighting, gamma=1.0, gae_lambda=1.0)
        _, weighted = is_pg.weighted_advantages(log_ratio.T[at], batch, args)
        close(weighted, (weights * rewards[:, None]).T[at])


def test_gspo():
    """∇J of its paper's equation 10, by its objective; at φ it is that of GRPO."""
    for prompt, distance in itertools.product(PROMPTS, (0.0, 2.0)):
        table = moved(prompt, distance)
        mean = mean_of(lm.per_token(lm.geometric_mean), prompt, table)

        def weigh(ratio, a):
            return (a * ratio.log().mean().exp() / len(ratio)).expand_as(ratio)

        close(mean, weighted_sum(prompt, table, weigh))
        of_grpo = mean_of(lm.per_token(lm.token), prompt, table)
        assert ((mean - of_grpo).norm() < 1e-10) == (distance == 0)


# 4. Clip or cap


@pytest.mark.parametrize("cap", [1.2, 2.0])
def test_cispo_is_is_pg_with_a_cap(cap):
    """1 / Σ|o_i| Σ sg(min(r, 1 + ε)) A log π (MiniMax-M1, eq. 4, with no lower bound)."""
    table = moved(0, 4.0)
    x = table.clone().requires_grad_()
    log_probs = PROBLEM.log_probs(x)
    weights = (log_probs - PROBLEM.log_probs(PROBLEM.old[0])).exp().clamp(max=cap).detach()
    advantages = (PROBLEM.rewards[0] - 0.3)[:, None]
    cispo = (weights * advantages * log_probs * PROBLEM.mask).sum() / PROBLEM.mask.sum()
    (expected,) = torch.autograd.grad(cispo, x)
    policy, batch = batch_of(is_pg, 0, table)
    close(gradient_of_script(is_pg, policy, batch, weight_cap=cap), expected.flatten())
    close(gradient_per_token(partial(lm.capped, cap=cap), 0, table), expected.flatten())
    assert (weights == cap).any()
    log_ratio = (log_probs - PROBLEM.log_probs(PROBLEM.old[0])).T[PROBLEM.mask.T].detach()
    of_is_pg, _ = is_pg.weighted_advantages(log_ratio, batch, is_pg.Args(weight_cap=cap))
    close(of_is_pg, weights.T[PROBLEM.mask.T])


def test_clipping_is_ppo():
    table = moved(0, 4.0)
    policy, batch = batch_of(ppo, 0, table)
    close(
        gradient_of_script(ppo, policy, batch, clip_eps=0.2, minibatch_size=1000),
        gradient_per_token(lm.clipped, 0, table),
    )


def test_a_clip_silences_tokens_and_a_cap_does_not():
    logits = PROBLEM.moved(2.0)
    count = total = 0
    for pairs, chance in walk(PROBLEM.old[0]):
        ratio = ratios(0, logits[0], pairs)
        silent = ratio > 1.2 if reward(0, pairs) else ratio < 0.8
        count, total = count + chance * silent.sum(), total + chance * len(pairs)
    without, tokens = lm.silent(PROBLEM, logits, lm.clipped, 0)
    assert without.item() == pytest.approx(count.item(), abs=1e-10)
    assert tokens.item() == pytest.approx(total, abs=1e-10)
    assert count > 0
    assert lm.silent(PROBLEM, logits, partial(lm.capped, cap=1.2), 0)[0] == 0
    assert lm.silent(PROBLEM, PROBLEM.old, lm.clipped, 0)[0] == 0


# 5. Two old policies: φ has sampled, and the clip is around another one


def around(middle, weights):
    """Decoupled PPO with its ratio around a policy, and weights for who has sampled."""

    def objective(log_probs, old_log_probs, mask, advantages):
        each = weights(middle - old_log_probs)
        return lm.clipped(log_probs, middle, mask, advantages * each, 0.5, 1.0)

    return objective


def test_two_old_policies():
    """π_prox/μ · π/π_prox is π/μ; where nothing is clipped, it is the ratio of the token."""
    prox, table = moved(0, 1.0), moved(0, 1.5)
    of_token = around(PROBLEM.log_probs(prox), torch.exp)
    mean = mean_of(of_token, 0, table)
    close(mean, mean_of(lm.token, 0, table))
    each = lm.gradients(PROBLEM, 0, torch.stack([table, table]), of_token)
    assert (each != 0).any(1).all()  # nothing is clipped: all ratios around π_prox are near 1
    # The weight of the whole sequence makes it a batch of π_prox
    of_sequence = around(PROBLEM.log_probs(prox), lambda x: x.sum(1, keepdim=True).exp())
    total = 0
    baseline = expected_reward(0, PROBLEM.old[0])
    for pairs, chance in walk(prox):
        ratio = chosen(table, pairs) / chosen(prox, pairs)
        total = total + chance * (reward(0, pairs) - baseline) * ratio @ scores(table, pairs)
    close(mean_of(of_sequence, 0, table), total)


def test_the_first_step_with_two_old_policies():
    """At π = π_prox: a clip around the sampler's policy has tokens silent before any step."""
    logits = PROBLEM.moved(2.0)
    for prompt in PROMPTS:
        gradient = true_gradient(prompt, logits[prompt])
        whole = partial(lm.decoupled, whole=True)
        close(mean_of(whole, prompt, logits[prompt]), gradient)
        mean = mean_of(lm.recomputed, prompt, logits[prompt])
        close(mean, mean_of(lm.without_ratio, prompt, logits[prompt]))
        assert lm.silent(PROBLEM, logits, lm.decoupled, prompt)[0] == 0
        assert lm.silent(PROBLEM, logits, lm.clipped, prompt)[0] > 0.05


# 6. The KL, by samples of θ


def kl_of(first, second):
    """KL of whole sequences, differentiable in both."""
    log_ratio = (PROBLEM.log_probs(first) - PROBLEM.log_probs(second)).sum(1)
    return PROBLEM.chances(first) @ log_ratio


def kl_within(d, first, second):
    """Σ d(prefix) KL of the next token."""
    p, q = first.softmax(1), second.softmax(1)
    return d @ (p * (p / q).log()).sum(1)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_estimators_of_the_kl(prompt):
    table, old = moved(prompt), PROBLEM.old[prompt]
    true = kl_of(table, old)
    x = (PROBLEM.log_probs(table) - PROBLEM.log_probs(old)).sum(1)
    chances = PROBLEM.chances(table)
    close(chances @ lm.k1(x), true)
    close(chances @ lm.k3(x), true)
    assert abs(chances @ lm.k2(x) - true) > 0.01 * true
    close(kl_within(visits(table), table, old), true)  # the chain rule
    assert (lm.k1(x) < 0).any()
    assert (lm.k3(x) >= 0).all()
    ratio = (-x).exp()  # Schulman's r = p/q, with samples of q
    close(lm.k3(x), (ratio - 1) - ratio.log())
    close(lm.k2(x), ratio.log() ** 2 / 2)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_estimators_of_the_kl_in_a_loss(prompt):
    """E_θ[∇k1] = 0, E_θ[∇k2] = ∇KL(θ ‖ φ), E_θ[∇k3] = ∇KL(φ ‖ θ)."""
    table, old = moved(prompt), PROBLEM.old[prompt]
    reverse = grad(lambda x: kl_of(x, old))(table).flatten()
    forward = grad(lambda x: kl_of(old, x))(table).flatten()
    in_loss = partial(lm.kl_gradient, PROBLEM, prompt, table)
    close(in_loss(lm.k1, lm.of_sequence), torch.zeros_like(reverse))
    close(in_loss(lm.k2, lm.of_sequence), reverse)
    close(in_loss(lm.k3, lm.of_sequence), forward)
    assert angle(forward, reverse) > 1
    # Token by token, the prefixes are as given, and so a part of ∇KL is missing
    d = visits(table)
    reverse_within = grad(lambda x: kl_within(d, x, old))(table).flatten()
    forward_within = grad(lambda x: kl_within(d, old, x))(table).flatten()
    close(in_loss(lm.k1, lm.of_tokens), torch.zeros_like(reverse))
    close(in_loss(lm.k2, lm.of_tokens), reverse_within)
    close(in_loss(lm.k3, lm.of_tokens), forward_within)
    assert angle(reverse_within, reverse) > 0.5


@pytest.mark.parametrize("prompt", PROMPTS)
def test_with_the_ratio_the_kl_has_its_gradient(prompt):
    """∇ of e^{x − sg(x)} k is ∇k + k ∇log π, and k1 or k3 have the KL as their mean."""
    table, old = moved(prompt), PROBLEM.old[prompt]
    reverse = grad(lambda x: kl_of(x, old))(table).flatten()
    in_loss = partial(lm.kl_gradient, PROBLEM, prompt, table)
    close(in_loss(lm.k1, lm.of_sequence_with_ratio), reverse)
    close(in_loss(lm.k3, lm.of_sequence_with_ratio), reverse)
    assert (in_loss(lm.k2, lm.of_sequence_with_ratio) - reverse).norm() > 0.01 * reverse.norm()
    d = visits(table)
    within = grad(lambda x: kl_within(d, x, old))(table).flatten()
    close(in_loss(lm.k1, lm.of_tokens_with_ratio), within)
    close(in_loss(lm.k3, lm.of_tokens_with_ratio), within)
    # As a reward: k1 of the sequence times ∇log π
    total = 0
    for pairs, chance in walk(table):
        log_ratio = ratios(prompt, table, pairs).log().sum()
        total = total + chance * log_ratio * scores(table, pairs).sum(0)
    close(total, reverse)


# 7. The tool and the page


def test_comparison():
    """Bias, deviation, length, angle and silent tokens of one problem, put together by hand."""
    method = lm.clipped, lm.leave_one_out
    numbers = lm.compare(PROBLEM, 1.0, *method, 4)
    logits = PROBLEM.moved(1.0)
    close((logits - PROBLEM.old).norm(), torch.tensor(1.0))
    gradients = torch.cat([true_gradient(q, logits[q]) / 2 for q in PROMPTS])
    means = torch.cat([mean_of(lm.clipped, q, logits[q], size=4) / 2 for q in PROMPTS])
    variance = 0
    for q in PROMPTS:
        each, chances = (
            lm.gradients(PROBLEM, q, logits, lm.clipped),
            PROBLEM.chances(PROBLEM.old[q]),
        )
        group = each, PROBLEM.rewards[q], chances, lm.leave_one_out, 4
        variance += lm.group_moments(*group)[1] / 4
    unit = PROBLEM.gradient(PROBLEM.old).norm()
    cosine = means @ gradients / means.norm() / gradients.norm()
    counts = [lm.silent(PROBLEM, logits, lm.clipped, q) for q in PROMPTS]
    expected = [
        (means - gradients).norm() / unit,
        variance.sqrt() / unit,
        means.norm() / gradients.norm(),
        np.degrees(np.arccos(cosine.item())),
        sum(x for x, _ in counts) / sum(x for _, x in counts),
    ]
    assert numbers == pytest.approx([float(x) for x in expected], abs=1e-8)


def test_comparison_of_the_kl():
    """k2 of the hard prompt: mean and deviation in units of the KL, and the gradients."""
    table, old = moved(0), PROBLEM.old[0]
    x = (PROBLEM.log_probs(table) - PROBLEM.log_probs(old)).sum(1)
    chances, k = PROBLEM.chances(table), x**2 / 2
    unit = kl_of(table, old)
    deviation = (chances @ k**2 - (chances @ k) ** 2).sqrt()
    numbers = lm.compare_kl(PROBLEM, 2.0, *lm.KLS["k2"])
    assert numbers[:2] == pytest.approx([(chances @ k / unit).item(), (deviation / unit).item()])
    assert numbers[2:4] == pytest.approx([1, 0], abs=1e-5)  # degrees: arccos near 1
    assert numbers[4] > 1.01
    assert numbers[5] > 1
    each = [kl_of(moved(prompt), PROBLEM.old[prompt]).item() for prompt in PROMPTS]
    assert lm.mean_kl(PROBLEM, 2.0) == pytest.approx(sum(each) / 2)


def printed(args):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        lm.print_tables([lm.Problem(seed) for seed in range(args.problems)], args)
    return out.getvalue()


@pytest.mark.slow
def test_tables_of_the_document():
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.split(
        r"\n(?=\| (?:ratio|old policies|advantage|estimator) )", printed(lm.Args()).strip()
    )
    assert len(blocks) == 5
    assert blocks.pop(0).replace(":", " is") in page  # the KL
    for block in blocks:
        assert block in page, "python -m tools.language_models prints another table"


def test_figure(tmp_path, capsys):
    picture = tmp_path / "figure.png"
    lm.main(lm.Args(output=str(picture), problems=1, distances=(0.0, 1.0)))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "| sequence | 0.00 |" in capsys.readouterr().out


@pytest.mark.parametrize("options", [dict(problems=0), dict(group=1), dict(distances=())])
def test_what_there_is_nothing_to_say_of(options, capsys):
    with pytest.raises(SystemExit) as stop:
        lm.main(lm.Args(**options))
    assert stop.value.code == 2
    assert "--problems must be at least 1" in capsys.readouterr().err


def test_what_the_document_names_is_there():
    text = PAGE.read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*.py"))
    names = set(re.findall(r"`(test_\w+)`", text))
    assert len(names) > 12
    for name in names:
        assert f"def {name}(" in tests, name
    for target in re.findall(r"\]\(([\w/.]+)\)", text):
        assert (ROOT / "docs" / target).exists(), target
    assert "](why/language_models.png)" in text
