"""The figures of the README are those of the committed curves."""

import dataclasses
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import tyro

from tools import plot

ROOT = Path(__file__).parent.parent
RUNS = plot.read_runs([str(ROOT / "docs" / "results")], "return_last100")
README = (ROOT / "README.md").read_text()
ROWS = [line for line in README.splitlines() if line.startswith("| `--env-id")]
FREE = {"seed", "run_dir", "resume"}  # options in which runs of one command may differ


def options_of(row):
    return shlex.split(row.split("`")[1])


def name_of(options):
    name = options[options.index("--env-id") + 1]
    kwargs = "--env-kwargs" in options and options[options.index("--env-kwargs") + 1]
    return f"{name} {kwargs}" if kwargs else name


@pytest.mark.parametrize("row", ROWS)
def test_table(row):
    runs = RUNS[name_of(options_of(row))]
    cells = [cell.strip() for cell in row.split("|")[3:5]]
    ends = [[run["return_last100"][-1] for run in runs[script]] for script in ("trpo", "ppo")]
    assert cells == [plot.spread(returns) if returns else "" for returns in ends]


def test_every_environment_has_its_row_and_every_row_its_command():
    assert sorted(name_of(options_of(row)) for row in ROWS) == sorted(RUNS)
    commands = (ROOT / "docs" / "results" / "README.md").read_text()
    for row in ROWS:
        assert options_of(row)[1].removesuffix("-v5") in commands


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/results/**/config.json")), ids=str)
def test_runs_are_of_the_commands_in_the_table(path):
    config = json.loads(path.read_text())
    script, made_with = importlib.import_module(config["script"]), config["args"]
    (row,) = (row for row in ROWS if name_of(options_of(row)) == name_of(env_options(made_with)))
    options = options_of(row)
    expected = json.loads(json.dumps(dataclasses.asdict(tyro.cli(script.Args, args=options))))
    assert {key: made_with[key] for key in made_with.keys() - FREE} == {
        key: expected[key] for key in expected.keys() - FREE
    }


def env_options(args):
    kwargs = args["env_kwargs"]
    return ["--env-id", args["env_id"], *(["--env-kwargs", kwargs] if kwargs != "{}" else [])]


@pytest.mark.parametrize("script", ["vanilla_pg", "is_pg", "trpo", "ppo"])
def test_steps_until_cartpole_is_solved(script):
    sentence = plot.steps_to_reach(RUNS["CartPole-v1"][script], "return_last100", 475)
    steps = re.fullmatch("5 of 5 runs reach 475, at step (.*)", sentence)[1]
    assert f"`{script}.py` {steps}" in " ".join(README.split())
