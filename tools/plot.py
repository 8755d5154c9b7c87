"""Learning curves of runs: a panel for each environment, a line for each script.

Lines are interquartile means over runs, bands their 95 % stratified bootstrap intervals
(Agarwal et al. 2021), both by rliable. Where the runs of a script differ in an option, the label
of the line names the option.

Run: python -m tools.plot runs --output curves.png --bar 475
"""

import io
import json
import math
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from tools import fail, parse, refuse_missing_folder

ORDER = ["vanilla_pg", "is_pg", "trpo", "ppo"]
LABELS = {"return_last100": "return, mean of the last 100 episodes"}
DASHES = ["-", "--", ":", "-."]  # of the lines of one script, in turn; then darker ones
RUN = {"run_dir", "resume", "checkpoint_interval", "device", "num_threads", "tensorboard"}
FREE = {"env_id", "env_kwargs", "seed", *RUN}  # runs that differ in these alone share a line
REPS = 4000  # bootstrap samples; with three runs, fewer make the band's edge flicker


@dataclass
class Args:
    run_dirs: Annotated[list[str], tyro.conf.Positional]  # runs, or folders with runs inside
    output: str = "curves.png"  # picture to write; empty for none
    column: str = "return_last100"  # column of metrics.csv to draw (episodes: all so far)
    bar: float = math.nan  # also print how many steps it takes to reach this return
    table: bool = False  # also print a Markdown table of the final returns
    profiles: str = ""  # also draw performance profiles over all environments here
    random: str = "docs/results/random"  # runs of a random policy, which scores 0


class Run(NamedTuple):
    folder: Path
    env: str  # its name, with its options if there are any
    script: str
    seed: Any
    options: dict[str, str]  # those that tell kinds of runs apart
    rows: np.ndarray  # those of metrics.csv that have a value in the column
    last_step: float


def read_runs(run_dirs, column):
    """{environment and options: {script and options: [rows, …]}} of all runs in the folders.

    rows: a structured array of the rows of metrics.csv that have a value in the column; there
    `episodes` counts all episodes so far. Runs with the same options and seed would say the
    same twice: only the longest of them counts.
    """
    folders = [folder_of(path) for path in run_dirs]
    paths = {path for folder in folders for path in folder.rglob("metrics.csv")}
    found = []
    for path in sorted(paths):
        if path.stat().st_size == 0:  # not one iteration is done
            continue
        run = read_run(path, column)
        if run is not None:
            found.append(run)
    return group_by_label(found)


def folder_of(path):
    """The folder itself, or the one that a metrics.csv is in."""
    path = Path(path)
    if path.is_dir() or not path.exists():
        return path
    if path.name != "metrics.csv":
        fail(f"{path} is neither a folder nor a metrics.csv: give the folder of a run")
    return path.parent


