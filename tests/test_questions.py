"""What the ten questions of docs/why_the_ratio.md are answered with, if no other test says it."""

import csv
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from gymnasium.spaces import Discrete
from recording import Recorder, make_batch
from torch.distributions import Categorical, kl_divergence
from torch.func import hessian

import is_pg
import ppo
from common.networks import make_head
from tools import exact

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("double_precision")


def one_state(advantages, logits=(0.0, 0.0)):
    """A policy over two actions, and a batch in which a policy with equal chances took each."""
    policy = exact.Tabular(torch.tensor([logits]))
    obs = torch.zeros(2, dtype=int)
    old_dist = Categorical(torch.tensor([0.5, 0.5]).expand(2, 2))
    every = torch.ones(1, 2, dtype=torch.bool)
    batch = make_batch(
        ppo,
        old_dist,
        obs=obs,
        actions=torch.tensor([0, 1]),
        advantages=torch.tensor(advantages),
        returns=torch.zeros(2),  # the policy has no need of them
        valid=every,
        done=every,
    )
    return policy, batch


def climb(script, policy, batch, steps, lr):
    """Plain gradient ascent by the script's own update. Returns the gradients and the ratios."""
    recorder = Recorder(policy, lr)
    args = script.Args(policy_epochs=steps, max_grad_norm=float("inf"))
    script.update_policy(policy, recorder, batch, args)
    ratios = [2 * weights.softmax(0) for weights in recorder.weights]
    return recorder.gradients, ratios


RATIOS = 0.05, 0.5, 0.79, 0.81, 0.89, 0.91, 1.0, 1.09, 1.11, 1.19, 1.21, 2.0, 3.0
ADVANTAGES = -2.0, -1.0, -0.1, 0.0, 0.1, 1.0, 2.0


def objective_of_ppo(ratio, advantage, epsilon, monkeypatch):
    """For one transition, as the script's own update hands it to `minimize`."""
    losses = []
    monkeypatch.setattr(ppo, "minimize", lambda loss, *rest: losses.append(loss.item()))
    chance = ratio / 4
    policy = exact.Tabular(torch.tensor([[1 - chance, chance]]).log())
    batch = make_batch(
        ppo,
        Categorical(torch.tensor([[3 / 4, 1 / 4]])),
        obs=torch.tensor([0]),
        actions=torch.tensor([1]),
        advantages=torch.tensor([advantage]),
    )
    ppo.update_policy(policy, None, batch, ppo.Args(policy_epochs=1, clip_eps=epsilon))
    (loss,) = losses
    return -loss


# The ratio


@pytest.mark.parametrize(
    ("weighting", "cap"), [("trajectory", math.inf), ("per-decision", math.inf), ("step", 1e300)]
)
def test_the_second_step_has_the_ratios_of_the_first(weighting, cap):
    """½ · 1 · (½, −½); then π = (¾, ¼), ρ = (3/2, ½), and ½ · 3/2 · (¼, −¼)."""
    policy, batch = one_state([1.0, 0.0])
    recorder = Recorder(policy, lr=2 * math.log(3))
    options = dict(weighting=weighting, weight_cap=cap, policy_epochs=2, max_grad_norm=math.inf)
    metrics = is_pg.update_policy(policy, recorder, batch, is_pg.Args(**options))
    expected = torch.tensor([[1 / 4, -1 / 4], [3 / 16, -3 / 16]])
    torch.testing.assert_close(torch.stack(recorder.gradients), expected, rtol=0, atol=1e-10)
    assert metrics["weight_ess"].item() == pytest.approx(1 / ((9 / 4 + 1 / 4) / 2))


# Why the min, and not the clip alone


def test_the_min_lets_a_mistake_be_undone():
    """A good action that has become rare (ρ = 0.24) comes back; with the clip alone it does not."""
    policy, batch = one_state([1.0, 0.0], logits=(-2.0, 0.0))
    gradients, ratios = climb(ppo, policy, batch, 50, lr=1.0)
    assert gradients[0][0] > 0.05
    assert ratios[0][0] < 0.3
    assert ratios[-1][0] > 1.2
    policy, batch = one_state([1.0, 0.0], logits=(-2.0, 0.0))
    ratio = (policy(batch.obs).log_prob(batch.actions) - batch.old_log_probs).exp()
    clip_alone = (ratio.clamp(0.8, 1.2) * batch.advantages).mean()
    (gradient,) = torch.autograd.grad(clip_alone, policy.logits)
    assert (gradient == 0).all()


