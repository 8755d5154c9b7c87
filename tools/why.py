"""Figures and tables of docs/why_the_ratio.md.

Run: python -m tools.why

`update` draws the update.csv of the output folder, or that of docs/why if it has none; with
--measure it trains a while to measure it anew. The others take seconds. `reuse` and the last four
read what is in docs/results.
"""

import csv
import importlib
import math
import signal
import tempfile
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
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
from tools import evaluate, exact, fail, parse, plot
from tools.sweep import NO_FORCES

BLUE, ORANGE, GREEN, RED = "C0", "C1", "C2", "C3"
COLORS = {"vanilla_pg": BLUE, "is_pg": ORANGE, "trpo": GREEN, "ppo": RED}
TABLES = "published_ppo", "published_trpo", "solved", "table1"  # these have no figure
FIGURES = ("reuse", "update", "weights", "clip", "region", *TABLES)
FOLDER = "docs/why"  # with the figures of the page, and what they are drawn from


@dataclass
class Args:
    figures: Annotated[tuple[Literal[FIGURES], ...], tyro.conf.Positional] = FIGURES  # what to make
    output: str = FOLDER  # folder to write them in
    results: str = "docs/results"  # folder of the runs
    measure: bool = False  # for update: measure it anew


# One batch, K steps, over a whole training


REUSE = {  # environment: learning rates in the upper and the lower row, and ppo's there
    "CartPole-v1": [("0.003", "0.0005"), ("0.01", "0.01")],
    "HalfCheetah-v5": [("0.001", "0.0005"), ("0.003", "0.003")],
}


def reuse_lines(rate, ppo_rate):
    """{name in the figure: (label of the runs, style)}."""
    vanilla = f"vanilla_pg --policy-lr {rate} --policy-epochs"
    return {
        "log π, 1 step": (f"{vanilla} 1", dict(color=BLUE, linestyle="--")),
        "log π, 10 steps": (f"{vanilla} 10", dict(color=BLUE)),
        "ρ, 10 steps": (f"is_pg --policy-lr {rate}", dict(color=ORANGE)),
        "trpo": ("trpo", dict(color=GREEN)),
        "ppo": (f"ppo --policy-lr {ppo_rate}", dict(color=RED)),
    }


def reuse(pyplot, args):
    """Learning curves, and a table of what the runs end with."""
    column = "return_last100"
    runs = plot.read_runs([f"{args.results}/reuse"], column)
    figure, grid = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    print("| environment | learning rate | " + " | ".join(reuse_lines("", "")) + " |")
    print("|---|---|" + "---|" * 5)
    for panels, (env, rates) in zip(grid.T, REUSE.items()):
        for axes, (rate, ppo_rate) in zip(panels, rates):
            ends = []
            for name, (label, style) in reuse_lines(rate, ppo_rate).items():
                series = runs[env][label]
                if not series:
                    fail(f"no runs of {label} on {env}: python -m tools.sweep reuse makes them")
                plot.draw(axes, series, column, "ppo", label=name, **style)
                ends.append(plot.spread([rows[column][-1] for rows in series]))
            print(f"| {env} | {rate} | " + " | ".join(ends) + " |")
            axes.set_title(f"{env}, learning rate {rate}", fontsize=11)
            axes.set(xlabel="environment steps", ylabel=plot.LABELS[column])
            axes.xaxis.set_major_formatter(pyplot.matplotlib.ticker.EngFormatter(sep=""))
    grid[0, 0].legend(frameon=False)
    figure.suptitle("One batch of 2,048 transitions: one step, ten steps, and trpo and ppo")
    return figure


# One update, step by step, on one batch


