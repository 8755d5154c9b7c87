"""The ratio in language models, without sampling: every expectation is a sum over all sequences.

Run: python -m tools.language_models --output docs/why/language_models.png

A language model of three tokens, one of which ends a sequence, writes at most four of them: 31
sequences. The state is the prefix, and the reward, 0 or 1, comes at the end. There are two
prompts, a hard one and an easy one. The estimate from G sequences of a prompt is a sum over them,
and their advantages depend only on how many are right. So mean and variance are finite sums for
any G.
"""

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jacrev

from tools import fail, parse, plot

TOKENS, END, LONGEST = 3, 2, 4
PREFIXES = [p for n in range(LONGEST) for p in itertools.product(range(END), repeat=n)]  # 15
CHANCES = (0.15, 0.7)  # how likely a sequence is a right answer to each prompt


# Sequences


class Sequences(NamedTuple):
    """All sequences, padded with the end token; (N, T) grids, as GRPO's code has them."""

    tokens: Tensor
    prefixes: Tensor  # the state in which each token is chosen
    mask: Tensor  # False after the end


def is_padded(string):
    """Whether nothing but padding follows the first end token."""
    ended = string.index(END) if END in string else LONGEST
    return set(string[ended:]) <= {END}


def all_sequences():
    strings = [s for s in itertools.product(range(TOKENS), repeat=LONGEST) if is_padded(s)]
    before = [[string[:t] for t in range(LONGEST)] for string in strings]
    mask = [[END not in prefix for prefix in row] for row in before]
    prefixes = [[PREFIXES.index(p) if END not in p else 0 for p in row] for row in before]
    return Sequences(torch.tensor(strings), torch.tensor(prefixes), torch.tensor(mask))


class Problem:
    """Two prompts, with random right answers, and a random old policy φ for each.

    A policy is a table of logits, (prompts, prefixes, tokens).
    """

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.tokens, self.prefixes, self.mask = all_sequences()
        self.lengths = self.mask.sum(1)  # (N,)
        draws = rng.random((len(CHANCES), len(self.tokens)))
        self.rewards = torch.from_numpy(draws < np.array(CHANCES)[:, None]).double()
        self.old = torch.from_numpy(rng.normal(size=(len(CHANCES), len(PREFIXES), TOKENS)))
        self.old[..., END] -= 1  # so that longer sequences are not rare

    def log_probs(self, table):
        """log π of each token of each sequence, (N, T), 0 after the end. table: of one prompt."""
        chosen = table.log_softmax(1)[self.prefixes, self.tokens]
        return chosen * self.mask

    def chances(self, table):
        """How likely a policy is to write each sequence, (N,)."""
        return self.log_probs(table).sum(1).exp()

    def expected_reward(self, logits):
        """J, the mean over the prompts."""
        pairs = zip(logits, self.rewards)
        return sum(self.chances(table) @ rewards for table, rewards in pairs) / len(logits)

    def gradient(self, logits):
        """∇J, in the shape of the logits."""
        return grad(self.expected_reward)(logits)

    def moved(self, distance):
        """θ: φ, moved along ∇J(φ), as it is when one batch is used for several steps."""
        slope = self.gradient(self.old)
        return self.old + distance * slope / slope.norm()


# Advantages of a group, (…, G)


def centered(rewards):
    return rewards - rewards.mean(-1, keepdim=True)


def leave_one_out(rewards):
    """RLOO: less the mean reward of the others."""
    others = rewards.sum(-1, keepdim=True) - rewards
    return rewards - others / (rewards.shape[-1] - 1)


def standardized(rewards):
    """GRPO: less the mean of the group, by its standard deviation. 0 where all are equal."""
    deviation = rewards.std(-1, keepdim=True)
    return centered(rewards) / torch.where(deviation > 0, deviation, 1)


def not_centered(rewards):
    return rewards


