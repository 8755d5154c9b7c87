"""The claims of the two source texts, to 1e-10, on problems where every expectation is a sum.

On one side the scripts' own updates, `gae` and weights, on a batch that holds each path as often
as the old policy φ takes it (tools/exact.py); on the other dynamic programming, or a walk over all
paths in plain Python. The gradients are of the sum over an episode's steps.
"""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recording import Recorder, make_batch

import is_pg
import ppo
import trpo
import vanilla_pg
from tools import exact
from tools.exact import ACTIONS, END, HORIZON, STATES, Problem

FIRST_ORDER = {
    "vanilla_pg": (vanilla_pg, {}),
    "step": (is_pg, {"weighting": "step"}),
    "step, as a score": (is_pg, {"weighting": "step", "weight_cap": 1e300}),
    "trajectory": (is_pg, {"weighting": "trajectory"}),
    "per-decision": (is_pg, {"weighting": "per-decision"}),
    "ppo": (ppo, {}),
}
PROBLEMS = {
    "gamma=1": Problem(0, 1.0),
    "gamma=0.9": Problem(1, 0.9),
    "gamma=0.9, discounted rewards": Problem(2, 0.9).with_discounted_rewards(),
}
pytestmark = pytest.mark.usefixtures("double_precision")
BASELINES = ["none", "V of the old policy", "any"]


@pytest.fixture(params=PROBLEMS, scope="module")
def problem(request):
    return PROBLEMS[request.param]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def moved(problem, distance, seed=0):
    """θ: the old policy φ, moved."""
    policy, noise = problem.old_policy(), np.random.default_rng(seed).normal(size=(4, 3))
    policy.logits.data += distance * torch.from_numpy(noise)
    return policy


def baseline(problem, name):
    if name == "V of the old policy":
        return problem.action_values(problem.old_policy().probs())[1].detach().numpy()
    values = np.random.default_rng(9).normal(size=(HORIZON, STATES + 1))
    return values if name == "any" else 0 * values


def update(name, problem, policy, batch, **options):
    """The gradient that the script's own update takes, and its metrics."""
    script, chosen = FIRST_ORDER[name]
    shared = dict(gamma=problem.gamma, gae_lambda=1.0, max_grad_norm=math.inf, policy_epochs=1)
    recorder = Recorder(policy)
    args = script.Args(**(shared | chosen | options))
    metrics = script.update_policy(policy, recorder, batch, args)
    (gradient,) = recorder.gradients
    return gradient * steps_per_episode(batch), metrics


def steps_per_episode(batch):
    return len(batch.obs) / batch.done.sum()


def expected_gradient(problem, policy, visits, action_values):
    """Σ_t Σ_s d_t(s) Σ_a π(a|s) Q_t(s, a) ∇log π(a|s)"""
    probs = policy.probs()
    weights = (visits[..., None] * probs * action_values).detach()
    (gradient,) = torch.autograd.grad((weights * probs.log()).sum(), policy.logits)
    return gradient.flatten()


def quantities(problem, policy):
    """d_t(s) and Q_t(s, a) of a policy, by dynamic programming."""
    probs = policy.probs()
    return problem.visits(probs), problem.action_values(probs)[0]


# 1. At θ = φ there is one gradient


@pytest.mark.parametrize("values", BASELINES)
@pytest.mark.parametrize("name", [*FIRST_ORDER, "trpo"])
def test_where_the_policies_agree_all_gradients_are_one(problem, name, values, monkeypatch):
    """And ∇J, the γᵗ convention aside: the scripts take Σ E[Q ∇log π], without γᵗ before Q."""
    policy, batch = problem.old_policy(), problem.batch(baseline(problem, values))
    if name == "trpo":
        gradients = []
        spy = lambda matvec, b, *_: gradients.append(b) or (0 * b, 0.0)  # noqa: E731
        monkeypatch.setattr(trpo, "conjugate_gradient", spy)
        trpo.update_policy(policy, batch, trpo.Args())
        gradient = gradients[0] * steps_per_episode(batch)
    else:
        gradient, _ = update(name, problem, policy, batch)
    close(gradient, expected_gradient(problem, policy, *quantities(problem, policy)))
    true_gradient = exact.gradient_of_return(problem, policy)
    if problem.gamma == 1:  # or the discount is in the rewards, which gives each step its γᵗ
        close(gradient, true_gradient)
    else:
        assert (gradient - true_gradient).norm() > 0.01


