"""tools.speed: what it counts, and the tables in README and docs that are made of it."""

import csv
import re
import time
from collections import defaultdict
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from tools import speed

ROOT = Path(__file__).parent.parent


def test_watch(monkeypatch):
    """Seconds 0 … of a clock: only iterations that are begun and ended count, not the first."""
    watch, clock = speed.Watch(), iter([1, 4, 5, 10, 30, 34, 40, 41, 45, 48, 50, 99])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(time, "time", lambda: 200.0 + watch.since)
    for steps in (0, 100, 120, 160):
        watch.begin(steps)
        watch.enter("prepare")
        watch.enter("update")
    result = watch.result(started=203.0)
    # The second iteration takes 10 s to 40 s and 20 steps, the third 40 s to 48 s and 40
    assert result["collect"] == pytest.approx(1e6 * (20 + 1) / 60)
    assert result["prepare"] == pytest.approx(1e6 * (4 + 4) / 60)
    assert result["update"] == pytest.approx(1e6 * (6 + 3) / 60)
    assert result["log"] == 0
    assert result["steps_per_second"] == pytest.approx(60 / 38)
    assert result["first_iteration"] == pytest.approx(7)


class Pairs(gym.Env):
    """Episodes of two steps."""

    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)
    steps = 0.0  # of all environments

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        Pairs.steps += 1
        return np.zeros(1, np.float32), 0.0, self.t == 2, False, {}


def test_steps_of_the_environment_alone_are_real_ones(monkeypatch):
    gym.register("Pairs-v0", Pairs)
    monkeypatch.setattr(time, "perf_counter", lambda: Pairs.steps)  # a second for each
    options = dict(env_id="Pairs-v0", num_envs=3)
    assert speed.run_environment("ppo", options, 100, None) == {"steps_per_second": 1}


def rows_of(speeds, **columns):
    """Rows as of runs: what, and its steps per second in turn."""
    both = dict(collect=5.0, prepare=1.0, update=3.0, log=1.0, memory=300.0, first_iteration=2.0)
    return [
        dict(script="ppo", setting="Here", what=what, steps_per_second=x) | both | columns
        for what, numbers in speeds.items()
        for x in numbers
    ]


def test_cells():
    speeds = dict(ours=[3000, 1000, 2000], peer=[1000, 500, 4000], environment=[8000, 4000, 1])
    cells = list(speed.cells(rows_of(speeds)).values())
    assert cells == [
        "`ppo.py`",
        "Here",
        "2,000 / 1,000",
        "2.00 (0.50 to 3.00)",
        "50% of 4,000",
        "50% / 10% / 30% / 10%",
        "300 / 300",
        "2.0 / 2.0",
    ]


def test_solved_in():
    rows = [dict(solved_training=x, solved_command=x + 2) for x in (4.0, 9.0, 5.0)] + [{}]
    expected = "after 5.0 s (4.0 to 9.0) of training, 7.0 s (6.0 to 11.0) from the command on"
    assert speed.solved_in(rows) == f"{expected}; 3 of 4 runs"


@pytest.mark.slow
def test_a_run_is_timed_in_parts():
    options = dict(num_envs=2, num_steps=8, value_epochs=1)
    row = speed.in_a_new_process("ours", "trpo", options, 100)
    assert all(row[part] > 0 for part in speed.PARTS)
    assert sum(row[part] for part in speed.PARTS) == pytest.approx(1e6 / row["steps_per_second"])
    assert 50 < row["memory"] < 5000
    assert row["first_iteration"] > 0.1


@pytest.mark.slow
def test_a_copy_is_what_runs(tmp_path):
    (tmp_path / "ppo.py").write_text("raise RuntimeError('here is the copy')", encoding="utf-8")
    with pytest.raises(RuntimeError, match="here is the copy"):
        speed.in_a_new_process("peer", "ppo", {}, 100, str(tmp_path))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(only="Chess"), "no setting has 'Chess' in it"),
        (dict(repeats=0), "--repeats must be at least 1"),
        (dict(against="tests"), "tests is not a copy of this project"),
        (dict(output="nowhere/speed.csv"), "there is no folder nowhere"),
    ],
)
def test_bad_input_loses_no_file(options, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "speed.csv").write_text("of yesterday", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        speed.main(speed.Args(**options))
    assert sentence in capsys.readouterr().err
    assert (tmp_path / "speed.csv").read_text(encoding="utf-8") == "of yesterday"


def committed(name):
    """{(script, setting): rows} of a file of runs."""
    groups = defaultdict(list)
    for row in csv.DictReader(open(ROOT / "docs" / name, encoding="utf-8")):
        groups[row["script"], row["setting"]].append(row)
    return groups


def test_table_in_docs():
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    groups = committed("speed.csv")
    assert [(script, name) for script, name, *_ in speed.SETTINGS] == list(groups)
    for rows in groups.values():
        assert len(rows) == 5 * len(speed.RUNS)
        assert f"| {' | '.join(speed.cells(rows).values())} |\n" in text


def test_times_to_solve_in_docs():
    text, groups = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8"), defaultdict(list)
    for row in csv.DictReader(open(ROOT / "docs" / "speed_solve.csv", encoding="utf-8")):
        groups[row["script"]].append(row)
    for script, rows in groups.items():
        assert f"{script}.py reaches 475 on CartPole-v1 {speed.solved_in(rows)}" in text


def test_table_in_readme():
    """Its columns are settings: the ratio of medians of ours to each other."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## How fast")[1]
    header, *lines = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)[:5]
    settings = [cell.strip() for cell in header.split("|")[1:]]
    groups, shown = committed("speed.csv"), 0
    for line in lines:
        title, *ratios = (cell.strip() for cell in line.split("|"))
        script = re.search(r"`(\w+)\.py`", title)[1]
        for setting, ratio in zip(settings, ratios):
            if not ratio:
                continue
            (rows,) = (r for (s, name), r in groups.items() if s == script and name == setting)
            cells = speed.cells(rows)
            alone = cells["of the environment alone"].split(" of ")[0]
            assert ratio == (alone if "alone" in title else cells["ratio"].split(" (")[0])
            shown += 1
    assert shown == 17