def test_with_the_min_it_is_a_lower_bound(monkeypatch):
    too_much = []
    for ratio, advantage in product(RATIOS, ADVANTAGES):
        promise = objective_of_ppo(ratio, advantage, 0.2, monkeypatch)
        assert promise <= ratio * advantage + 1e-10
        clip_alone = min(max(ratio, 0.8), 1.2) * advantage
        too_much.append(clip_alone > ratio * advantage + 1e-10)
    assert any(too_much)


# What the clip is, and what it is not


@pytest.mark.parametrize("epsilon", [0.1, 0.2])
def test_the_clip_is_a_penalty(epsilon, monkeypatch):
    """ρA − |A| max(0, ± (ρ − 1) − ε): on how far ρ is past ε in the direction that A asks for."""
    for ratio, advantage in product(RATIOS, ADVANTAGES):
        asked_for = ratio - 1 if advantage > 0 else 1 - ratio
        penalized = ratio * advantage - abs(advantage) * max(0, asked_for - epsilon)
        clipped = objective_of_ppo(ratio, advantage, epsilon, monkeypatch)
        assert clipped == pytest.approx(penalized, rel=0, abs=1e-10)


def test_the_clip_does_not_bound_the_ratio():
    """The first step is that of is_pg.py, however long, and no later one brings the ratio back."""
    steps = {}
    for script in (is_pg, ppo):
        policy, batch = one_state([1.0, -1.0])
        steps[script] = climb(script, policy, batch, 1, lr=10.0)
    torch.testing.assert_close(steps[ppo], steps[is_pg], rtol=0, atol=1e-10)
    policy, batch = one_state([1.0, -1.0])
    gradients, ratios = climb(ppo, policy, batch, 5, lr=10.0)
    assert ratios[0][0] > 1.9  # of at most 2
    assert ratios[0][1] < 0.1
    assert all((gradient == 0).all() for gradient in gradients[1:])
    torch.testing.assert_close(ratios[-1], ratios[0])


def test_how_far_the_ratio_goes_in_one_update_of_ppo():
    with open(ROOT / "docs/why/update.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["script"] == "ppo"]
    largest = max(float(row["ratio_max"]) for row in rows)
    text = (ROOT / "docs/why_the_ratio.md").read_text(encoding="utf-8")
    assert f"largest ratio is {largest:.3g}" in text.replace("\n", " ")


# Which direction of the KL


@pytest.mark.parametrize("seed", range(3))
def test_near_the_old_policy_both_kls_are_one(seed):
    """The second derivatives of both are the Fisher matrix, diag(π) − ππᵀ for a softmax."""
    old = torch.randn(4, generator=torch.Generator().manual_seed(seed)).double()
    forward = hessian(lambda x: kl(old, x))(old)
    backward = hessian(lambda x: kl(x, old))(old)
    probs = old.softmax(0)
    fisher = probs.diag() - torch.outer(probs, probs)
    torch.testing.assert_close(forward, fisher, rtol=0, atol=1e-10)
    torch.testing.assert_close(backward, fisher, rtol=0, atol=1e-10)


def kl(first, second):
    """KL of two policies as the scripts have them, (A,) logits each."""
    head = make_head(Discrete(len(first)))
    return kl_divergence(head(first), head(second))


def test_both_kls_bound_the_total_variation():
    """TV² ≤ KL/2 (Pinsker): of either, so eq. 9 of TRPO holds with either."""
    for seed in range(100):
        first, second = 3 * torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
        variation = (first.softmax(0) - second.softmax(0)).abs().sum() / 2
        assert variation**2 <= kl(first, second) / 2
        assert variation**2 <= kl(second, first) / 2


@pytest.mark.parametrize("chance", [1e-2, 1e-4, 1e-8])
def test_only_one_kl_forbids_to_give_an_action_up(chance):
    """π_old = (1/2, 1/2), π = (x, 1 − x): −½ log 4x(1 − x) has no bound, the other log 2."""
    old = torch.tensor([0.5, 0.5]).log()
    new = torch.tensor([chance, 1 - chance]).log()
    forward = kl(old, new).item()
    expected = -torch.log(torch.tensor(4 * chance * (1 - chance))).item() / 2
    assert forward == pytest.approx(expected)
    assert forward > 1.5
    assert kl(new, old).item() < 0.6932