# 2. Away from φ each weighting corrects what it says


def corrected(problem, policy, name):
    """The states and the futures of which policy a gradient has."""
    new, old = quantities(problem, policy), quantities(problem, problem.old_policy())
    return {
        "step": (old[0], old[1]),
        "step, as a score": (old[0], old[1]),
        "trajectory": (new[0], old[1]),
        "per-decision": (new[0], new[1]),
    }[name]


@pytest.mark.parametrize("values", BASELINES)
@pytest.mark.parametrize("name", ["step", "step, as a score", "trajectory", "per-decision"])
def test_what_a_weighting_corrects(problem, name, values):
    policy, batch = moved(problem, 0.5), problem.batch(baseline(problem, values))
    gradient, _ = update(name, problem, policy, batch)
    close(gradient, expected_gradient(problem, policy, *corrected(problem, policy, name)))
    bias = (gradient - exact.gradient_of_return(problem, policy)).norm()
    if name == "per-decision" and problem.gamma == 1:
        assert bias < 1e-10
    else:
        assert bias > 0.01


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7])
@pytest.mark.parametrize("name", ["step", "trajectory"])
def test_with_the_true_values_lambda_changes_no_expectation(problem, name, gae_lambda):
    policy = moved(problem, 0.5)
    batch = problem.batch(baseline(problem, "V of the old policy"), gae_lambda)
    gradient, _ = update(name, problem, policy, batch, gae_lambda=gae_lambda)
    close(gradient, expected_gradient(problem, policy, *corrected(problem, policy, name)))


# 3. What the stop-gradient does


def autograd_of(objective, policy):
    (gradient,) = torch.autograd.grad(objective, policy.logits)
    return gradient.flatten()


def weights_with_gradient(problem, policy, batch, weighting):
    """The weights of is_pg.py, not stopped."""
    log_ratio = policy(batch.obs).log_prob(batch.actions) - batch.old_log_probs
    args = is_pg.Args(weighting=weighting, gamma=problem.gamma, gae_lambda=1.0)
    return is_pg.weighted_advantages(log_ratio, batch, args)[0]


def test_without_the_stop_gradient(problem):
    """For a single ratio it is the same gradient, for a product of them another one."""
    policy, batch = moved(problem, 0.5), problem.batch(baseline(problem, "none"))
    episodes = batch.done.sum()
    for weighting, same in [("step", True), ("trajectory", False)]:
        weights = weights_with_gradient(problem, policy, batch, weighting)
        unstopped = autograd_of((weights * batch.advantages).sum() / episodes, policy)
        stopped, _ = update(weighting, problem, policy, batch)
        if same:
            close(unstopped, stopped)
        else:  # each ∇log π moves with all that its step is weighted for: Σ_k≤t ∇log π_k W_t A_t
            assert (unstopped - stopped).norm() > 0.01
            scores = exact.score_table(policy)
            expected = sum(
                chance * weight * total * sum(scores[s, a] for s, a, _ in path[: t + 1])
                for path, chance in walk(problem)
                for t, (weight, total) in enumerate(zip(*weigh(problem, policy, path)))
            )
            close(unstopped, expected)


def test_weighted_rewards_need_no_log(problem):
    """Σ γᵗ W_t r_t is an unbiased estimate of J(θ), and its gradient one of ∇J."""
    policy, batch = moved(problem, 0.5), problem.batch(baseline(problem, "none"))
    paths = problem.paths()
    weights = weights_with_gradient(problem, policy, batch, "trajectory")
    discounted = torch.from_numpy((problem.gamma**paths.times * paths.rewards)[paths.valid])
    estimate = (weights * discounted).sum() / batch.done.sum()
    close(estimate, problem.expected_return(policy.probs()))
    close(autograd_of(estimate, policy), exact.gradient_of_return(problem, policy))


