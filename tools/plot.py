"""Learning curves of runs: a panel for each environment, a line for each script.

Lines are interquartile means over runs, bands their 95 % stratified bootstrap intervals (Agarwal et
al. 2021), both by rliable. Where the runs of a script differ in an option, its name has the option.

Run: python -m tools.plot runs --output curves.png --bar 475
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from tools import fail

ORDER = ["vanilla_pg", "is_pg", "trpo", "ppo"]
LABELS = {"return_last100": "return, mean of the last 100 episodes"}
FREE = {"env_id", "env_kwargs", "seed", "run_dir", "resume", "checkpoint_interval"}
FREE |= {"device", "num_threads", "tensorboard"}  # no names of their own
REPS = 4000  # of the bootstrap; with three runs fewer make the band's edge flicker


@dataclass
class Args:
    run_dirs: Annotated[list[str], tyro.conf.Positional]  # runs, or folders with runs inside
    output: str = "curves.png"  # picture to write, if not empty
    column: str = "return_last100"  # column of metrics.csv to draw
    bar: float = math.nan  # also print after how many steps, and 100 episodes, runs reach this
    table: bool = False  # also print what runs end with as a table, in Markdown
    profiles: str = ""  # also write this picture, of all environments together, by scores
    random: str = "docs/results/random"  # runs that score 0 in it; the best run scores 1


def read_runs(run_dirs, column):
    """{environment and options: {script and options: [rows, …]}} of all runs in the folders.

    rows: a structured array of the rows of metrics.csv that have a value in the column; in
    `episodes` the number of all episodes up to there. Of runs with the same options and seed, which
    would say the same twice, the longest counts.
    """
    found = {}
    paths = sorted({path for folder in run_dirs for path in Path(folder).rglob("metrics.csv")})
    for path in paths:
        if path.stat().st_size == 0:  # not one iteration is done
            continue
        try:
            config = json.loads(path.with_name("config.json").read_text())
            script, options = str(config["script"]), config["args"]
            kwargs = options.get("env_kwargs", "{}")  # a run of other options is of another kind
            env = options["env_id"] + (f" {kwargs}" if kwargs != "{}" else "")
            rows = np.genfromtxt(path, delimiter=",", names=True, ndmin=1)  # an empty cell is NaN
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            fail(f"{path.parent} is not a whole run ({type(error).__name__}): leave it out")
        if column not in rows.dtype.names:
            fail(f"{path} has no column {column}, only {', '.join(rows.dtype.names)}")
        rows["episodes"] = rows["episodes"].cumsum()
        if (known := ~np.isnan(rows[column])).any():
            seed = options.get("seed", path)
            options = {key: str(x) for key, x in options.items() if key not in FREE}
            options["workers"] = str(config.get("workers", 1))  # which old ones do not have
            key, run = (env, script, seed, *options.items()), (rows["step"][-1], path.parent)
            left_out = run
            if key not in found or run[0] > found[key][0][0]:
                left_out = found.get(key, [None])[0]
                found[key] = run, options, rows[known]
            if left_out:
                print(f"{left_out[1]} has options and seed of {found[key][0][1]}: left out")
    groups, runs = defaultdict(list), defaultdict(lambda: defaultdict(list))
    for (env, script, *_), (_, options, rows) in found.items():
        groups[env, script].append((options, rows))
    for (env, script), group in groups.items():
        keys = [key for key in group[0][0] if len({options.get(key) for options, _ in group}) > 1]
        for options, rows in group:
            words = (f" --{key.replace('_', '-')} {options.get(key)}" for key in keys)
            runs[env][script + "".join(words)].append(rows)
    return runs


def spread(numbers):
    """Median and range of some numbers, in words; a single one as it is."""
    quantiles = np.quantile(numbers, [0, 0.5, 1])
    low, middle, high = (f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}" for x in quantiles)
    return f"{middle} ({low} to {high})" if len(numbers) > 1 else middle


def last(runs, column):
    """A sentence on what the runs end with."""
    steps = max(rows["step"][-1] for rows in runs)
    ends = spread([rows[column][-1] for rows in runs])
    return f"ends with {ends} at step {steps:,.0f} (runs: {len(runs)})"


def steps_to_reach(runs, column, bar):
    """A sentence on when runs first reach the bar, with 100 episodes behind them."""
    reaching = [rows["step"][(rows[column] >= bar) & (rows["episodes"] >= 100)] for rows in runs]
    first = [steps[0] for steps in reaching if len(steps)]
    sentence = f"{len(first)} of {len(runs)} runs reach {bar:g}"
    if first:
        sentence += f", at step {spread(first)}"
    return sentence


def table(runs, column):
    """Median and range of what the runs end with: a row for each environment, in Markdown."""
    labels = sorted({label for labels in runs.values() for label in labels}, key=order)
    lines = [["environment", "steps", *(f"`{label}`" for label in labels)]]
    lines.append(["---"] * len(lines[0]))
    for env, series in runs.items():
        steps = round(max(rows["step"][-1] for group in series.values() for rows in group), -4)
        cells = [[rows[column][-1] for rows in series.get(label, [])] for label in labels]
        lines.append([env, f"{steps:,.0f}", *(spread(ends) if ends else "" for ends in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def place(label):
    """Where a line stands in the order of the scripts."""
    script = label.partition(" ")[0]
    return [*ORDER, script].index(script)


def order(label):
    return place(label), label


def interpolate(runs, column, points=200, hold=False):
    """Steps, (T,), and the runs' values, (R, T): NaN until all have one, and after a run's end.

    With hold the last value stands for what comes after it.
    """
    begin, end = (max(rows["step"][i] for rows in runs) for i in (0, -1))
    grid, curves = np.linspace(0, end, points), []
    for rows in runs:
        # Runs of the same length differ by a few steps: not a reason to leave one out at the end
        right = rows[column][-1] if hold or rows["step"][-1] > 0.98 * end else np.nan
        curves.append(np.interp(grid, rows["step"], rows[column], right=right))
    return grid, np.where(grid >= begin, curves, np.nan)


def interquartile_mean(scores):
    """Of (R, tasks, T) over runs and tasks, (T,): metrics.aggregate_iqm of rliable at each step."""
    from scipy.stats import trim_mean

    return trim_mean(scores.reshape(-1, scores.shape[-1]), 0.25)


def mean(scores):
    """Of (R, tasks, T), (T,)."""
    return scores.mean(axis=(0, 1))


def estimate(scores, statistic=interquartile_mean):
    """A statistic, (T,), and its interval, (2, T), of scores, (R, tasks, T)."""
    from rliable import library

    if len(scores) == 1:  # of one run nothing can be said
        return statistic(scores), np.array([statistic(scores)] * 2)
    np.random.seed(0)  # noqa: NPY002, it is rliable's source
    middle, interval = library.get_interval_estimates({0: scores}, statistic, reps=REPS)
    return middle[0], interval[0]


def draw(axes, runs, column, name, dash="-", **style):
    """The interquartile mean of the runs that have come so far, and its interval."""
    grid, curves = interpolate(runs, column)
    middle, interval = np.full(len(grid), np.nan), np.full((2, len(grid)), np.nan)
    known = ~np.isnan(curves)
    for pattern in np.unique(known, axis=1).T:
        here = (known == pattern[:, None]).all(axis=0)
        if pattern.any():
            middle[here], interval[:, here] = estimate(curves[pattern][:, None, here])
    style = dict(color=f"C{place(name)}", label=f"{name} ({len(runs)})") | style
    draw_band(axes, grid, middle, interval, linestyle=dash, **style)


def draw_band(axes, x, middle, interval, **style):
    axes.plot(x, middle, **style)
    axes.fill_between(x, *interval, color=style["color"], alpha=0.2, linewidth=0)
    axes.grid(alpha=0.3)


def scores_of(runs, random_runs, column, points=101):
    """{label: (R, environments, T)}: 0 for the random policy, 1 for the best end of any run.

    T: from 0 to the end of training, a run that NaN has ended as it was then. What not all
    environments have, scripts or runs, is left out.
    """
    envs = [env for env in runs if env in random_runs]
    labels = [label for label in runs[envs[0]] if all(label in runs[env] for env in envs)]
    scores = {}
    for label in sorted(labels, key=order):
        count = min(len(runs[env][label]) for env in envs)
        scores[label] = np.empty((count, len(envs), points))
        for i, env in enumerate(envs):
            chance = [rows[column][-1] for series in random_runs[env].values() for rows in series]
            best = max(rows[column][-1] for series in runs[env].values() for rows in series)
            _, curves = interpolate(runs[env][label][:count], column, points, hold=True)
            low = np.mean(chance)
            scores[label][:, i] = (curves - low) / (best - low)
    return envs, scores


def draw_profiles(figure, scores):
    """Sample efficiency on the left, performance profiles on the right (Agarwal et al. 2021)."""
    from rliable import library

    left, right = figure.subplots(1, 2)
    lowest = min(0, *(each[..., -1].min() for each in scores.values()))
    for label, each in scores.items():
        known = ~np.isnan(each).any(axis=(0, 1))
        style = dict(color=f"C{place(label)}", label=f"{label} ({each.shape[0]})")
        fraction = np.linspace(0, 1, each.shape[-1])[known]
        draw_band(left, fraction, *estimate(each[..., known]), **style)
        ends, levels = each[..., -1], np.linspace(lowest, 1, 201)
        np.random.seed(0)  # noqa: NPY002
        above, interval = library.create_performance_profile({0: ends}, levels, reps=REPS)
        draw_band(right, levels, above[0], interval[0], **style)
        middle, interval = estimate(ends[..., None])
        low, high = interval[:, 0]
        print(f"{label}: interquartile mean {middle[0]:.2f} ({low:.2f} to {high:.2f}) at the end")
    left.set(xlabel="fraction of the training", ylabel="score, interquartile mean")
    right.set(xlabel="score τ", ylabel="fraction of runs that end with more than τ", ylim=(0, 1))
    left.legend(title="runs of each environment", frameon=False)


def main(args):
    try:
        import matplotlib

        matplotlib.use("Agg")
        matplotlib.rcParams["text.parse_math"] = False  # a name with two $ is no formula
        import rliable.library  # noqa: F401
        from matplotlib import pyplot
    except Exception as error:  # of any type: rliable's own imports fail with a new pandas
        name = type(error).__name__
        fail(f"plots need matplotlib and rliable ({name}): pip install -r requirements-dev.txt")
    runs = read_runs(args.run_dirs, args.column)
    if not runs:
        fail(f"no run with a finished episode in: {', '.join(args.run_dirs) or 'nothing given'}")
    columns = min(len(runs), 4)
    figure = pyplot.figure(layout="constrained")
    figure.set_size_inches(5.5 * columns, 4 * math.ceil(len(runs) / columns))
    for number, (env, labels) in enumerate(runs.items(), 1):
        axes = figure.add_subplot(math.ceil(len(runs) / columns), columns, number)
        drawn = defaultdict(int)
        for label in sorted(labels, key=order):
            dash = ["-", "--", ":", "-."][drawn[place(label)] % 4]
            drawn[place(label)] += 1
            if args.output:
                draw(axes, labels[label], args.column, label, dash)
            sentences = [last(labels[label], args.column)]
            if not math.isnan(args.bar):
                sentences.append(steps_to_reach(labels[label], args.column, args.bar))
            print(f"{env} {label}: {'; '.join(sentences)}")
        axis = LABELS.get(args.column, args.column.replace("_", " "))
        axes.set(title=env, xlabel="environment steps", ylabel=axis)
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    if args.output:
        for axes in figure.axes:
            axes.legend(title="interquartile mean, 95 %", frameon=False, fontsize="small")
        figure.savefig(args.output, dpi=150)
        print(f"plot: {args.output}")
    pyplot.close(figure)
    if args.table:
        print(table(runs, args.column))
    if args.profiles:
        random_runs = read_runs([args.random], args.column)
        if not set(runs) & set(random_runs):
            fail(f"{args.random} has no run of these environments, for the score of 0")
        figure = pyplot.figure(figsize=(11, 4.5), layout="constrained")
        envs, scores = scores_of(runs, random_runs, args.column)
        if not scores:
            fail(f"no script has runs of all of these: {', '.join(envs)}")
        print(f"scores of {', '.join(envs)}")
        draw_profiles(figure, scores)
        figure.savefig(args.profiles, dpi=150)
        print(f"plot: {args.profiles}")


if __name__ == "__main__":
    main(tyro.cli(Args))