UPDATE = {  # environment: iteration of ppo.py, learning rate of vanilla_pg and is_pg
    "CartPole-v1": (4, 3e-3),
    "HalfCheetah-v5": (50, 1e-3),
}
BATCHES, EPOCHS, EPISODES = 10, 10, 10
MEASURED = ["ratio_mean", "ratio_max", "ess", "path_ess", "kl", "surrogate", "return"]
TITLES = {
    "ratio_mean": "ratio, mean",
    "ratio_max": "ratio, largest",
    "ess": "effective sample size of ρ",
    "kl": "E[ KL(π_old ‖ π) ]",
    "surrogate": "surrogate, E[ ρ A ]",
    "gain": "return, less that of π_old",
}


class Caught(Exception):
    """A batch, and the policy that it is for."""


def catch(env_id, iteration, seed):
    """Train with ppo.py up to an iteration. Returns its policy, batch and args."""
    original = ppo.update_policy
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = {signum: signal.getsignal(signum) for signum in signals}
    count = 0

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
            raise KeyboardInterrupt  # main only returns if it was interrupted
    except Caught as caught:
        return caught.args
    finally:
        ppo.update_policy = original
        for signum, handler in handlers.items():  # instead of the script's
            signal.signal(signum, handler)


def effective_sample_size(weights):
    return weights.mean() ** 2 / weights.square().mean()


@torch.no_grad()
def look_at(policy, batch, args, seed):
    """What has become of the policy, in numbers. The returns are those of new episodes."""
    dist = policy(batch.obs)
    log_ratio = (dist.log_prob(batch.actions) - batch.old_log_probs).double()
    ratio = log_ratio.exp()
    in_double = batch._replace(advantages=batch.advantages.double())
    by_trajectory = is_pg.Args(weighting="trajectory")
    products, _ = is_pg.weighted_advantages(log_ratio, in_double, by_trajectory)
    envs = ppo.make_envs(args, EPISODES)
    playing = evaluate.Args("", seed=seed, max_steps=1000)
    returns, _, _ = evaluate.play(envs, policy, playing)
    measures = {
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "ess": effective_sample_size(ratio),
        "path_ess": effective_sample_size(products),
        "kl": kl_divergence(batch.old_dist, dist).mean(),
        "surrogate": (ratio * batch.advantages).mean(),
        "return": returns.mean(),
    }
    return {name: f"{number:.6g}" for name, number in measures.items()}


def measure_update(path):
    """Measure each script on each batch after each number of epochs, a row for each."""
    rows = []
    for env_id, (iteration, learning_rate) in UPDATE.items():
        settings = {  # options, most epochs
            "vanilla_pg": (dict(policy_lr=learning_rate), EPOCHS),
            "is_pg": (dict(policy_lr=learning_rate), EPOCHS),
            "trpo": ({}, 1),
            "ppo": ({}, EPOCHS),
        }
        for seed in range(1, BATCHES + 1):
            caught, batch, args = catch(env_id, iteration, seed)
            for script, (options, most_epochs) in settings.items():
                for epochs in range(most_epochs + 1):
                    policy = deepcopy(caught)
                    torch.manual_seed(seed)
                    step(script, policy, batch, epochs, options)
                    row = dict(env=env_id, seed=seed, script=script, epochs=epochs)
                    rows.append(row | look_at(policy, batch, args, seed))
            print(f"{env_id}: batch {seed} of {BATCHES}", flush=True)
            write_update(path, rows)


def write_update(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["env", "seed", "script", "epochs", *MEASURED])
        writer.writeheader()
        writer.writerows(rows)


def step(script, policy, batch, epochs, options):
    """The script's own update, with so many epochs and a new optimizer."""
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
    """{environment: {script: {measure: (batches, epochs + 1)}}}, with the gain in return."""
    groups = defaultdict(lambda: defaultdict(list))
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            groups[row["env"], row["script"]][row["seed"]].append(row)
    found = defaultdict(dict)
    for (env, script), by_seed in groups.items():
        series = {}
        for name in MEASURED:
            numbers = [[float(row[name]) for row in rows] for rows in by_seed.values()]
            series[name] = np.array(numbers)
        series["gain"] = series["return"] - series["return"][:, :1]
        found[env][script] = series
    return found


