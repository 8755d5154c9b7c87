"""Learning curves of runs: a panel for each environment, a line for each script.

python -m tools.plot runs --output curves.png
"""

import json
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


def read_runs(run_dirs, column):
    """{environment: {script: [(steps, values), …]}} of all runs in or below the given folders."""
    runs = defaultdict(lambda: defaultdict(list))
    paths = sorted({path for folder in run_dirs for path in Path(folder).rglob("metrics.csv")})
    for path in paths:
        config = json.loads(path.with_name("config.json").read_text())
        rows = np.genfromtxt(path, delimiter=",", names=True, ndmin=1)  # an empty cell is NaN
        if column not in (rows.dtype.names or ()):
            fail(f"{path} has no column {column}, only {', '.join(rows.dtype.names or ())}")
        known = ~np.isnan(rows[column])
        if known.any():
            series = rows["step"][known], rows[column][known]
            runs[config["args"]["env_id"]][config["script"]].append(series)
    return runs


def draw(axes, series, label):
    """The mean over the runs, and the range from the lowest to the highest."""
    grid = np.linspace(0, max(steps[-1] for steps, _ in series), 400)
    curves = np.array([np.interp(grid, *run, left=np.nan, right=np.nan) for run in series])
    some = ~np.isnan(curves).all(axis=0)
    grid, curves = grid[some], curves[:, some]
    (line,) = axes.plot(grid, np.nanmean(curves, axis=0), label=f"{label} ({len(series)})")
    low, high = np.nanmin(curves, axis=0), np.nanmax(curves, axis=0)
    axes.fill_between(grid, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def main(args):
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        fail("plots need matplotlib: pip install matplotlib")
    runs = read_runs(args.run_dirs, args.column)
    if not runs:
        fail(f"no run with a finished episode in: {', '.join(args.run_dirs) or 'nothing given'}")
    figure, panels = pyplot.subplots(
        1, len(runs), figsize=(5.5 * len(runs), 4), squeeze=False, layout="constrained"
    )
    for axes, (env_id, scripts) in zip(panels[0], runs.items()):
        for script in sorted(scripts, key=lambda name: [*ORDER, name].index(name)):
            draw(axes, scripts[script], script)
        label = LABELS.get(args.column, args.column.replace("_", " "))
        axes.set(title=env_id, xlabel="environment steps", ylabel=label)
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        axes.legend(title="mean and range of runs", frameon=False)
    figure.savefig(args.output, dpi=150)
    print(f"plot: {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