# 4. The question's second answer, line by line


@pytest.mark.parametrize("distance", [0.0, 0.5])
def test_the_ratio_has_the_gradient_of_the_log(problem, distance):
    policy, values = moved(problem, distance), baseline(problem, "V of the old policy")
    batch = problem.batch(values)
    at = batch.obs, batch.actions
    old_probs, probs = problem.old_policy().probs().detach(), policy.probs().detach()
    jacobian = lambda f: torch.func.jacrev(f)(policy.logits.detach()).flatten(2)[at]  # noqa: E731
    ratio, advantages = (probs / old_probs)[at][:, None], batch.advantages[:, None]
    lines = [
        jacobian(lambda logits: logits.softmax(1) / old_probs) * advantages,  # ∇(ρ A) = (∇ρ) A
        ratio * jacobian(lambda logits: logits.softmax(1)) / probs[at][:, None] * advantages,
        ratio * jacobian(lambda logits: logits.log_softmax(1)) * advantages,
        ratio * exact.score_table(policy)[at] * advantages,
    ]
    gradient, _ = update("step", problem, policy, batch)  # ∇L^IS
    for line in lines:
        close(line.sum(0) / batch.done.sum(), gradient)
    log_gradient, _ = update("vanilla_pg", problem, policy, batch)  # ∇L^PG
    close(log_gradient, (lines[3] / ratio).sum(0) / batch.done.sum())
    assert ((log_gradient - gradient).norm() < 1e-10) == (distance == 0)


# 5. Bias, variance and effective sample size


def walk(problem):
    """Each path, as (state, action, reward) triples, and the chance that φ has of it."""
    old_probs = problem.old_policy().probs().detach().numpy()
    transitions = problem.transitions().numpy()

    def go(state, t):
        if t == HORIZON or state == END:
            yield (), 1.0
            return
        for a in range(ACTIONS):
            step = state, a, problem.rewards[t, state, a].item()
            for after in range(END + 1) if t < HORIZON - 1 else [END]:
                chance = old_probs[state, a]
                chance = chance * transitions[state, a, after] if t < HORIZON - 1 else chance
                if chance > 0:
                    for rest, p in go(after, t + 1):
                        yield (step, *rest), chance * p

    return list(go(0, 0))


def weigh(problem, policy, path, weighting="trajectory"):
    """Importance weights, and returns from each step on, of a path."""
    old_probs, probs = problem.old_policy().probs().tolist(), policy.probs().tolist()
    weights = [probs[s][a] / old_probs[s][a] for s, a, _ in path]
    if weighting == "none":
        weights = [1.0] * len(path)
    elif weighting != "step":
        weights = list(itertools.accumulate(weights, lambda x, y: x * y))
    totals = [
        sum(problem.gamma**k * reward for k, (_, _, reward) in enumerate(path[t:]))
        for t in range(len(path))
    ]
    return weights, totals


@pytest.mark.parametrize("weighting", exact.WEIGHTINGS)
@pytest.mark.parametrize("distance", [0.0, 0.3, 1.0])
def test_bias_and_variance(weighting, distance):
    problem = PROBLEMS["gamma=1"]
    policy, batch = moved(problem, distance), problem.batch(baseline(problem, "none"))
    scores, mean, square, steps, first, second = exact.score_table(policy), 0, 0, 0, 0, 0
    for path, chance in walk(problem):
        weights, totals = weigh(problem, policy, path, weighting)
        terms = [weight * total for weight, total in zip(weights, totals)]
        if weighting == "per-decision":  # Σ_l≥t W_l r_l, for here γ is 1
            rewards = [weight * reward for weight, (_, _, reward) in zip(weights, path)]
            terms = [sum(rewards[t:]) for t in range(len(path))]
        estimate = sum(term * scores[s, a] for term, (s, a, _) in zip(terms, path))
        mean, square = mean + chance * estimate, square + chance * estimate @ estimate
        steps, first = steps + chance * len(path), first + chance * sum(weights)
        second += chance * sum(weight**2 for weight in weights)
    bias = (mean - exact.gradient_of_return(problem, policy)).norm().item()
    deviation, ess = (square - mean @ mean).sqrt().item(), first**2 / (steps * second)
    found = exact.bias_and_variance(problem, policy, batch, weighting)
    assert found == pytest.approx((bias, deviation, ess), abs=1e-10)
    if weighting != "none":
        _, metrics = update(weighting, problem, policy, batch)
        assert metrics["weight_ess"].item() == pytest.approx(ess, abs=1e-10)