def measurements(args):
    """The file of the measurements: that of the output folder, or else the committed one."""
    own, committed = (Path(folder, "update.csv") for folder in (args.output, FOLDER))
    if args.measure:
        unfinished = own.with_suffix(".tmp")
        measure_update(unfinished)
        unfinished.replace(own)  # only now, so that an interrupted measurement changes nothing
    path = own if own.exists() else committed
    if not path.exists():
        fail(f"there is no {own}: --measure makes it")
    return path


def update(pyplot, args):
    """Medians and quartiles over the batches, and a table of the last epoch."""
    found = read_update(measurements(args))
    size = (20, 3.6 * len(found))
    figure, grid = pyplot.subplots(len(found), 6, figsize=size, layout="constrained")
    print("| environment | script | " + " | ".join(TITLES.values()) + " |")
    print("|---|---|" + "---|" * len(TITLES))
    for panels, (env, scripts) in zip(grid, found.items()):
        for script, series in scripts.items():
            for axes, name in zip(panels, TITLES):
                draw_measure(axes, script, series[name])
            ends = [f"{np.median(series[name][:, -1]):.3g}" for name in TITLES]
            print(f"| {env} | {script} | " + " | ".join(ends) + " |")
        for axes, (name, title) in zip(panels, TITLES.items()):
            axes.set(xlabel="epochs", title=title)
            axes.set_yscale("log" if name in ("ratio_max", "kl") else "linear")
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(env)
    grid[0, 0].legend(frameon=False)
    return figure


def draw_measure(axes, script, numbers):
    """Median and quartiles of numbers, (batches, epochs + 1)."""
    low, median, high = np.quantile(numbers, [0.25, 0.5, 0.75], axis=0)
    color = COLORS[script]
    if script == "trpo":  # takes a single step
        bars = [[median[1] - low[1]], [high[1] - median[1]]]
        axes.errorbar([1], median[1:], bars, fmt="D", color=color, label=script)
        axes.axhline(median[1], color=color, linestyle=":", linewidth=1)
    else:
        epochs = range(len(median))
        axes.plot(epochs, median, marker=".", color=color, label=script)
        axes.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)


# Weights of the whole path


def second_moments(start, old, new, moves, steps):
    """E[W_t²] under φ for t = 0, 1, …, (steps,): Σ over paths of φ-probability times Π ρ².

    The sum is a product of matrices. start: (S,), policies: (S, A), moves: (S, A, S).
    """
    squares = new**2 / old
    paths = start
    moments = []
    for _ in range(steps):
        moments.append(paths @ squares.sum(axis=1))
        paths = np.einsum("s,sa,sax->x", paths, squares, moves)
    return np.array(moments)


def path_weights(kls, steps):
    """1 / E[W_t²], (kls, steps), and 1 / E[ρ_t²], (kls,), in a random chain of 3 states.

    E[W_t] and E[ρ_t] are 1. The states are those of φ in the long run, and θ is at each KL.
    """
    from scipy.optimize import brentq

    rng = np.random.default_rng(0)
    moves = rng.dirichlet(np.ones(3), (3, 3))
    old = rng.dirichlet(np.full(3, 3.0), 3)
    direction = rng.normal(size=(3, 3))
    start = np.linalg.matrix_power(np.einsum("sa,sax->sx", old, moves), 1000)[0]

    def moved(distance):
        new = old * np.exp(distance * direction)
        return new / new.sum(axis=1, keepdims=True)

    def excess(distance, wanted):
        kl = start @ (old * np.log(old / moved(distance))).sum(axis=1)
        return kl - wanted

    news = [moved(brentq(excess, 0, 10, args=(kl,))) for kl in kls]
    path = np.array([second_moments(start, old, new, moves, steps) for new in news])
    return 1 / path, 1 / path[:, 0]  # the first step has one ratio