# Objectives of each sequence, (N,): a sum over its tokens. log_probs, mask: (N, T), advantages:
# (N, 1) or (N, T). What is detached is a weight of ∇log π


def without_ratio(log_probs, old_log_probs, mask, advantages):
    return (log_probs * advantages * mask).sum(1)


def token(log_probs, old_log_probs, mask, advantages):
    ratio = (log_probs - old_log_probs).exp()
    return (ratio * advantages * mask).sum(1)


def prefix(log_probs, old_log_probs, mask, advantages):
    """The product of the ratios up to each token."""
    weights = (log_probs - old_log_probs).cumsum(1).exp().detach()
    return (weights * log_probs * advantages * mask).sum(1)


def sequence(log_probs, old_log_probs, mask, advantages):
    """The product of all ratios."""
    ratio = (log_probs - old_log_probs).sum(1).exp()
    return ratio * advantages[:, 0]


def geometric_mean(log_probs, old_log_probs, mask, advantages):
    """GSPO's ratio, times the length, so that its gradient is a sum over tokens too."""
    lengths = mask.sum(1)
    ratio = ((log_probs - old_log_probs).sum(1) / lengths).exp()
    return lengths * ratio * advantages[:, 0]


def clipped(log_probs, old_log_probs, mask, advantages, low=0.2, high=0.2):
    """PPO. DAPO has a larger bound above."""
    ratio = (log_probs - old_log_probs).exp()
    clipped_ratio = ratio.clamp(1 - low, 1 + high)
    return (torch.min(ratio * advantages, clipped_ratio * advantages) * mask).sum(1)


def capped(log_probs, old_log_probs, mask, advantages, cap):
    """CISPO: the weight is cut down, and each token keeps its ∇log π."""
    weights = (log_probs - old_log_probs).exp().clamp(max=cap).detach()
    return (weights * log_probs * advantages * mask).sum(1)


def recomputed(log_probs, old_log_probs, mask, advantages):
    """The first step of PPO around the policy itself, whoever has sampled."""
    return clipped(log_probs, log_probs.detach(), mask, advantages)


def decoupled(log_probs, old_log_probs, mask, advantages, limit=None, whole=False):
    """The same, times π_prox/μ of the token or of the whole sequence, where μ has sampled."""
    log_weights = (log_probs - old_log_probs).detach()
    if whole:
        log_weights = log_weights.sum(1, keepdim=True)
    weights = log_weights.exp()
    if limit == "capped":
        weights = weights.clamp(max=2)
    elif limit == "dropped":
        weights = weights * (weights <= 2)
    return recomputed(log_probs, old_log_probs, mask, advantages * weights)


def per_token(objective):
    """GRPO divides the objective of a sequence by its length."""

    def divided(log_probs, old_log_probs, mask, advantages):
        return objective(log_probs, old_log_probs, mask, advantages) / mask.sum(1)

    return divided


RATIOS = {
    "no ratio": without_ratio,
    "token": token,
    "prefix": prefix,
    "sequence": sequence,
    "geometric mean": geometric_mean,
}
CUTS = {
    "token, clipped to 0.8 and 1.2": clipped,
    "token, clipped to 0.8 and 1.28": partial(clipped, high=0.28),
    "token, capped at 1.2": partial(capped, cap=1.2),
    "token, capped at 2": partial(capped, cap=2.0),
}
OLD_POLICIES = {
    "π/π_prox clipped": recomputed,
    "π/μ clipped": clipped,
    "π/π_prox clipped, times π_prox/μ of the token": decoupled,
    "… capped at 2": partial(decoupled, limit="capped"),
    "… dropped above 2": partial(decoupled, limit="dropped"),
    "π/π_prox clipped, times π_prox/μ of the sequence": partial(decoupled, whole=True),
    "… of the sequence, capped at 2": partial(decoupled, whole=True, limit="capped"),
}
ADVANTAGES = {
    "none: the reward": (token, not_centered),
    "less the mean of the others (RLOO)": (token, leave_one_out),
    "less the mean of all (Dr. GRPO)": (token, centered),
    "less the mean, over the standard deviation": (token, standardized),
    "less the mean of the others, over the length": (per_token(token), leave_one_out),
    "less the mean, over both (GRPO)": (per_token(token), standardized),
}
METHODS = {  # table: {row: (objective, advantage)}
    "ratio": {row: (f, leave_one_out) for row, f in (RATIOS | CUTS).items()},
    "old policies": {row: (f, leave_one_out) for row, f in OLD_POLICIES.items()},
    "advantage": ADVANTAGES,
}