def test_figure(tmp_path, capsys):
    picture = tmp_path / "figure.png"
    exact.main(exact.Args(output=str(picture), problems=3, distances=(0.0, 1.0)))
    assert picture.read_bytes().startswith(b"\x89PNG")
    at_the_old_policy, away = capsys.readouterr().out.split("per-decision")[1].splitlines()[1:3]
    assert at_the_old_policy.split("deviation")[0] == away.split("deviation")[0].replace("1:", "0:")
    assert "effective sample size 1.000" in at_the_old_policy
    assert "effective sample size 1.000" not in away


# 6. The trust region


@pytest.fixture(params=[3, 5, 8])
def endless(request):
    """A problem without a horizon, discounted, its quantities by linear solves."""
    problem = Problem(request.param, 0.9)
    moves, rewards = problem.transitions(), torch.from_numpy(problem.rewards[0])

    def solve(policy):
        """J, A(s, a) and the discounted visits ρ(s) = Σ γᵗ P(s_t = s)."""
        probs = policy.probs().detach()
        chain = torch.eye(STATES + 1) - problem.gamma * torch.einsum("sa,sax->sx", probs, moves)
        values = torch.linalg.solve(chain, (probs * rewards).sum(1))
        advantages = rewards + problem.gamma * moves @ values - values[:, None]
        return values[0], advantages, torch.linalg.solve(chain.T, torch.eye(STATES + 1)[0])

    old_return, advantages, visits = solve(problem.old_policy())
    return SimpleNamespace(
        problem=problem,
        old_return=old_return,
        advantages=advantages,
        weights=visits[:, None] * advantages,
        penalty=4 * advantages.abs().max() * problem.gamma / (1 - problem.gamma) ** 2,
        new_return=lambda policy: solve(policy)[0],
    )


def surrogate(endless, policy):
    """L(θ) = J(φ) + Σ_s ρ(s) Σ_a π(a|s) A(s, a) (Schulman et al. 2015, eq. 3)."""
    return endless.old_return + (policy.probs() * endless.weights).sum()


def state_kls(problem, policy):
    """KL(φ ‖ θ) in each state."""
    old_probs, probs = problem.old_policy().probs().detach(), policy.probs().detach()
    return (old_probs * (old_probs / probs).log()).sum(1)[:STATES]


def pair_batch(endless):
    """Each state and action once, its advantage weighted so that E[ρ A] is L(θ) − J(φ)."""
    states, actions = torch.cartesian_prod(torch.arange(STATES), torch.arange(ACTIONS)).T
    weights = endless.problem.old_policy().probs().detach() * endless.weights * len(states)
    valid = torch.ones(1, len(states), dtype=torch.bool)
    fields = dict(obs=states, actions=actions, advantages=weights[states, actions])
    old_dist = endless.problem.old_dist(states)
    return make_batch(is_pg, old_dist, **fields, valid=valid, done=valid)


def trust_region_update(problem, batch, **options):
    policy = problem.old_policy()
    args = trpo.Args(**{"cg_iters": 100, "cg_tolerance": 1e-11, **options})
    return policy, trpo.update_policy(policy, batch, args)