def weights(pyplot, args):
    kls = (0.001, 0.01, 0.1)
    steps = 1000
    path, single = path_weights(kls, steps)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    print("| E[ KL ] of a step | one ratio | 10 ratios | 100 | 1,000 |")
    print("|---|---|---|---|---|")
    for i, kl in enumerate(kls):
        (line,) = axes.plot(range(1, steps + 1), path[i], label=f"product, KL {kl:g}")
        style = dict(color=line.get_color(), linestyle="--")
        axes.axhline(single[i], label=f"one ratio, KL {kl:g}", **style)
        cells = [f"{x:.2g}" for x in (single[i], path[i, 9], path[i, 99], path[i, 999])]
        print(f"| {kl:g} | " + " | ".join(cells) + " |")
    axes.set(xscale="log", yscale="log", ylim=(1e-6, 1.5))
    axes.set(xlabel="ratios multiplied", ylabel="effective sample size, as a fraction")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


# The clip function


class Ratios(nn.Module):
    """π(1|s) = ρ_s π_old(1|s), where π_old(1|s) = 1/4, and the parameters are the ρ_s."""

    def __init__(self, ratios):
        super().__init__()
        self.ratios = nn.Parameter(ratios.clone())

    def forward(self, states):
        p = self.ratios[states] / 4
        return Categorical(torch.stack([1 - p, p], dim=-1))