# What a group says on average, and how much that varies


def values(objective, problem, prompt, log_probs):
    """The objective of each sequence of φ, (N,), for an advantage of 1 if right, else of −1."""
    old_log_probs = problem.log_probs(problem.old[prompt])
    signs = (2 * problem.rewards[prompt] - 1)[:, None]
    return objective(log_probs, old_log_probs, problem.mask, signs)


def gradients(problem, prompt, logits, objective):
    """∇ of these values, (N, P)."""

    def of_table(table):
        return values(objective, problem, prompt, problem.log_probs(table))

    return jacrev(of_table)(logits[prompt]).flatten(1)


def moments(each, chances):
    """Mean, and mean square of the distance from it, of rows that come with chances."""
    chances = chances / chances.sum()
    mean = chances @ each
    return mean, chances @ (each - mean).square().sum(1)


def group_moments(each, rewards, chances, advantage, size):
    """Mean, (P,), and variance of (1/G) Σ |A_i| ∇_i over groups of so many sequences.

    The advantages depend on how many are right. Given that, the sequences are independent.
    """
    right = rewards > 0
    right_mean, right_variance = moments(each[right], chances[right])
    wrong_mean, wrong_variance = moments(each[~right], chances[~right])
    p = chances[right].sum() / chances.sum()
    means, squares = 0, 0
    for k in range(size + 1):
        chance = math.comb(size, k) * p**k * (1 - p) ** (size - k)
        sizes = advantage(torch.tensor([1.0] * k + [0.0] * (size - k)).double()).abs()
        for_right, for_wrong = k * sizes[0] / size, (size - k) * sizes[-1] / size
        mean = for_right * right_mean + for_wrong * wrong_mean
        noise = (k * (sizes[0] / size) ** 2) * right_variance
        noise = noise + ((size - k) * (sizes[-1] / size) ** 2) * wrong_variance
        means = means + chance * mean
        squares = squares + chance * (mean.square().sum() + noise)
    return means, squares - means.square().sum()


def estimate(problem, logits, objective, advantage, size):
    """Mean, (P,), and standard deviation of the estimate of ∇J from a group of each prompt."""
    means, variance = [], 0
    for prompt, rewards in enumerate(problem.rewards):
        each = gradients(problem, prompt, logits, objective)
        chances = problem.chances(problem.old[prompt])
        mean, prompt_variance = group_moments(each, rewards, chances, advantage, size)
        means.append(mean / len(CHANCES))
        variance = variance + prompt_variance / len(CHANCES) ** 2
    return torch.cat(means), variance.sqrt()


def silent(problem, logits, objective, prompt):
    """How many of the tokens that φ writes get no gradient, and how many it writes."""

    def total(log_probs):
        return values(objective, problem, prompt, log_probs).sum()

    slopes = grad(total)(problem.log_probs(logits[prompt]))
    chances = problem.chances(problem.old[prompt])
    without = (slopes == 0) & problem.mask
    return chances @ without.sum(1).double(), chances @ problem.lengths.double()


def length_and_angle(mean, gradient):
    """How long a mean is in lengths of the gradient, and the degrees between the two, if any."""
    if mean.norm() < 1e-12:
        return torch.tensor(0.0), torch.tensor(math.nan)
    cosine = torch.nn.functional.cosine_similarity(mean, gradient, dim=0).clamp(-1, 1)
    return mean.norm() / gradient.norm(), cosine.arccos().rad2deg()


