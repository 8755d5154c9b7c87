"""Learning curves of runs: a panel for each environment, a line for each script.

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


@dataclass
class Args:
    run_dirs: Annotated[list[str], tyro.conf.Positional]  # runs, or folders with runs inside
    output: str = "curves.png"  # picture to write
    column: str = "return_last100"  # column of metrics.csv to draw
    bar: float = math.nan  # also print after how many steps, and 100 episodes, runs reach this


def read_runs(run_dirs, column):
    """{environment and its options: {script: [rows, …]}} of all runs in or below the folders.

    rows: a structured array of the rows of metrics.csv that have a value in the column; in
    `episodes` the number of all episodes up to there.
    """
    runs = defaultdict(lambda: defaultdict(list))
    paths = sorted({path for folder in run_dirs for path in Path(folder).rglob("metrics.csv")})
    for path in paths:
        if path.stat().st_size == 0:  # not one iteration is done
            continue
        try:
            config = json.loads(path.with_name("config.json").read_text())
            script, options = config["script"], config["args"]
            kwargs = options.get("env_kwargs", "{}")  # a run of other options is of another kind
            env = options["env_id"] + (f" {kwargs}" if kwargs != "{}" else "")
            rows = np.genfromtxt(path, delimiter=",", names=True, ndmin=1)  # an empty cell is NaN
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            fail(f"{path.parent} is not a whole run ({type(error).__name__}): leave it out")
        if column not in rows.dtype.names:
            fail(f"{path} has no column {column}, only {', '.join(rows.dtype.names)}")
        rows["episodes"] = rows["episodes"].cumsum()
        if (known := ~np.isnan(rows[column])).any():
            runs[env][script].append(rows[known])
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


def draw(axes, runs, column, script):
    """The mean over the runs, and the range from the lowest to the highest."""
    end = max(rows["step"][-1] for rows in runs)
    grid, curves = np.linspace(0, end, 400), []
    for rows in runs:
        # Runs of the same length differ by a few steps: not a reason to leave one out at the end
        right = rows[column][-1] if rows["step"][-1] > 0.98 * end else np.nan
        curves.append(np.interp(grid, rows["step"], rows[column], left=np.nan, right=right))
    curves = np.array(curves)
    some = ~np.isnan(curves).all(axis=0)
    grid, curves = grid[some], curves[:, some]
    color = f"C{[*ORDER, script].index(script)}"  # the same in every panel
    axes.plot(grid, np.nanmean(curves, axis=0), color=color, label=f"{script} ({len(runs)})")
    low, high = np.nanmin(curves, axis=0), np.nanmax(curves, axis=0)
    axes.fill_between(grid, low, high, color=color, alpha=0.2, linewidth=0)


def main(args):
    try:
        import matplotlib

        matplotlib.use("Agg")
        matplotlib.rcParams["text.parse_math"] = False  # a name with two $ is no formula
        from matplotlib import pyplot
    except ImportError:
        fail("plots need matplotlib: pip install matplotlib")
    runs = read_runs(args.run_dirs, args.column)
    if not runs:
        fail(f"no run with a finished episode in: {', '.join(args.run_dirs) or 'nothing given'}")
    columns = min(len(runs), 4)
    figure = pyplot.figure(layout="constrained")
    figure.set_size_inches(5.5 * columns, 4 * math.ceil(len(runs) / columns))
    for place, (env, scripts) in enumerate(runs.items(), 1):
        axes = figure.add_subplot(math.ceil(len(runs) / columns), columns, place)
        for script in sorted(scripts, key=lambda name: [*ORDER, name].index(name)):
            draw(axes, scripts[script], args.column, script)
            sentences = [last(scripts[script], args.column)]
            if not math.isnan(args.bar):
                sentences.append(steps_to_reach(scripts[script], args.column, args.bar))
            print(f"{env} {script}: {'; '.join(sentences)}")
        label = LABELS.get(args.column, args.column.replace("_", " "))
        axes.set(title=env, xlabel="environment steps", ylabel=label)
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        axes.legend(title="mean and range of runs", frameon=False)
    figure.savefig(args.output, dpi=150)
    pyplot.close(figure)
    print(f"plot: {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