def slopes(script, ratios, advantage):
    """∂/∂ρ of a script's objective for one transition, (B,), from its own update."""
    policy = Ratios(ratios)
    n = len(ratios)
    grid = torch.ones(n, 1, dtype=torch.bool)
    old_dist = Categorical(torch.tensor([[3 / 4, 1 / 4]]).double().expand(n, 2))
    actions = torch.ones(n, dtype=int)
    batch = ppo.Batch(
        obs=torch.arange(n),
        actions=actions,
        advantages=torch.full((n,), advantage).double(),
        returns=torch.zeros(n),  # no policy update takes notice of returns and values
        values=torch.zeros(n),
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
    """The objectives of one transition, and their slopes (Schulman et al. 2017, fig. 1)."""
    ratios = torch.linspace(0.05, 2, 1001).double()
    one = (ratios - 1).abs().argmin()
    size = (9, 6.5)
    figure, grid = pyplot.subplots(2, 2, figsize=size, sharex=True, layout="constrained")
    for (top, bottom), advantage in zip(grid.T, (1.0, -1.0)):
        for script, dash in ((vanilla_pg, "--"), (is_pg, "-"), (ppo, "-")):
            name = script.__name__
            style = dict(color=COLORS[name], linestyle=dash, label=name)
            if script is is_pg:  # which ppo would hide
                style.update(linewidth=4, alpha=0.4)
            slope = slopes(script, ratios, advantage)
            objective = torch.cumulative_trapezoid(slope, ratios)
            objective = torch.cat([objective.new_zeros(1), objective])
            offset = 0 if script is vanilla_pg else advantage  # log 1, or ρ A at ρ = 1
            top.plot(ratios, objective - objective[one] + offset, **style)
            bottom.plot(ratios, slope, **style)
        top.set(title=f"A = {advantage:+g}", ylim=(-3.2, 2.2))
        top.set_ylabel("objective of one transition")
        bottom.set(xlabel="ρ = π(a|s) / π_old(a|s)", ylim=(-3.2, 3.2))
        bottom.set_ylabel("its slope, ∂/∂ρ")
        for axes in (top, bottom):
            axes.axvspan(0.8, 1.2, color="0.93")
            axes.axvline(1, color="0.6", linewidth=0.8)
            axes.grid(alpha=0.3)
    grid[0, 0].legend(frameon=False)
    return figure


# The trust region


class Plane(nn.Module):
    """The logits of the old policy, plus a parameter times each of two directions."""

    def __init__(self, logits, directions):
        super().__init__()
        self.logits, self.directions = logits, directions  # (S+1, A), (2, S+1, A)
        self.place = nn.Parameter(torch.zeros(2).double())

    def probs(self):
        moved = torch.einsum("i,isa->sa", self.place, self.directions)
        return (self.logits + moved).softmax(1)

    def forward(self, states):
        return Categorical(self.probs()[states])


def plane(seed):
    """A problem (tools/exact.py), and a policy in two random directions from its old one."""
    problem = exact.Problem(seed, 1.0)
    rng = np.random.default_rng(10_000 + seed)
    directions = rng.normal(size=(2, exact.STATES + 1, exact.ACTIONS))
    directions[:, exact.END] = 0
    directions /= np.linalg.norm(directions.reshape(2, -1), axis=1)[:, None, None]
    logits = problem.old_policy().logits.detach()
    return problem, Plane(logits, torch.from_numpy(directions))


def batch_of(problem, policy):
    """All paths as often as the policy takes them, to a sixteenth; advantages not scaled."""
    with torch.no_grad():
        values = problem.action_values(policy.probs())[1].numpy()
        batch = problem.batch(values)
        paths = problem.paths()
        log_ratio = policy(batch.obs).log_prob(batch.actions) - batch.old_log_probs
        index = torch.from_numpy(paths.index[paths.valid])
        log_weight = log_ratio.new_zeros(index.max() + 1).index_add(0, index, log_ratio)
        sixteenths = (16 * log_weight.exp()).round().long()
        common = np.gcd.reduce(sixteenths.numpy())  # 16 at φ itself: each path is there once
        times = (sixteenths // common)[index]
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
    """At each place, (n, 2): J, what the surrogate promises, E[KL] in φ's states, (n,) each."""
    old = problem.old_policy().probs().detach()
    action_values, values = problem.action_values(old)
    advantages = action_values - values[..., None]
    promise = problem.expected_return(old)
    visits = problem.visits(old).clone()
    visits[:, exact.END] = 0
    moved = deepcopy(policy)
    rows = []
    with torch.no_grad():
        for place in places:
            moved.place.copy_(torch.as_tensor(place))
            probs = moved.probs()
            actual = problem.expected_return(probs)
            surrogate = promise + torch.einsum("ts,sa,tsa->", visits, probs, advantages)
            kls = (old * (old / probs).log()).sum(1)
            mean_kl = (visits @ kls).sum() / visits.sum()
            rows.append((actual.item(), surrogate.item(), mean_kl.item()))
    return np.array(rows).T


def walk(problem, policy, script, epochs=300):
    """Where a script goes by plain gradient steps on one batch of φ, (steps + 1, 2)."""
    batch = batch_of(problem, policy)
    walker = deepcopy(policy)
    places = [(0.0, 0.0)]

    def note_place(*_):
        places.append(tuple(walker.place.tolist()))

    optimizer = torch.optim.SGD(walker.parameters(), lr=1.0)
    optimizer.register_step_post_hook(note_place)
    args = script.Args(policy_epochs=epochs, max_grad_norm=math.inf)
    script.update_policy(walker, optimizer, batch, args)
    return np.array(places)


def walk_within(problem, policy, max_kl, updates=8):
    """Where trpo.py goes, with a batch of its own for each step, (updates + 1, 2)."""
    walker = deepcopy(policy)
    places = [(0.0, 0.0)]
    args = trpo.Args(max_kl=max_kl, cg_damping=0.0)
    for _ in range(updates):
        trpo.update_policy(walker, batch_of(problem, walker), args)
        places.append(tuple(walker.place.tolist()))
    return np.array(places)


def region(pyplot, args, seed=4838, max_kl=0.01):
    """J over the plane with the trust region, and J and its promise against the distance."""
    problem, policy = plane(seed)
    walks = {
        "is_pg": walk(problem, policy, is_pg),
        "vanilla_pg": walk(problem, policy, vanilla_pg),
        "ppo": walk(problem, policy, ppo),
        "trpo": walk_within(problem, policy, max_kl),
    }
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    shades = draw_landscape(left, problem, policy, max_kl)
    figure.colorbar(shades, ax=left, label="J(θ)")
    for name, places in walks.items():
        style = dict(
            color=COLORS[name],
            linestyle="--" if name == "vanilla_pg" else "-",
            marker="o" if name == "trpo" else "",
            markersize=3,
        )
        left.plot(*places.T, label=name, **style)
        actual, promise, kl = landscape(problem, policy, places)
        right.plot(kl[1:], actual[1:], label=f"{name}, J(θ)", **style)
        if name == "is_pg":
            right.plot(kl[1:], promise[1:], ":", color=ORANGE, label=f"{name}, promised")
        print(
            f"{name}: J from {actual[0]:.3f}, at best {actual.max():.3f}, "
            f"in the end {actual[-1]:.3f}; "
            f"the batch of φ promised {promise[-1]:.3f}; KL {kl[-1]:.3g}"
        )
    left.legend(frameon=True, loc="lower left")
    right.axvline(max_kl, color=GREEN, linewidth=1)
    right.set(xscale="log", xlabel="E[ KL(φ ‖ θ) ]", ylabel="J(θ), or what is promised")
    right.grid(alpha=0.3)
    right.legend(frameon=False)
    return figure


def draw_landscape(axes, problem, policy, max_kl):
    """J as shades, which it returns; lines of equal promise; the trust region's edge."""
    xs, ys = np.linspace(-2, 8, 101), np.linspace(-5, 2, 71)
    places = np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2)
    grid = landscape(problem, policy, places)
    returns, promised, kl = grid.reshape(3, len(ys), len(xs))
    shades = axes.contourf(xs, ys, returns, 25, cmap="Greys_r")
    dotted = dict(colors=ORANGE, linewidths=0.8, linestyles="dotted")
    axes.contour(xs, ys, promised, 12, **dotted)
    axes.contour(xs, ys, kl, [max_kl], colors=GREEN)
    axes.set(xlim=(xs[0], xs[-1]), ylim=(ys[0], ys[-1]), xlabel="θ₁", ylabel="θ₂")
    axes.set_title("shades: J(θ), dotted: what the batch of φ promises", fontsize=10)
    return shades


# Table 1 of the PPO paper


TABLE1 = {  # the paper's name: label of the runs here, average normalized score there
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
    """Mean of the last 100 episodes: 0 for a random policy, 1 for the best of all runs."""
    folders = [f"{args.results}/{name}" for name in ("benchmark", "table1")]
    tasks = plot.read_runs(folders[1:], "return_last100")
    both = plot.read_runs(folders, "return_last100")
    runs = {task: both[task] for task in tasks}  # the benchmark has more tasks
    random_runs = plot.read_runs([f"{args.results}/random"], "return_last100")
    _, scores = plot.scores_of(runs, random_runs, "return_last100")
    print("| algorithm | seeds | score (95 %) | in the paper |")
    print("|---|---|---|---|")
    for name, (label, there) in TABLE1.items():
        if label not in scores:
            fail(f"not all tasks have runs of {label}: python -m tools.sweep table1 makes them")
        ends = scores[label][..., -1:]
        (mean,), ((low,), (high,)) = plot.estimate(ends, plot.mean)
        interval = f" ({low:.2f} to {high:.2f})" if len(ends) > 1 else ""
        print(f"| {name} | {len(ends)} | {mean:.2f}{interval} | {there} |")


# What others report


ANT, HUMANOID = f"Ant-v5 {NO_FORCES}", f"Humanoid-v5 {NO_FORCES}"
PUBLISHED = {  # script: what others report of the algorithm, on other versions of the tasks
    "ppo": {
        "Tianshou": {
            ANT: "3,258 ± 1,079",
            "HalfCheetah-v5": "5,784 ± 1,244",
            "Hopper-v5": "2,609 ± 701",
            HUMANOID: "787 ± 194",
            "InvertedDoublePendulum-v5": "9,231 ± 270",
            "InvertedPendulum-v5": "1,000 ± 0",
            "Reacher-v5": "−4.1 ± 0.3",
            "Swimmer-v5": "67 ± 99",
            "Walker2d-v5": "3,589 ± 757",
        },
        "Zoo": {
            ANT: "1,327",
            "HalfCheetah-v5": "5,819",
            "Hopper-v5": "2,410",
            "Swimmer-v5": "282",
            "Walker2d-v5": "3,479",
        },
        "CleanRL": {
            "HalfCheetah-v5": "1,443 ± 46",
            "Hopper-v5": "2,383 ± 272",
            "Humanoid-v5": "716 ± 49",
            "InvertedPendulum-v5": "963 ± 22",
            "Walker2d-v5": "2,288 ± 572",
        },
        "SLM-Lab": {
            "Ant-v5": "2,515 (10M)",
            "HalfCheetah-v5": "5,852 (10M)",
            "Hopper-v5": "1,972 (4M)",
            "Humanoid-v5": "3,774 (10M)",
            "InvertedDoublePendulum-v5": "7,622 (10M)",
            "InvertedPendulum-v5": "945 (4M)",
            "Reacher-v5": "−5.1 (4M)",
            "Swimmer-v5": "229 (4M)",
            "Walker2d-v5": "4,042 (10M)",
        },
    },
    "trpo": {
        "Tianshou": {
            ANT: "2,867 ± 708",
            "HalfCheetah-v5": "4,471 ± 805",
            "Hopper-v5": "2,046 ± 1,038",
            HUMANOID: "810 ± 126",
            "InvertedDoublePendulum-v5": "8,435 ± 1,073",
            "InvertedPendulum-v5": "1,000 ± 0",
            "Reacher-v5": "−5.1 ± 0.8",
            "Swimmer-v5": "41 ± 20",
            "Walker2d-v5": "3,827 ± 783",
        },
        "sb3-contrib": {
            ANT: "3,554 ± 591",
            "HalfCheetah-v5": "1,803 ± 46",
            "Hopper-v5": "3,372 ± 215",
            "Swimmer-v5": "359 ± 2",
            "Walker2d-v5": "4,502 ± 234",
        },
        "Zoo": {
            ANT: "4,982",
            "HalfCheetah-v5": "1,785",
            "Hopper-v5": "3,618",
            "Swimmer-v5": "366",
            "Walker2d-v5": "4,933",
        },
    },
}


def published(script, pyplot, args):
    """What the runs of the benchmark end with, beside what others report of the algorithm."""
    folders = [f"{args.results}/{name}" for name in ("benchmark", "as_in_v3")]
    runs = plot.read_runs(folders, "return_last100")
    others = PUBLISHED[script]
    envs = {env for env in runs if "-v5" in env}.union(*others.values())
    heads = ["environment", f"`{script}.py`", "at its highest", "most likely actions"]
    if script == "trpo":
        heads.append("with the Zoo's options")
    heads += others
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for env in sorted(envs):
        series = runs.get(env, {}).get(script, [])
        cells = [env, trained(series), highest(series)]
        env_id, _, options = env.partition(" ")
        file = "evaluated_as_in_v3.csv" if options else "evaluated.csv"
        cells.append(evaluated(f"{args.results}/{file}", script, env_id))
        if script == "trpo":
            cells.append(evaluated(f"{args.results}/evaluated_zoo.csv", script, env))
        cells += [reports.get(env, "") for reports in others.values()]
        print("| " + " | ".join(cells) + " |")


def trained(series):
    """What runs end with."""
    return mean_and_deviation([rows["return_last100"][-1] for rows in series])


def highest(series):
    """What runs have come to at the step at which their mean is highest."""
    if not series:
        return ""
    _, curves = plot.interpolate(series, "return_last100", hold=True)
    step = np.nanargmax(curves.mean(axis=0))
    return mean_and_deviation(curves[:, step].tolist())


def evaluated(path, script, env):
    """What the most likely actions come to after training. The last row of a seed counts."""
    returns = {}
    for row in read_rows(path):
        if (row["script"], row["env_id"], row["actions"]) == (script, env, "mode"):
            returns[row["seed"]] = float(row["return_mean"])
    return mean_and_deviation(list(returns.values()))


def read_rows(path):
    if not Path(path).exists():
        fail(f"there is no {path}: docs/results/README.md has the commands that make it")
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def mean_and_deviation(returns):
    """Over seeds, and their number; of one run no deviation, and empty if there are none."""
    if not returns:
        return ""
    decimals = 0 if abs(np.mean(returns)) >= 10 else 1
    known = [np.mean(returns)]
    if len(returns) > 1:
        known.append(np.std(returns))
    numbers = (f"{x:,.{decimals}f}" for x in known)
    return f"{' ± '.join(numbers)} ({len(returns)})".replace("-", "−")


# Options that solve what the defaults do not


SOLVED = {  # command of the sweep `solved`: environment, return to reach, why the options help
    "python ppo.py --env-id CliffWalking-v1 --total-steps 500000 --entropy-coef 0.05": (
        "CliffWalking-v1",
        "−20",
        "The bonus keeps the policy exploring until it has found the goal.",
    ),
    "python trpo.py --env-id LunarLander-v3 --total-steps 1000000": (
        "LunarLander-v3",
        "200",
        "It learns to hover first, and to land only later.",
    ),
    "python ppo.py --env-id LunarLanderContinuous-v3 --total-steps 1000000 --gae-lambda 0.98": (
        "LunarLanderContinuous-v3",
        "200",
        "The reward for landing comes late, and a larger λ lets more of it reach early actions.",
    ),
    "python vanilla_pg.py --env-id Pendulum-v1 --total-steps 1000000 --policy-lr 2e-3"
    " --num-steps 64": (
        "Pendulum-v1",
        "−200",
        "It learns slowly, and smaller steps on larger batches keep what it has learned.",
    ),
    "python is_pg.py --env-id Pendulum-v1 --total-steps 1000000 --policy-lr 1e-3": (
        "Pendulum-v1",
        "−200",
        "It learns slowly, and a smaller learning rate keeps it from losing what it has learned.",
    ),
    "python trpo.py --env-id Swimmer-v5 --total-steps 1000000 --gamma 0.9999 --gae-lambda 0.99": (
        "Swimmer-v5",
        "300",
        "A stroke of the whole body pays only after many steps, and a larger λ looks that far.",
    ),
}


def solved(pyplot, args):
    """The returns of the defaults, and those of the commands in SOLVED."""
    folders = [f"{args.results}/{name}" for name in ("benchmark", "others")]
    defaults = plot.read_runs(folders, "return_last100")
    print("| command | return to reach | at the defaults | with this command | why |")
    print("|---" * 5 + "|")
    rows = read_rows(f"{args.results}/solved/runs.csv")
    for command, (env, bar, reason) in SOLVED.items():
        of_this = [row for row in rows if row["command"].startswith(f"{command} --seed ")]
        returns = [float(row["return_last100"] or "nan") for row in of_this]
        script = command.split()[1].removesuffix(".py")
        runs = defaults.get(env, {}).get(script, [])
        before = [run["return_last100"][-1] for run in runs]
        cells = [f"`{command}`", bar, plot.spread(before), plot.spread(returns), reason]
        print(f"| {' | '.join(cells)} |")


MAKERS = dict(
    reuse=reuse,
    update=update,
    weights=weights,
    clip=clip,
    region=region,
    table1=table1,
    published_ppo=partial(published, "ppo"),
    published_trpo=partial(published, "trpo"),
    solved=solved,
)


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make the folder {path}: {error.strerror}")


def main(args):
    pyplot = plot.import_pyplot()
    make_folder(args.output)
    for name in args.figures:
        print(f"{name}:")
        figure = MAKERS[name](pyplot, args)
        if figure is not None:
            plot.save(figure, f"{args.output}/{name}.png", dpi=130)
            pyplot.close(figure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(parse(Args))