def compare(problem, distance, objective, advantage, size):
    """Bias and deviation in lengths of ∇J(φ); length and angle to ∇J(θ); silent tokens."""
    logits = problem.moved(distance)
    gradient = problem.gradient(logits).flatten()
    mean, deviation = estimate(problem, logits, objective, advantage, size)
    unit = problem.gradient(problem.old).norm()
    bias = (mean - gradient).norm()
    without, tokens = map(sum, zip(*(silent(problem, logits, objective, q) for q in (0, 1))))
    numbers = [bias / unit, deviation / unit, *length_and_angle(mean, gradient), without / tokens]
    return [x.item() for x in numbers]


# The KL of θ from φ, by samples of θ. x: log π_θ − log π_φ


def k1(x):
    return x


def k2(x):
    return x**2 / 2


def k3(x):
    return (-x).exp() - 1 + x


def of_sequence(estimator, log_ratio):
    return estimator(log_ratio.sum(1))


def of_tokens(estimator, log_ratio):
    return estimator(log_ratio).sum(1)


def of_sequence_with_ratio(estimator, log_ratio):
    """Times a ratio of 1, whose gradient is that of log π: e^{x − sg(x)}."""
    x = log_ratio.sum(1)
    return (x - x.detach()).exp() * estimator(x)


def of_tokens_with_ratio(estimator, log_ratio):
    ratio = (log_ratio - log_ratio.detach()).exp()
    return (ratio * estimator(log_ratio)).sum(1)


KLS = {
    "k1": (k1, of_sequence, of_sequence_with_ratio),
    "k2": (k2, of_sequence, of_sequence_with_ratio),
    "k3": (k3, of_sequence, of_sequence_with_ratio),
    "k1, token by token": (k1, of_tokens, of_tokens_with_ratio),
    "k2, token by token": (k2, of_tokens, of_tokens_with_ratio),
    "k3, token by token (GRPO)": (k3, of_tokens, of_tokens_with_ratio),
}


def kl(problem, prompt, table):
    """KL(θ ‖ φ) of whole sequences."""
    log_ratio = problem.log_probs(table) - problem.log_probs(problem.old[prompt])
    return problem.chances(table) @ log_ratio.sum(1)


def mean_kl(problem, distance):
    logits = problem.moved(distance)
    kls = [kl(problem, prompt, table).item() for prompt, table in enumerate(logits)]
    return sum(kls) / len(kls)


def kl_gradient(problem, prompt, table, estimator, form):
    """E_θ[ ∇k ]: what an estimator gives in the loss of a batch of θ, (P,)."""
    old_log_probs = problem.log_probs(problem.old[prompt])
    chances = problem.chances(table)

    def loss(x):
        return chances @ form(estimator, problem.log_probs(x) - old_log_probs)

    return grad(loss)(table).flatten()


def compare_kl(problem, distance, estimator, form, form_with_ratio, prompt=0):
    """Mean and deviation in units of the KL; length and angle of its gradient, also with ratio."""
    table = problem.moved(distance)[prompt]
    log_ratio = problem.log_probs(table) - problem.log_probs(problem.old[prompt])
    mean, variance = moments(form(estimator, log_ratio)[:, None], problem.chances(table))
    unit = kl(problem, prompt, table)
    gradient = grad(partial(kl, problem, prompt))(table).flatten()
    alone = kl_gradient(problem, prompt, table, estimator, form)
    with_ratio = kl_gradient(problem, prompt, table, estimator, form_with_ratio)
    sides = *length_and_angle(alone, gradient), *length_and_angle(with_ratio, gradient)
    return [x.item() for x in (mean[0] / unit, variance.sqrt() / unit, *sides)]


# Tables and figure