@pytest.mark.parametrize("distance", [0.1, 1, 10])
def test_the_gain_is_a_sum_of_old_advantages(problem, distance):
    """J(θ) = J(φ) + E_θ[ Σ γᵗ A_φ(s_t, a_t) ] (Schulman et al. 2015, eq. 1)."""
    old, new = problem.old_policy().probs(), moved(problem, distance).probs()
    q, v = problem.action_values(old)
    gain = 0.0
    for t, visits in enumerate(problem.visits(new)):
        gain += problem.gamma**t * (visits[:, None] * new * (q[t] - v[t, :, None])).sum()
    close(problem.expected_return(old) + gain, problem.expected_return(new))


def test_lower_bound_of_the_return(endless):
    """J(θ) ≥ L(θ) − C KL_max, C = 4 γ max|A| / (1 − γ)² (Schulman et al. 2015, eq. 9)."""
    problem, slack, misled = endless.problem, [], 0
    policies = [moved(problem, 10**x, i) for x in np.linspace(-3, 1, 41) for i in range(10)]
    steps = [
        trust_region_update(problem, pair_batch(endless), max_kl=10**x, cg_damping=1e-6)
        for x in np.linspace(-6, 1, 15)
    ]
    assert all(metrics["step_fraction"] > 0 for _, metrics in steps)
    for policy in [problem.old_policy(), *policies, *(policy for policy, _ in steps)]:
        promised, actual = surrogate(endless, policy).detach(), endless.new_return(policy)
        penalty = endless.penalty * state_kls(problem, policy).max()
        assert actual >= promised - penalty - 1e-10
        if promised > actual + 1e-3:  # where C = 0 would be no bound
            slack.append(penalty / (promised - actual))
        misled += promised > endless.old_return and actual < endless.old_return
    assert misled > 0  # L alone may promise a gain where there is a loss
    assert len(slack) > 50
    assert min(slack) > 100  # it holds, but says little about how far one may go
    # Near φ it is J to first order, and is_pg.py, vanilla_pg.py and ppo.py follow it
    policy = problem.old_policy()
    close(autograd_of(surrogate(endless, policy), policy), slope_of_the_return(endless))
    for policy in policies[::100]:
        gradient, _ = update("step", problem, policy, pair_batch(endless))
        mean = gradient / steps_per_episode(pair_batch(endless))
        close(mean, autograd_of(surrogate(endless, policy), policy))


def slope_of_the_return(endless):
    """∇J at φ, by central differences along each logit to the fourth order."""
    slope = []
    for i in range((STATES + 1) * ACTIONS):
        total = 0.0
        for steps, weight in [(1, 8), (-1, -8), (2, -1), (-2, 1)]:
            policy = endless.problem.old_policy()
            policy.logits.data.flatten()[i] += steps * 1e-3
            total += weight * endless.new_return(policy)
        slope.append(total / 12e-3)
    return torch.tensor(slope)


@pytest.mark.parametrize("max_kl", [1e-4, 0.01, 0.3, 3.0])
def test_accepted_steps_keep_to_the_trust_region(problem, max_kl):
    """In the states as φ visits them the mean KL is at most δ, and the surrogate has risen."""
    batch = problem.batch(baseline(problem, "V of the old policy"))
    visits, action_values = quantities(problem, problem.old_policy())
    visits = visits.detach()[:, :STATES]
    for backtrack_coef in (0.5, 0.9):
        policy, metrics = trust_region_update(
            problem, batch, max_kl=max_kl, backtrack_coef=backtrack_coef, cg_damping=1e-3
        )
        kl = (visits @ state_kls(problem, policy)).sum() / visits.sum()
        change = policy.probs() - problem.old_policy().probs()
        gain = (visits * (change * action_values).sum(2)[:, :STATES]).sum()
        assert metrics["step_fraction"] > 0
        assert 0 < kl <= max_kl
        assert gain > 0


