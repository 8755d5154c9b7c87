"""Figures and tables of docs/why_the_ratio.md.

Run: python -m tools.why

`update` trains a while first, and leaves what it measures in docs/why/update.csv.
The others take seconds. `reuse` and `table1` read the runs that tools/sweep.py has left in docs/results.
"""

import csv
import importlib
import math
import signal
import tempfile
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import nn
from torch.distributions import Categorical, kl_divergence

import is_pg
import ppo
import trpo
import vanilla_pg
from tools import evaluate, exact, fail, plot

BLUE, ORANGE, GREEN, RED = "C0", "C1", "C2", "C3"
COLORS = {"vanilla_pg": BLUE, "is_pg": ORANGE, "trpo": GREEN, "ppo": RED}
FIGURES = "reuse", "update", "weights", "clip", "region", "published", "table1"


@dataclass
class Args:
    figures: Annotated[tuple[Literal[FIGURES], ...], tyro.conf.Positional] = FIGURES  # which
    output: str = "docs/why"  # folder to write them in
    results: str = "docs/results"  # folder of the runs
    measure: bool = False  # for update: measure it anew


# One batch, K steps, over a whole training


REUSE = {  # environment: small and large step size of Adam
    "CartPole-v1": ("0.003", "0.01"),
    "HalfCheetah-v5": ("0.001", "0.003"),
}


def reuse_lines(sizes, i):
    """{name in the figure: (name of the runs, style)} of the i-th row."""
    vanilla, size = "vanilla_pg --policy-lr {} --policy-epochs {}", sizes[i]
    return {
        "log π, 1 step": (vanilla.format(size, 1), dict(color=BLUE, dash="--")),
        "log π, 10 steps": (vanilla.format(size, 10), dict(color=BLUE)),
        "ρ, 10 steps": (f"is_pg --policy-lr {size}", dict(color=ORANGE)),
        "trpo": ("trpo", dict(color=GREEN)),
        "ppo": (f"ppo --policy-lr {(0.0005, size)[i]}", dict(color=RED)),
    }


def reuse(pyplot, args):
    """Learning curves, and a table of what the runs end with."""
    runs = plot.read_runs([f"{args.results}/reuse"], "return_last100")
    figure, grid = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    print("| environment | step size | " + " | ".join(reuse_lines(("", ""), 0)) + " |")
    print("|---|---|" + "---|" * 5)
    for axes, (env, sizes) in zip(grid.T, REUSE.items()):
        for i, size in enumerate(sizes):
            cells = []
            for name, (label, style) in reuse_lines(sizes, i).items():
                if not (series := runs[env][label]):
                    fail(f"no runs of {label} on {env}: python -m tools.sweep reuse makes them")
                plot.draw(axes[i], series, "return_last100", "ppo", **style | dict(label=name))
                cells.append(plot.spread([rows["return_last100"][-1] for rows in series]))
            print(f"| {env} | {size} | " + " | ".join(cells) + " |")
            axes[i].set_title(f"{env}, step size {size}", fontsize=11)
            axes[i].set(xlabel="environment steps", ylabel=plot.LABELS["return_last100"])
            axes[i].xaxis.set_major_formatter(pyplot.matplotlib.ticker.EngFormatter(sep=""))
    grid[0, 0].legend(frameon=False)
    title = "One batch of 2,048 transitions: one step, ten steps, and trpo and ppo"
    figure.suptitle(title)
    return figure


# One update, step by step, on one batch


UPDATE = {  # environment: iteration of ppo.py whose batch it is, step size of vanilla_pg and is_pg
    "CartPole-v1": (4, 3e-3),
    "HalfCheetah-v5": (50, 1e-3),
}
BATCHES, EPOCHS, EPISODES = 10, 10, 10
MEASURED = ["ratio_mean", "ratio_max", "ess", "path_ess", "kl", "surrogate", "return"]


class Caught(Exception):
    """A batch, and the policy that it is for."""


