"""The figures of the README and of docs/results are those of the committed curves."""

import csv
import dataclasses
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import tyro

from tools import plot, sweep

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = {
    "benchmark": (ROOT / "README.md").read_text(encoding="utf-8"),
    "others": (RESULTS / "README.md").read_text(encoding="utf-8"),
    "weightings": (ROOT / "docs" / "why_the_ratio.md").read_text(encoding="utf-8"),
}
RUNS = {name: plot.read_runs([str(RESULTS / name)], "return_last100") for name in PAGES}
FREE = {"seed", "run_dir", "resume"}  # options in which runs of one command may differ


def ledger(suite):
    path = RESULTS / suite / "runs.csv"
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["command"] for row in rows}) == len(rows)
    return {row["command"]: row for row in rows}


def expected_runs(suite):
    return {run.command: run for group in sweep.SUITES[suite] for run in sweep.expand(*group)}


SUITES = sorted(path.name for path in RESULTS.iterdir() if path.is_dir())


@pytest.mark.parametrize("suite", PAGES)
def test_table(suite):
    text = plot.table(RUNS[suite], "return_last100")
    assert len(text.splitlines()) > 3
    assert text in PAGES[suite], "python -m tools.pages writes the tables anew"


@pytest.mark.parametrize("suite", SUITES)
def test_ledger_is_of_the_curves(suite):
    """A line for each curve and a curve for each line, which ends as the line says."""
    rows, runs = ledger(suite), expected_runs(suite)
    curves = {path.parent for path in (RESULTS / suite).rglob("metrics.csv")}
    assert curves == {RESULTS / suite / runs[command].place for command in rows}
    for command, row in rows.items():
        with open(
            RESULTS / suite / runs[command].place / "metrics.csv", encoding="utf-8", newline=""
        ) as file:
            curve = list(csv.DictReader(file))
        assert row["step"] == curve[-1]["step"]
        assert row["return_last100"] == curve[-1]["return_last100"]
        assert int(row["episodes"]) == sum(int(point["episodes"]) for point in curve)
        assert "torch " in row["versions"]


@pytest.mark.parametrize("suite", SUITES)
def test_runs_are_of_their_commands(suite):
    """The options that were used are those that the command has today."""
    for command, run in expected_runs(suite).items():
        if command not in ledger(suite):
            continue
        config = json.loads(
            (RESULTS / suite / run.place / "config.json").read_text(encoding="utf-8")
        )
        _, script, *options = shlex.split(command)
        args = tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=options)
        expected = json.loads(json.dumps(dataclasses.asdict(args)))
        assert config["script"] == script.removesuffix(".py")
        assert config["args"]["seed"] == expected["seed"]
        for key in expected.keys() - FREE:
            assert config["args"][key] == expected[key], (command, key)


@pytest.mark.parametrize("suite", ["benchmark", "others"])
def test_each_script_has_a_line_of_its_color_in_the_figures(suite):
    colors = {"vanilla_pg": "C0", "is_pg": "C1", "trpo": "C2", "ppo": "C3"}
    for series in RUNS[suite].values():
        expected = {script: dict(color=colors[script], linestyle="-") for script in series}
        assert plot.styles(series) == expected


@pytest.mark.parametrize("script", ["vanilla_pg", "is_pg", "trpo", "ppo"])
def test_steps_until_cartpole_is_solved(script):
    runs = RUNS["benchmark"]["CartPole-v1"][script]
    sentence = plot.steps_to_reach(runs, "return_last100", 475)
    steps = re.fullmatch("5 of 5 runs reach 475, at step (.*)", sentence)[1]
    assert f"`{script}.py` {steps}" in " ".join(PAGES["others"].split())