def read_run(path, column):
    """The run that has this metrics.csv, or None if the column has no value yet."""
    try:
        config = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
        script, options = str(config["script"]), config["args"]
        kwargs = options.get("env_kwargs", "{}")
        env = options["env_id"] + ("" if kwargs == "{}" else f" {kwargs}")
        rows = read_rows(path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        fail(f"{path.parent} is not a whole run ({type(error).__name__}): leave it out")
    for name in ("step", "episodes", column):
        if name not in rows.dtype.names:
            fail(f"{path} has no column {name}, only {', '.join(rows.dtype.names)}")
    rows["episodes"] = rows["episodes"].cumsum()
    known = ~np.isnan(rows[column])
    if not known.any():
        print(f"{path.parent} is left out: it has no value in {column}")
        return None
    kind = {key: str(x) for key, x in options.items() if key not in FREE}
    kind["workers"] = str(config.get("workers", 1))  # older runs don't name them
    seed = options.get("seed", path)
    return Run(path.parent, env, script, seed, kind, rows[known], rows["step"][-1])


def read_rows(path):
    """The rows of a metrics.csv. An empty cell is NaN."""
    with warnings.catch_warnings(action="ignore"):  # NumPy's, of a file of blank lines
        return np.genfromtxt(path, delimiter=",", names=True, ndmin=1, encoding="utf-8")


def add_unless_shorter(run, label, found):
    """Add a run. Of two with the same label and seed, the longer one stays."""
    key = label, run.seed
    other = found.get(key)
    if other is None:
        found[key] = run
        return
    longer, shorter = (run, other) if run.last_step > other.last_step else (other, run)
    found[key] = longer
    print(f"{shorter.folder} is left out: {longer.folder} has the same options and seed")


def group_by_label(found):
    """{environment: {label: [rows, …]}}; a label names the options in which runs differ."""
    groups = defaultdict(list)
    for run in found:
        groups[run.env, run.script].append(run)
    runs = defaultdict(lambda: defaultdict(list))
    for (env, _), group in groups.items():
        keys = options_that_differ(group)
        longest = {}
        for run in group:
            add_unless_shorter(run, label_of(run, keys), longest)
        for (label, _), run in longest.items():
            runs[env][label].append(run.rows)
    return runs


def label_of(run, keys):
    """The script and those of the options that the run has."""
    known = [key for key in keys if key in run.options]
    words = [f"--{key.replace('_', '-')} {run.options[key]}" for key in known]
    return " ".join([run.script, *words])


def options_that_differ(group):
    """Names of the options in which runs differ, as far as they have them: older runs lack some."""
    values = defaultdict(set)
    for run in group:
        for key, value in run.options.items():
            values[key].add(value)
    return [key for key in values if len(values[key]) > 1]


def spread(numbers):
    """The median of some numbers, and their range if there are several, in words."""
    if len(numbers) == 0:
        return ""
    quantiles = np.quantile(numbers, [0, 0.5, 1])
    low, median, high = (f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}" for x in quantiles)
    return f"{median} ({low} to {high})" if len(numbers) > 1 else median


def last(runs, column):
    """A sentence on what the runs end with."""
    steps = max(rows["step"][-1] for rows in runs)
    ends = spread([rows[column][-1] for rows in runs])
    return f"ends with {ends} at step {steps:,.0f} (runs: {len(runs)})"


def steps_to_reach(runs, column, bar):
    """A sentence on when runs first reach the bar, with at least 100 episodes done."""
    first = []
    for rows in runs:
        reached = (rows[column] >= bar) & (rows["episodes"] >= 100)
        if reached.any():
            first.append(rows["step"][reached][0])
    sentence = f"{len(first)} of {len(runs)} runs reach {bar:g}"
    if first:
        sentence += f", at step {spread(first)}"
    return sentence


def summary(runs, args):
    """A sentence on what the runs come to."""
    sentence = last(runs, args.column)
    if not math.isnan(args.bar):
        sentence += f"; {steps_to_reach(runs, args.column, args.bar)}"
    return sentence


def table(runs, column):
    """Median and range of what the runs end with: a row for each environment, in Markdown."""
    labels = sorted({label for labels in runs.values() for label in labels}, key=order)
    lines = [["environment", "steps", *(f"`{label}`" for label in labels)]]
    lines.append(["---"] * len(lines[0]))
    for env, series in runs.items():
        most_steps = max(rows["step"][-1] for group in series.values() for rows in group)
        line = [env, f"{about(most_steps):,.0f}"]
        for label in labels:
            ends = [rows[column][-1] for rows in series.get(label, [])]
            line.append(spread(ends))
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def about(steps):
    """Steps to the nearest 10,000; exactly if there are fewer than 100,000.

    A run goes on to the end of its last batch, so it has some more than it was told.
    """
    return round(steps, -4) if steps >= 100_000 else steps


def place(label):
    """The position of a line's script in the order of the scripts."""
    script = label.partition(" ")[0]
    return [*ORDER, script].index(script)


def order(label):
    return place(label), label


def styles(labels):
    """{label: color and dash}, in order. No two lines of a script look alike."""
    drawn = Counter()
    found = {}
    for label in sorted(labels, key=order):
        script = place(label)
        shade, dash = divmod(drawn[script], len(DASHES))
        found[label] = dict(color=darker(f"C{script}", shade), linestyle=DASHES[dash])
        drawn[script] += 1
    return found


def darker(color, times):
    """A color with 0.6 times its brightness, so many times."""
    from matplotlib.colors import to_rgb

    return tuple(0.6**times * x for x in to_rgb(color)) if times else color


def interpolate(runs, column, points=200, hold=False):
    """Steps, (T,), and the runs' values at them, (R, T).

    Values are NaN until all runs have one. After the end of a run they are NaN too, unless
    hold is set: then its last value stays.
    """
    begin = max(rows["step"][0] for rows in runs)
    end = max(rows["step"][-1] for rows in runs)
    grid = np.linspace(0, end, points)
    curves = []
    for rows in runs:
        # Runs of the same length differ by a few steps: no reason to leave one out at the end
        right = rows[column][-1] if hold or rows["step"][-1] > 0.98 * end else np.nan
        curves.append(np.interp(grid, rows["step"], rows[column], right=right))
    return grid, np.where(grid >= begin, curves, np.nan)


def interquartile_mean(scores):
    """rliable's aggregate_iqm at each step, (T,), of scores, (R, tasks, T)."""
    from scipy.stats import trim_mean

    return trim_mean(scores.reshape(-1, scores.shape[-1]), 0.25)


def mean(scores):
    """The mean at each step, (T,), of scores, (R, tasks, T)."""
    return scores.mean(axis=(0, 1))


def seeded_rliable():
    """The library of rliable; what it draws is the same each time."""
    from rliable import library

    np.random.seed(0)  # noqa: NPY002, rliable draws from this generator
    return library


def estimate(scores, statistic=interquartile_mean):
    """A statistic, (T,), and its interval, (2, T), of scores, (R, tasks, T)."""
    if len(scores) == 1:  # one run alone says nothing about the spread
        return statistic(scores), np.array([statistic(scores)] * 2)
    rliable = seeded_rliable()
    estimates, intervals = rliable.get_interval_estimates({0: scores}, statistic, reps=REPS)
    return estimates[0], intervals[0]


def draw(axes, runs, column, name, **style):
    """The interquartile mean at each step of the runs that got so far, and its interval."""
    grid, curves = interpolate(runs, column)
    middle = np.full(len(grid), np.nan)
    interval = np.full((2, len(grid)), np.nan)
    known = ~np.isnan(curves)
    for pattern in np.unique(known, axis=1).T:
        here = (known == pattern[:, None]).all(axis=0)
        if pattern.any():
            middle[here], interval[:, here] = estimate(curves[pattern][:, None, here])
    own_style = dict(color=f"C{place(name)}", label=f"{name} ({len(runs)})")
    draw_band(axes, grid, middle, interval, **own_style | style)


def draw_band(axes, x, middle, interval, **style):
    axes.plot(x, middle, **style)
    axes.fill_between(x, *interval, color=style["color"], alpha=0.2, linewidth=0)
    axes.grid(alpha=0.3)


def draw_curves(pyplot, runs, column):
    """A panel for each environment."""
    columns = min(len(runs), 4)
    rows = math.ceil(len(runs) / columns)
    figure = pyplot.figure(layout="constrained")
    figure.set_size_inches(5.5 * columns, 4 * rows)
    for number, (env, series) in enumerate(runs.items(), 1):
        axes = figure.add_subplot(rows, columns, number)
        draw_panel(axes, series, column)
        axes.set_title(env)
    return figure


def draw_panel(axes, series, column):
    """A line for each label."""
    from matplotlib.ticker import EngFormatter

    for label, style in styles(series).items():
        draw(axes, series[label], column, label, **style)
    axes.set_xlabel("environment steps")
    axes.set_ylabel(LABELS.get(column, column.replace("_", " ")))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(title="interquartile mean, 95 %", frameon=False, fontsize="small")


def scores_of(runs, random_runs, column, points=101):
    """{label: (R, environments, T)}: 0 for the random policy, 1 for the best end of any run.

    T goes from 0 to the end of training; a run that ends early keeps its last value. A script
    that lacks an environment is left out, and so are the runs of a script beyond the number that
    it has in every environment.
    """
    scales = scales_of(runs, random_runs, column)
    envs = list(scales)
    labels = {label for env in envs for label in runs[env]}
    scores = {}
    for label in sorted(labels, key=order):
        missing = [env for env in envs if label not in runs[env]]
        if missing:
            print(f"{label} is not in the profiles: it has no run of {', '.join(missing)}")
            continue
        counts = {len(runs[env][label]) for env in envs}
        count = min(counts)
        if len(counts) > 1:
            print(f"{label}: the profiles have its first {count} runs of each environment")
        scores[label] = np.empty((count, len(envs), points))
        for i, env in enumerate(envs):
            _, curves = interpolate(runs[env][label][:count], column, points, hold=True)
            low, best = scales[env]
            scores[label][:, i] = (curves - low) / (best - low)
    return envs, scores


def scales_of(runs, random_runs, column):
    """{environment: (return that scores 0, return that scores 1)}, where the second is larger."""
    scales = {}
    for env, series in runs.items():
        if env not in random_runs:
            continue
        low = np.mean(ends_of(random_runs[env], column))
        best = max(ends_of(series, column))
        if best > low:
            scales[env] = low, best
        else:
            print(f"{env} is left out: no run ends better than the random policy")
    return scales


def ends_of(series, column):
    """What all runs of an environment end with."""
    return [rows[column][-1] for group in series.values() for rows in group]


def draw_profiles(figure, scores):
    """Sample efficiency on the left, performance profiles on the right (Agarwal et al. 2021)."""
    left, right = figure.subplots(1, 2)
    lowest = min(0, *(each[..., -1].min() for each in scores.values()))
    levels = np.linspace(lowest, 1, 201)
    looks = styles(scores)
    for label, each in scores.items():
        style = looks[label] | dict(label=f"{label} ({each.shape[0]})")
        ends = each[..., -1]
        draw_sample_efficiency(left, each, style)
        draw_performance_profile(right, ends, levels, style)
        (middle,), ((low,), (high,)) = estimate(ends[..., None])
        interval = f"({low:z.2f} to {high:z.2f})"
        print(f"{label}: interquartile mean {middle:z.2f} {interval} at the end")
    left.set(xlabel="fraction of the training", ylabel="score, interquartile mean")
    right.set(xlabel="score τ", ylabel="fraction of runs that end with more than τ", ylim=(0, 1))
    left.legend(title="runs of each environment", frameon=False)


def draw_sample_efficiency(axes, scores, style):
    known = ~np.isnan(scores).any(axis=(0, 1))
    fraction = np.linspace(0, 1, scores.shape[-1])[known]
    draw_band(axes, fraction, *estimate(scores[..., known]), **style)


def draw_performance_profile(axes, ends, levels, style):
    rliable = seeded_rliable()
    above, intervals = rliable.create_performance_profile({0: ends}, levels, reps=REPS)
    draw_band(axes, levels, above[0], intervals[0], **style)


def save_profiles(pyplot, runs, args):
    """Write the picture of all environments together."""
    random_runs = read_runs([args.random], args.column)
    if not set(runs) & set(random_runs):
        fail(f"{args.random} has no run of these environments, for the score of 0")
    envs, scores = scores_of(runs, random_runs, args.column)
    if not envs:
        fail("no run ends better than the random policy: there is nothing to score")
    if not scores:
        fail(f"no script has runs of all of these: {', '.join(envs)}")
    print(f"scores of {', '.join(envs)}")
    figure = pyplot.figure(figsize=(11, 4.5), layout="constrained")
    draw_profiles(figure, scores)
    save(figure, args.profiles)


def save(figure, path, dpi=150):
    try:
        figure.savefig(path, dpi=dpi, format=format_of(path))
    except (OSError, ValueError) as error:
        fail(f"cannot write {path}: {error}")
    print(f"plot: {path}")


def format_of(path):
    """The ending of a picture's name; PNG if it has none."""
    return Path(path).suffix[1:] or "png"


def refuse_picture(path):
    """Exit, before any work, if a picture of this name cannot be written."""
    from matplotlib.figure import Figure

    refuse_missing_folder(path)
    trial = Figure(figsize=(1, 1))
    trial.text(0, 0, "λ")
    try:
        trial.savefig(io.BytesIO(), format=format_of(path))
    except Exception as error:  # of any type: each format has a library or program of its own
        fail(f"cannot write {path}: {error}")


def refuse_pictures(args):
    """Exit, before any work, if one of the pictures asked for cannot be written."""
    if args.output and args.output == args.profiles:
        fail("--output and --profiles name one picture: give two names")
    for picture in filter(None, [args.output, args.profiles]):
        refuse_picture(picture)


def import_pyplot():
    """matplotlib.pyplot, drawing without a screen; exits if it or rliable is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import rliable.library  # noqa: F401
        from matplotlib import pyplot
    except Exception as error:  # of any type: rliable's own imports fail with a new pandas
        name = type(error).__name__
        fail(f"plots need matplotlib and rliable ({name}): pip install -r requirements-dev.txt")
    return pyplot


def refuse_missing(folders):
    for folder in folders:
        if not Path(folder).exists():
            fail(f"there is no file or folder {folder}")


def main(args):
    pyplot = import_pyplot()
    pyplot.rcParams["text.parse_math"] = False  # a name with two $ is not a formula
    refuse_missing(args.run_dirs)
    refuse_pictures(args)
    runs = read_runs(args.run_dirs, args.column)
    if not runs:
        fail(f"no run with a finished episode in: {', '.join(args.run_dirs) or 'nothing given'}")
    for env, series in runs.items():
        for label in sorted(series, key=order):
            print(f"{env} {label}: {summary(series[label], args)}")
    if args.output:
        figure = draw_curves(pyplot, runs, args.column)
        save(figure, args.output)
        pyplot.close(figure)
    if args.table:
        print(table(runs, args.column))
    if args.profiles:
        save_profiles(pyplot, runs, args)


if __name__ == "__main__":
    main(parse(Args))