def catch(env_id, iteration, seed):
    """Train with ppo.py up to an iteration. Returns its policy, batch and args."""
    original, count = ppo.update_policy, 0
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def update_policy(policy, optimizer, batch, args):
        nonlocal count
        count += 1
        if count == iteration:
            raise Caught(policy, batch, args)
        return original(policy, optimizer, batch, args)

    ppo.update_policy = update_policy
    try:
        with tempfile.TemporaryDirectory() as folder:
            options = dict(total_steps=10**6, run_dir=f"{folder}/run", seed=seed)
            ppo.main(ppo.Args(env_id=env_id, **options))
            raise KeyboardInterrupt  # or it would not have come to its end
    except Caught as caught:
        return caught.args
    finally:
        ppo.update_policy = original
        for signum, handler in handlers.items():  # not the script's any longer
            signal.signal(signum, handler)


@torch.no_grad()
def look_at(policy, batch, args, seed):
    """What has become of the policy, in numbers. The returns are those of fresh episodes."""
    dist = policy(batch.obs)
    log_ratio = (dist.log_prob(batch.actions) - batch.old_log_probs).double()
    in_double = batch._replace(advantages=batch.advantages.double())
    paths, _ = is_pg.weighted_advantages(log_ratio, in_double, is_pg.Args(weighting="trajectory"))
    ratio, ess = log_ratio.exp(), lambda w: (w.mean() ** 2 / w.square().mean()).item()
    envs = ppo.make_envs(args, EPISODES)
    returns, _, _ = evaluate.play(envs, policy, evaluate.Args("", seed=seed, max_steps=1000))
    kl = kl_divergence(batch.old_dist, dist).mean().item()
    surrogate = (ratio * batch.advantages).mean()
    numbers = ratio.mean(), ratio.max(), ess(ratio), ess(paths), kl, surrogate, returns.mean()
    return {name: f"{number:.6g}" for name, number in zip(MEASURED, numbers)}


def measure_update(path):
    """For each batch and script: after each number of epochs, the measures. A row each."""
    rows = []
    for env_id, (iteration, step_size) in UPDATE.items():
        settings = {
            "vanilla_pg": dict(policy_lr=step_size),
            "is_pg": dict(policy_lr=step_size),
            "trpo": {},
            "ppo": {},
        }
        for seed in range(1, BATCHES + 1):
            caught, batch, args = catch(env_id, iteration, seed)
            for script, options in settings.items():
                for epochs in range(EPOCHS + 1) if script != "trpo" else (0, 1):
                    policy = deepcopy(caught)
                    torch.manual_seed(seed)
                    step(script, policy, batch, epochs, options)
                    row = dict(env=env_id, seed=seed, script=script, epochs=epochs)
                    rows.append(row | look_at(policy, batch, args, seed))
            print(f"{env_id}: batch {seed} of {BATCHES}", flush=True)
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, ["env", "seed", "script", "epochs", *MEASURED])
                writer.writeheader()
                writer.writerows(rows)


def step(script, policy, batch, epochs, options):
    """The script's own update, with so many epochs and an optimizer that has no past."""
    if epochs == 0:
        return
    module = importlib.import_module(script)
    if script == "trpo":
        trpo.update_policy(policy, batch, trpo.Args(**options))
    else:
        args = module.Args(policy_epochs=epochs, **options)
        optimizer = torch.optim.Adam(policy.parameters(), args.policy_lr, eps=1e-5)
        module.update_policy(policy, optimizer, batch, args)


def read_update(path):
    """{environment: {script: {measure: (batches, epochs + 1)}}}, and how the return has changed."""
    found = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            series = found.setdefault(row["env"], {}).setdefault(row["script"], {})
            for name in MEASURED:
                series.setdefault(name, {}).setdefault(row["seed"], []).append(float(row[name]))
    for scripts in found.values():
        for series in scripts.values():
            series |= {name: np.array([*by_seed.values()]) for name, by_seed in series.items()}
            series["gain"] = series["return"] - series["return"][:, :1]
    return found