@dataclass
class Args:
    output: str = "language_models.png"  # picture to write
    problems: int = 20  # random problems; tables and figure have medians over them
    group: int = 8  # sequences of each prompt, G
    distance: float = 2.0  # how far θ is from φ in the tables, along ∇J
    distances: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)  # and in the figure


def medians(problems, comparison, *args):
    return np.median([comparison(problem, *args) for problem in problems], axis=0)


def print_table(heads, rows):
    print(f"| {' | '.join(heads)} |\n|" + "---|" * len(heads))
    for row, numbers in rows.items():
        cells = ["" if math.isnan(x) else f"{x:z.2f}" for x in numbers]
        print(f"| {row} | {' | '.join(cells)} |")


def print_tables(problems, args):
    """Of θ at a distance from φ, and the one of advantages at φ."""
    print(f"KL(θ ‖ φ) of a sequence: {medians(problems, mean_kl, args.distance):.2f}")
    measures = ["bias", "standard deviation", "length", "angle", "tokens without gradient"]
    for name, methods in METHODS.items():
        distance, columns = (0.0, 4) if name == "advantage" else (args.distance, 5)
        rows = {
            row: medians(problems, compare, distance, *method, args.group)[:columns]
            for row, method in methods.items()
        }
        print_table([name, *measures[:columns]], rows)
    rows = {
        row: medians(problems, compare_kl, args.distance, *method) for row, method in KLS.items()
    }
    heads = ["mean", "standard deviation", "length", "angle", "length with ratio", "angle"]
    print_table(["estimator", *heads], rows)


STYLES = {  # the colors of the scripts, where one of them does it
    "no ratio": dict(color="C0"),
    "token": dict(color="C1"),
    "prefix": dict(color="C6"),
    "sequence": dict(color="C7"),
    "geometric mean": dict(color="C8"),
    "token, clipped to 0.8 and 1.2": dict(color="C3"),
    "token, clipped to 0.8 and 1.28": dict(color="C3", linestyle="--"),
    "token, capped at 1.2": dict(color="C5"),
    "token, capped at 2": dict(color="C5", linestyle="--"),
}


def draw(figure, problems, args):
    """Bias and deviation against the distance: of the ratios above, of cutting one below."""
    grid = figure.subplots(2, 2, sharex=True)
    panels = (grid[0], RATIOS), (grid[1], {"token": token} | CUTS)
    for (left, right), objectives in panels:
        for name, objective in objectives.items():
            method = objective, leave_one_out, args.group
            lines = [medians(problems, compare, x, *method) for x in args.distances]
            bias, deviation = np.array(lines).T[:2]
            left.plot(args.distances, bias, marker=".", label=name, **STYLES[name])
            right.plot(args.distances, deviation, marker=".", label=name, **STYLES[name])
        left.set_ylabel("bias, ‖E[ĝ] − ∇J(θ)‖")
        right.set_ylabel("standard deviation of ĝ")
    grid[0, 1].sharey(grid[1, 1])
    grid[0, 0].set_title("which ratio", fontsize=10)
    grid[1, 0].set_title("the ratio of the token, clipped or capped", fontsize=10)
    grid[0, 0].legend(frameon=False, loc="upper left")
    grid[1, 1].legend(frameon=False, loc="lower left")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    for axes in grid[1]:
        axes.set_xlabel("distance from φ to θ, in logits")


def main(args):
    if args.problems < 1 or args.group < 2 or not args.distances:
        fail("--problems must be at least 1, --group at least 2, and --distances not empty")
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        fail("plots need matplotlib: pip install matplotlib")
    plot.refuse_picture(args.output)
    problems = [Problem(seed) for seed in range(args.problems)]
    print_tables(problems, args)
    figure = pyplot.figure(figsize=(11, 8), layout="constrained")
    draw(figure, problems, args)
    figure.suptitle(f"∇J from {args.group} sequences of each prompt, in lengths of ∇J(φ)")
    plot.save(figure, args.output, dpi=130)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(parse(Args))