@pytest.mark.parametrize("max_kl", [1e-4, 0.01])
def test_undamped_step_is_the_natural_gradient(problem, max_kl):
    """For a tabular softmax F⁻¹g is the advantage (Kakade 2001); no other step gains as much."""
    batch = problem.batch(baseline(problem, "any"))
    policy, metrics = trust_region_update(problem, batch, max_kl=max_kl, cg_damping=0.0)
    assert metrics["step_fraction"] == 1
    step = (policy.logits - problem.old_policy().logits).detach()
    visits, action_values = quantities(problem, problem.old_policy())
    visits, probs = visits.detach(), problem.old_policy().probs().detach()
    weights = (visits[..., None] * probs)[:, :STATES]  # (H, S, A): how often φ takes each action
    steps, weights = weights.sum(), weights.sum(0)
    q = ((visits[..., None] * action_values).sum(0) / visits.sum(0)[:, None]).detach()[:STATES]
    direction = torch.zeros(STATES + 1, ACTIONS)
    direction[:STATES] = q - q.mean(1, keepdim=True)
    advantages = q - (probs[:STATES] * q).sum(1, keepdim=True)
    length = math.sqrt(2 * max_kl / ((weights * advantages**2).sum() / steps))  # ½ sᵀF s = δ
    close(step, length * direction)
    gradient = (weights * advantages / steps).flatten()
    gain = gradient @ step[:STATES].flatten()
    for other in torch.randn(100, STATES, ACTIONS):
        centered = other - (probs[:STATES] * other).sum(1, keepdim=True)
        scale = math.sqrt(2 * max_kl / ((weights * centered**2).sum() / steps))
        assert gradient @ (scale * other).flatten() < gain


# 7. The clipping


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("gap", [1e-6, 0.1, 0.15])
@pytest.mark.parametrize("bound", [0.8, 1.2])
def test_clipping_beside_its_bounds(bound, gap, sign):
    """Flat above 1 + ε for A > 0 and below 1 − ε for A < 0 (Schulman et al. 2017, figure 1)."""
    problem = PROBLEMS["gamma=1"]
    for ratio in (bound - gap, bound + gap):
        policy = problem.old_policy()
        probs = policy.probs().detach().clone()
        probs[0] *= (1 - ratio * probs[0, 1]) / (1 - probs[0, 1])
        probs[0, 1] = ratio * problem.old_policy().probs()[0, 1].detach()
        policy.logits.data = probs.log()
        one = torch.ones(1, 1, dtype=torch.bool)
        advantage = torch.tensor([2.0 * sign])
        state, action = torch.tensor([0]), torch.tensor([1])
        fields = dict(obs=state, actions=action, advantages=advantage, valid=one, done=one)
        batch = make_batch(is_pg, problem.old_dist(state), **fields)
        clipped, metrics = update("ppo", problem, policy, batch, clip_eps=0.2)
        plain, _ = update("step", problem, policy, batch)
        flat = ratio > 1.2 if sign > 0 else ratio < 0.8
        close(plain, 2 * sign * ratio * exact.score_table(policy)[0, 1])
        close(clipped, 0 * plain if flat else plain)
        assert metrics["clip_fraction"] == (abs(ratio - 1) > 0.2)


@pytest.mark.parametrize("clip_eps", [0.1, 0.2])
def test_clipping_of_all_paths(problem, clip_eps):
    policy, batch = moved(problem, 0.5), problem.batch(baseline(problem, "any"))
    old_probs, probs = problem.old_policy().probs().detach(), policy.probs().detach()
    ratio = (probs / old_probs)[batch.obs, batch.actions]
    over = (batch.advantages > 0) & (ratio > 1 + clip_eps)
    under = (batch.advantages < 0) & (ratio < 1 - clip_eps)
    gradient, metrics = update("ppo", problem, policy, batch, clip_eps=clip_eps)
    kept = batch._replace(advantages=batch.advantages * ~(over | under))
    close(gradient, update("step", problem, policy, kept)[0])
    assert over.any()
    assert under.any()
    outside = ((ratio - 1).abs() > clip_eps).double().mean().item()
    assert metrics["clip_fraction"].item() == pytest.approx(outside)