def update(pyplot, args):
    """Medians and quartiles over the batches, and a table of the last epoch."""
    path = Path(args.output, "update.csv")
    if args.measure or not path.exists():
        measure_update(path)
    found = read_update(path)
    titles = {
        "ratio_mean": "ratio, mean",
        "ratio_max": "ratio, largest",
        "ess": "effective sample size of ρ",
        "kl": "E[ KL(π_old ‖ π) ]",
        "surrogate": "surrogate, E[ ρ A ]",
        "gain": "return, less that of π_old",
    }
    figure, grid = pyplot.subplots(
        len(found), 6, figsize=(20, 3.6 * len(found)), layout="constrained"
    )
    print("| environment | script | " + " | ".join([*titles.values()]) + " |")
    print("|---|---|" + "---|" * len(titles))
    for line, (env, scripts) in zip(grid, found.items()):
        for script, series in scripts.items():
            for axes, (name, title) in zip(line, titles.items()):
                low, middle, high = np.quantile(series[name], [0.25, 0.5, 0.75], axis=0)
                color = COLORS[script]
                if script == "trpo":  # one step, and no more
                    bars = [[middle[1] - low[1]], [high[1] - middle[1]]]
                    axes.errorbar([1], middle[1:], bars, fmt="D", color=color, label=script)
                    axes.axhline(middle[1], color=color, linestyle=":", linewidth=1)
                else:
                    axes.plot(range(len(middle)), middle, marker=".", color=color, label=script)
                    axes.fill_between(range(len(middle)), low, high, color=color, alpha=0.2, lw=0)
                axes.set(xlabel="epochs", title=title)
                axes.set_yscale("log" if name in ("ratio_max", "kl") else "linear")
                axes.grid(alpha=0.3)
            ends = [f"{np.median(series[name][:, -1]):.3g}" for name in titles]
            print(f"| {env} | {script} | " + " | ".join(ends) + " |")
        line[0].set_ylabel(env)
    grid[0, 0].legend(frameon=False)
    return figure


# Weights of the whole path


def second_moments(start, old, new, moves, steps):
    """E[W_t²] under φ for t = 0, 1, …, (steps,). start: (S,), policies: (S, A), moves: (S, A, S).

    Σ over paths of their φ-probability times Π ρ², as a product of matrices.
    """
    squares, moments, paths = new**2 / old, [], start
    for _ in range(steps):
        moments.append(paths @ squares.sum(axis=1))
        paths = np.einsum("s,sa,sax->x", paths, squares, moves)
    return np.array(moments)


def path_weights(kls, steps):
    """1 / E[W_t²], (kls, steps), and 1 / E[ρ_t²], (kls,), in a random chain of 3 states.

    E[W_t] and E[ρ_t] are 1. φ is in its states as in the long run; θ has moved to each KL.
    """
    from scipy.optimize import brentq

    rng = np.random.default_rng(0)
    moves = rng.dirichlet(np.ones(3), (3, 3))
    old, direction = rng.dirichlet(np.full(3, 3.0), 3), rng.normal(size=(3, 3))
    start = np.linalg.matrix_power(np.einsum("sa,sax->sx", old, moves), 1000)[0]

    def moved(distance):
        new = old * np.exp(distance * direction)
        return new / new.sum(axis=1, keepdims=True)

    def kl(distance):
        return start @ (old * np.log(old / moved(distance))).sum(axis=1)

    news = [moved(brentq(lambda x, wanted=wanted: kl(x) - wanted, 0, 10)) for wanted in kls]
    path = np.array([second_moments(start, old, new, moves, steps) for new in news])
    return 1 / path, 1 / path[:, 0]  # the first step has one ratio


def weights(pyplot, args):
    kls, steps = (0.001, 0.01, 0.1), 1000
    path, single = path_weights(kls, steps)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    print("| E[ KL ] of a step | one ratio | 10 ratios | 100 | 1,000 |\n|---|---|---|---|---|")
    for i, kl in enumerate(kls):
        (line,) = axes.plot(range(1, steps + 1), path[i], label=f"product, KL {kl:g}")
        axes.axhline(
            single[i], color=line.get_color(), linestyle="--", label=f"one ratio, KL {kl:g}"
        )
        cells = [f"{x:.2g}" for x in (single[i], path[i, 9], path[i, 99], path[i, 999])]
        print(f"| {kl:g} | " + " | ".join(cells) + " |")
    axes.set(xscale="log", yscale="log", ylim=(1e-6, 1.5), xlabel="ratios multiplied")
    axes.set(ylabel="effective sample size, as a fraction")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


# The clip function


class Ratios(nn.Module):
    """π(1|s) = ρ_s π_old(1|s), and the parameters are the ratios themselves. π_old(1|s) = 1/4."""

    def __init__(self, ratios):
        super().__init__()
        self.ratios = nn.Parameter(ratios.clone())

    def forward(self, states):
        p = self.ratios[states] / 4
        return Categorical(torch.stack([1 - p, p], dim=-1))


def slopes(script, ratios, advantage):
    """∂/∂ρ of a script's objective for one transition, (B,), from its own update."""
    policy, n = Ratios(ratios), len(ratios)
    grid = torch.ones(n, 1, dtype=torch.bool)
    old_dist = Categorical(torch.tensor([[3 / 4, 1 / 4]]).double().expand(n, 2))
    actions = torch.ones(n, dtype=int)
    batch = ppo.Batch(
        obs=torch.arange(n),
        actions=actions,
        advantages=torch.full((n,), advantage).double(),
        returns=None,
        values=None,
        old_dist=old_dist,
        old_log_probs=old_dist.log_prob(actions),
        valid=grid,
        done=grid,
        fewest=1,  # so that all of it is one minibatch
    )
    options = dict(policy_epochs=1, max_grad_norm=math.inf)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    script.update_policy(policy, optimizer, batch, script.Args(**options))
    return (policy.ratios.detach() - ratios) * n  # the objective is a mean


def clip(pyplot, args):
    """The objectives of one transition, and their slopes (Schulman et al. 2017, figure 1)."""
    ratios = torch.linspace(0.05, 2, 1001).double()
    figure, grid = pyplot.subplots(2, 2, figsize=(9, 6.5), sharex=True, layout="constrained")
    one = (ratios - 1).abs().argmin()
    for (top, bottom), advantage in zip(grid.T, (1.0, -1.0)):
        for script, dash in ((vanilla_pg, "--"), (is_pg, "-"), (ppo, "-")):
            name = script.__name__
            slope = slopes(script, ratios, advantage)
            objective = torch.cumulative_trapezoid(slope, ratios)
            objective = torch.cat([objective.new_zeros(1), objective])
            offset = 0 if script is vanilla_pg else advantage  # log 1, or ρ A at ρ = 1
            style = dict(color=COLORS[name], linestyle=dash, label=name)
            style |= dict(linewidth=4, alpha=0.4) if script is is_pg else {}
            top.plot(ratios, objective - objective[one] + offset, **style)
            bottom.plot(ratios, slope, **style)
        top.set(title=f"A = {advantage:+g}", ylabel="objective of one transition", ylim=(-3.2, 2.2))
        bottom.set(xlabel="ρ = π(a|s) / π_old(a|s)", ylabel="its slope, ∂/∂ρ", ylim=(-3.2, 3.2))
        for axes in (top, bottom):
            axes.axvspan(0.8, 1.2, color="0.93")
            axes.axvline(1, color="0.6", linewidth=0.8)
            axes.grid(alpha=0.3)
    grid[0, 0].legend(frameon=False)
    return figure


# The trust region


class Plane(nn.Module):
    """Two parameters: logits of the old policy, and so much of each of two directions."""

    def __init__(self, logits, directions):
        super().__init__()
        self.logits, self.directions = logits, directions  # (S+1, A), (2, S+1, A)
        self.place = nn.Parameter(torch.zeros(2).double())

    def probs(self):
        return (self.logits + torch.einsum("i,isa->sa", self.place, self.directions)).softmax(1)

    def forward(self, states):
        return Categorical(self.probs()[states])


def plane(seed):
    """A problem (tools/exact.py), and a policy with two random directions for its logits."""
    problem = exact.Problem(seed, 1.0)
    rng = np.random.default_rng(10_000 + seed)
    directions = rng.normal(size=(2, exact.STATES + 1, exact.ACTIONS))
    directions[:, exact.END] = 0
    directions /= np.linalg.norm(directions.reshape(2, -1), axis=1)[:, None, None]
    return problem, Plane(problem.old_policy().logits.detach(), torch.from_numpy(directions))


def batch_of(problem, policy):
    """All paths as often as the policy takes them, to a sixteenth; advantages as they are."""
    with torch.no_grad():
        values = problem.action_values(policy.probs())[1].numpy()
        batch, paths = problem.batch(values), problem.paths()
        log_ratio = policy(batch.obs).log_prob(batch.actions) - batch.old_log_probs
        index = torch.from_numpy(paths.index[paths.valid])
        weight = log_ratio.new_zeros(index.max() + 1).index_add(0, index, log_ratio).exp()
        times = (16 * weight).round().long()
        times = (times // np.gcd.reduce(times.numpy()))[index]  # at φ itself each path once
        obs = batch.obs.repeat_interleave(times, 0)
        actions = batch.actions.repeat_interleave(times, 0)
        old_dist = policy(obs)
    return batch._replace(
        obs=obs,
        actions=actions,
        advantages=batch.advantages.repeat_interleave(times, 0),
        old_dist=old_dist,
        old_log_probs=old_dist.log_prob(actions),
    )


def landscape(problem, policy, places):
    """At each place, (n, 2): J, what the surrogate promises, and E[KL] in the states of φ, (n,)."""
    old = problem.old_policy().probs().detach()
    values, promise = problem.action_values(old), problem.expected_return(old)
    visits = problem.visits(old).clone()
    visits[:, exact.END] = 0
    advantages = values[0] - values[1][..., None]
    rows, policy = [], deepcopy(policy)
    with torch.no_grad():
        for place in places:
            policy.place.copy_(torch.as_tensor(place))
            probs = policy.probs()
            surrogate = promise + torch.einsum("ts,sa,tsa->", visits, probs, advantages)
            kl = (old * (old / probs).log()).sum(1)
            kl = (visits @ kl).sum() / visits.sum()
            rows.append((problem.expected_return(probs).item(), surrogate.item(), kl.item()))
    return np.array(rows).T


def walk(problem, policy, script, epochs=300):
    """Where a script goes by plain gradient steps on the one batch of φ, (steps + 1, 2)."""
    batch, policy, places = batch_of(problem, policy), deepcopy(policy), [(0.0, 0.0)]
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    optimizer.register_step_post_hook(lambda *_: places.append(tuple(policy.place.tolist())))
    args = script.Args(policy_epochs=epochs, max_grad_norm=math.inf)
    script.update_policy(policy, optimizer, batch, args)
    return np.array(places)


def walk_within(problem, policy, max_kl, updates=8):
    """Where trpo.py goes, with a batch of its own for each step, (updates + 1, 2)."""
    policy, places = deepcopy(policy), [(0.0, 0.0)]
    for _ in range(updates):
        batch = batch_of(problem, policy)
        trpo.update_policy(policy, batch, trpo.Args(max_kl=max_kl, cg_damping=0.0))
        places.append(tuple(policy.place.tolist()))
    return np.array(places)


def region(pyplot, args, seed=4838, max_kl=0.01):
    """J over the plane with the trust region, and J and its promise against the distance."""
    problem, policy = plane(seed)
    walks = {script.__name__: walk(problem, policy, script) for script in (is_pg, vanilla_pg, ppo)}
    walks["trpo"] = walk_within(problem, policy, max_kl)
    xs, ys = np.linspace(-2, 8, 101), np.linspace(-5, 2, 71)
    grid = landscape(problem, policy, np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2))
    returns, promised, kl = grid.reshape(3, len(ys), len(xs))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    shades = left.contourf(xs, ys, returns, 25, cmap="Greys_r")
    figure.colorbar(shades, ax=left, label="J(θ)")
    left.contour(xs, ys, promised, 12, colors=ORANGE, linewidths=0.8, linestyles="dotted")
    left.contour(xs, ys, kl, [max_kl], colors=GREEN)
    for name, places in walks.items():
        style = dict(color=COLORS[name], marker="o" if name == "trpo" else "", markersize=3)
        style["linestyle"] = "--" if name == "vanilla_pg" else "-"
        left.plot(*places.T, label=name, **style)
        actual, promise, distance = landscape(problem, policy, places)
        right.plot(distance[1:], actual[1:], label=f"{name}, J(θ)", **style)
        if name == "is_pg":
            right.plot(distance[1:], promise[1:], ":", color=ORANGE, label=f"{name}, promised")
        print(f"{name}: J from {actual[0]:.3f}, at best {actual.max():.3f}, in the end", end=" ")
        print(f"{actual[-1]:.3f}; the batch of φ promised {promise[-1]:.3f}; KL {distance[-1]:.3g}")
    left.set(xlim=(xs[0], xs[-1]), ylim=(ys[0], ys[-1]), xlabel="θ₁", ylabel="θ₂")
    left.set_title("shades: J(θ), dotted: what the batch of φ promises", fontsize=10)
    right.axvline(max_kl, color=GREEN, linewidth=1)
    right.set(xscale="log", xlabel="E[ KL(φ ‖ θ) ]", ylabel="J(θ), or what is promised")
    right.grid(alpha=0.3)
    left.legend(frameon=True, loc="lower left")
    right.legend(frameon=False)
    return figure


# Table 1 of the PPO paper


TABLE1 = {  # as the paper names it: name of the runs here, average normalized score there
    "no clipping or penalty, is_pg.py": ("is_pg", ""),
    "no clipping or penalty, ppo.py with ε = ∞": ("ppo --clip-eps inf", "−0.39"),
    "clipping, ε = 0.1": ("ppo --clip-eps 0.1", "0.76"),
    "clipping, ε = 0.2": ("ppo --clip-eps 0.2", "0.82"),
    "clipping, ε = 0.3": ("ppo --clip-eps 0.3", "0.70"),
    "KL constraint, δ = 0.003 (there a penalty)": ("trpo --max-kl 0.003", "0.68"),
    "KL constraint, δ = 0.005": ("trpo --max-kl 0.005", ""),
    "KL constraint, δ = 0.01 (there a penalty)": ("trpo --max-kl 0.01", "0.74"),
    "KL constraint, δ = 0.03 (there a penalty)": ("trpo --max-kl 0.03", "0.71"),
}


def table1(pyplot, args):
    """Mean of the last 100 episodes: 0 for a random policy, 1 for the best run of all."""
    folders = [f"{args.results}/{name}" for name in ("benchmark", "table1")]
    runs = plot.read_runs(folders, "return_last100")
    random_runs = plot.read_runs([f"{args.results}/random"], "return_last100")
    _, scores = plot.scores_of(runs, random_runs, "return_last100")
    print("| algorithm | seeds | score (95 %) | in the paper |\n|---|---|---|---|")
    for name, (label, there) in TABLE1.items():
        if label not in scores:
            fail(f"not all tasks have runs of {label}: python -m tools.sweep table1 makes them")
        (middle,), ((low,), (high,)) = plot.estimate(scores[label][..., -1:], plot.mean)
        interval = f" ({low:.2f} to {high:.2f})" if len(scores[label]) > 1 else ""
        print(f"| {name} | {len(scores[label])} | {middle:.2f}{interval} | {there} |")


# What others report


PUBLISHED = {  # after 1M steps: CleanRL's PPO (v4) and sb3-contrib's TRPO (v3)
    "HalfCheetah-v5": ("1,443 ± 46", "1,803 ± 46"),
    "Hopper-v5": ("2,383 ± 272", "3,372 ± 215"),
    "Walker2d-v5": ("2,288 ± 572", "4,502 ± 234"),
    "Swimmer-v5": ("", "359 ± 2"),
}


def published(pyplot, args):
    """What the runs of the benchmark end with, beside what others report of theirs.

    CleanRL's are returns in training, mean ± standard deviation over seeds; sb3-contrib's those of
    most likely actions in evaluations, mean ± standard error (RL Baselines3 Zoo, all_plots.py).
    """
    runs = plot.read_runs([f"{args.results}/benchmark"], "return_last100")
    heads = "environment", "`ppo.py`", "CleanRL PPO", "`trpo.py`", "most likely actions"
    heads += "with the Zoo's options", "sb3-contrib TRPO"
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for env, (cleanrl, sb3) in PUBLISHED.items():
        cells = []
        for script in ("ppo", "trpo"):
            ends = [rows["return_last100"][-1] for rows in runs[env][script]]
            cells.append(f"{np.mean(ends):,.0f} ± {np.std(ends):,.0f} ({len(ends)})")
        for name in ("evaluated", "evaluated_zoo"):
            with open(f"{args.results}/{name}.csv", newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["env_id"] == env]
            means = [float(row["return_mean"]) for row in rows]
            cells.append("")
            if means:
                error = np.std(means) / len(means) ** 0.5
                cells[-1] = f"{np.mean(means):,.0f} ± {error:,.0f} ({len(means)})"
        print("| " + " | ".join([env, cells[0], cleanrl, *cells[1:], sb3]) + " |")


MAKERS = dict(reuse=reuse, update=update, weights=weights, clip=clip, region=region)
MAKERS |= dict(table1=table1, published=published)


def main(args):
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        fail("figures need matplotlib: pip install matplotlib")
    Path(args.output).mkdir(parents=True, exist_ok=True)
    for name in args.figures:
        print(f"{name}:")
        if figure := MAKERS[name](pyplot, args):
            figure.savefig(f"{args.output}/{name}.png", dpi=130)
            pyplot.close(figure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Args))
