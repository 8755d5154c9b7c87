"""tools.speed: what it counts, and the tables in README and docs that are made of it."""

import csv
import importlib
import math
import os
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from processes import Job

import ppo
import tools
from tools import solve, speed

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


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", speed.SETTINGS, ids=lambda setting: f"{setting[0]} {setting[1]}"
)
def test_the_other_does_the_same_amount_of_work(setting):
    """The agent itself knows its sizes."""
    name, _, options, _ = setting
    ours = importlib.import_module(name).Args(**options)
    package = importlib.import_module("sb3_contrib" if name == "trpo" else "stable_baselines3")
    policy, envs, policy_options = speed.peer_task(ours)
    sizes = speed.peer_sizes(name, ours)
    agent = getattr(package, speed.PEERS[name])(policy, envs, **sizes, **policy_options)
    envs.close()
    assert (agent.n_steps, agent.n_envs) == (ours.num_steps, ours.num_envs)
    if name == "vanilla_pg":  # a step on the whole batch
        assert ours.minibatch_size == ours.num_steps * ours.num_envs
        assert ours.value_epochs == ours.policy_epochs == 1
        return
    assert agent.batch_size == ours.minibatch_size
    if name == "ppo":
        assert agent.n_epochs == ours.policy_epochs == ours.value_epochs
        assert agent.policy.share_features_extractor == ("ALE/" not in ours.env_id)
    else:
        assert (agent.n_critic_updates, agent.cg_max_steps) == (ours.value_epochs, ours.cg_iters)
        assert (agent.target_kl, agent.line_search_max_iter) == (ours.max_kl, ours.backtrack_iters)


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


def test_memory_is_not_known_on_windows(monkeypatch):
    """Where Python has no module `resource`. The rest of a run is measured all the same."""
    watch = speed.Watch()
    for steps in (0, 100, 200, 300):
        watch.begin(steps)
    assert 1 < watch.result(0)["memory"] < 10**6
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(watch.result(0)["memory"])
    cells = speed.cells(rows_of(dict(ours=[1], peer=[1], environment=[1]), memory=math.nan))
    assert cells["memory, MiB"] == "nan / nan"


@pytest.mark.parametrize(
    ("returns", "expected"),
    [
        ([9.0] * 99, False),
        ([5.0] * 100, True),
        ([4.0] * 50 + [6.0] * 50, True),
        ([4.9] * 100, False),
        ([-900.0] + [5.0] * 100, True),
        ([900.0] + [4.9] * 100, False),
    ],
)
def test_solved_is_a_mean_of_the_last_100_returns(returns, expected):
    assert solve.is_solved(returns, 5) == expected


@pytest.mark.parametrize("bar", [0, 1])
def test_our_run_ends_when_it_is_solved(bar, monkeypatch):
    """Of Pairs, 256 slots are 85 episodes with their resets and one step more: 171 steps."""
    gym.registry.pop("PairsSolved-v0", None)
    gym.register("PairsSolved-v0", Pairs)
    monkeypatch.setitem(solve.TASKS, "PairsSolved-v0", (bar, 3000))
    monkeypatch.setattr(ppo.Run, "log", ppo.Run.log)  # which is put back after the test
    result = solve.solve_ours("ppo.py", "PairsSolved-v0", 1, time.time() - 1000)
    if bar == 0:
        assert result["steps"] == 8 * 171
        assert 1000 < result["seconds"] < 1300
    else:
        assert result == {"steps": 3000}


def test_our_run_has_its_seed(monkeypatch):
    seeds = []
    monkeypatch.setattr(ppo, "main", lambda args: seeds.append(args.seed))
    monkeypatch.setattr(ppo.Run, "log", ppo.Run.log)
    for seed in (1, 3):
        solve.solve_ours("ppo.py", "CartPole-v1", seed, 0.0)
    assert seeds == [1, 3]


def test_a_run_of_others_has_its_seed(monkeypatch):
    """For its weights and actions, and for its environments."""
    seeds, observations = [], []

    class Agent:
        def __init__(self, policy, envs, seed, **options):
            seeds.append(seed)
            observations.append(envs.reset())

        def learn(self, steps, callback):
            pass

    monkeypatch.setattr(solve, "algorithm", lambda name: Agent)
    for seed in (1, 3, 3):
        solve.solve_other("PPO", "CartPole-v1", seed, 0.0)
    assert seeds == [1, 3, 3]
    assert (observations[1] == observations[2]).all()
    assert (observations[0] != observations[1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("program", ["PPO", "TRPO", "PPO, tuned"])
@pytest.mark.parametrize("bar", [0, 1])
def test_a_run_of_others_ends_when_it_is_solved(program, bar, monkeypatch):
    """100 episodes of Pairs are 200 steps; they are counted after the step that ends them."""
    gym.registry.pop("PairsSolved-v0", None)
    gym.register("PairsSolved-v0", Pairs)
    monkeypatch.setitem(solve.TASKS, "PairsSolved-v0", (bar, 3000))
    monkeypatch.setitem(solve.TUNED, ("PPO", "PairsSolved-v0"), dict(num_envs=10, steps=500))
    monkeypatch.setattr(solve, "LIMIT", 400)
    result = solve.solve_other(program, "PairsSolved-v0", 1, time.time() - 1000)
    if bar == 0:
        num_envs = 10 if "tuned" in program else 1
        assert result["steps"] == 200 + num_envs
        assert 1000 < result["seconds"] < 1300
    else:
        assert result == {"steps": 500 if "tuned" in program else 400}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "env_id"), solve.TUNED)
def test_the_others_know_their_tuned_options(name, env_id):
    """Each option arrives at the agent; schedules fall linearly to 0."""
    options = {key: x for key, x in solve.TUNED[name, env_id].items() if key != "steps"}
    envs, given = solve.with_envs(env_id, 1, options)
    agent = solve.algorithm(name)("MlpPolicy", envs, **given)
    assert envs.num_envs == options.pop("num_envs", 1)
    assert hasattr(envs, "norm_reward") == options.pop("normalize", False)
    network = options.pop("network", {})
    for layers in (agent.policy.mlp_extractor.policy_net, agent.policy.mlp_extractor.value_net):
        widths = [layer.out_features for layer in layers if hasattr(layer, "out_features")]
        assert widths == network.get("sizes", [64, 64])
    for key, x in options.items():
        if isinstance(x, str):
            falling = float(x.removeprefix("lin_"))
            schedule = getattr(agent, "lr_schedule" if key == "learning_rate" else key)
            assert [schedule(left) for left in (1.0, 0.5, 0.0)] == [falling, falling / 2, 0.0]
        elif key == "clip_range":
            assert agent.clip_range(1.0) == x
        else:
            assert getattr(agent, key) == x


def test_runs_that_are_done_are_not_made_again(tmp_path):
    done, made = tmp_path / "solve.csv", []
    row = dict(environment="CartPole-v1", program="trpo.py", seed=1, steps=9)
    tools.add_row(done, row, solve.COLUMNS)

    def train(function, program, env_id, seed, started):
        made.append((function, program, env_id, seed))
        return dict(steps=7, seconds=2.5)

    args = speed.Args(repeats=2, only="TRPO CartPole", output=done)
    solve.solve(args, train)
    solve.solve(args, train)
    assert made == [(solve.solve_other, "TRPO", "CartPole-v1", seed) for seed in (1, 2)]
    solve.solve(speed.Args(repeats=2, only="trpo.py CartPole", output=done), train)
    assert made[2:] == [(solve.solve_ours, "trpo.py", "CartPole-v1", 2)]
    rows = solve.read(done)
    assert [row["seconds"] for row in rows] == ["", "2.5", "2.5", "2.5"]
    assert [row["steps"] for row in rows] == ["9", "7", "7", "7"]


@pytest.mark.parametrize("options", [{}, dict(growth="x.png"), dict(against=".")])
def test_times_to_a_solution_are_not_replaced(options, tmp_path, capsys, monkeypatch):
    """They take hours, and the default of --output is the same."""
    for name in ("compare", "grow"):
        monkeypatch.setattr(speed, name, lambda args, write: None)
    path = tmp_path / "speed.csv"
    path.write_text(",".join(solve.COLUMNS) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        speed.main(speed.Args(output=str(path), **options))
    assert stop.value.code == 2
    assert "speed.csv has times to a solution: give another --output" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8").split(",") == [*solve.COLUMNS[:-1], "seconds\n"]


ROW = "CartPole-v1,{},1,9,{}"


def test_half_a_row_is_not_one_that_was_not_solved(tmp_path):
    """Of a disk that was full: the second row ends in its steps. The fourth has no newline."""
    path = tmp_path / "solve.csv"
    cut = ROW.format("TRPO", "").removesuffix(",")
    lines = [",".join(solve.COLUMNS), ROW.format("PPO", ""), cut, "CartPole-v1,TRPO,2"]
    path.write_text("\n".join([*lines, ROW.format("PPO", 2.5)]), encoding="utf-8")
    assert solve.times(solve.read(path)) == {("CartPole-v1", "PPO"): [math.inf, 2.5]}
    args = speed.Args(repeats=1, only="TRPO CartPole", output=str(path))
    solve.solve(args, lambda *job: dict(steps=7, seconds=1.5))
    made = {("CartPole-v1", "PPO"): [math.inf, 2.5], ("CartPole-v1", "TRPO"): [1.5]}
    assert solve.times(solve.read(path)) == made


def test_a_disk_that_is_full_is_said(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError("No space left")

    monkeypatch.setattr(tools, "add_row", full)
    args = speed.Args(repeats=1, only="TRPO CartPole", output=str(tmp_path / "solve.csv"))
    with pytest.raises(SystemExit) as stop:
        solve.solve(args, lambda *job: dict(steps=7, seconds=1.5))
    assert stop.value.code == 1
    assert "solve.csv: No space left" in capsys.readouterr().err


def test_an_empty_file_is_continued(tmp_path):
    """As a full disk leaves it, if not even its first row could be written."""
    path = tmp_path / "solve.csv"
    path.touch()
    assert solve.read(path) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is no signal there")
@pytest.mark.parametrize(
    ("reached", "signum"),
    [("all", signal.SIGINT), ("one", signal.SIGINT), ("one", signal.SIGTERM)],
)
def test_a_signal_ends_a_run_and_prints_no_traceback(reached, signum, tmp_path):
    """A terminal sends Ctrl-C to all processes of the group, here while a run is starting."""
    code = "import sys, time; sys.argv[0] = '-m'; from tools import speed; "
    job = Job(["-c", code + "speed.in_a_new_process(time.sleep, 60)"], ROOT)
    job.wait_for(lambda: len(job.alive()) > 2)  # with one for multiprocessing's own resources
    send = os.killpg if reached == "all" else os.kill
    send(job.process.pid, signum)
    assert job.end(30) == (-signal.SIGINT, "", "stopped\n")
    assert not job.alive()


def test_table_of_times_to_a_solution():
    """Medians, in which a run that was not solved took forever."""
    seconds = {
        ("CartPole-v1", "ppo.py"): [4, 2, 3],
        ("CartPole-v1", "trpo.py"): [6, "", 5],
        ("CartPole-v1", "PPO, tuned"): [7, 9, 8],
        ("CartPole-v1", "PPO"): ["", "", ""],
        ("CartPole-v1", "TRPO, tuned"): [10, 11, 12],
        ("CartPole-v1", "TRPO"): ["", 1, ""],
        ("Acrobot-v1", "ppo.py"): [100],
        ("Acrobot-v1", "trpo.py"): [""],
        **{("Acrobot-v1", program): [""] for program in solve.OTHERS},
        ("Pendulum-v1", "ppo.py"): [""],
        ("Pendulum-v1", "trpo.py"): [""],
        **{("Pendulum-v1", program): [2] for program in solve.OTHERS},
        # Seed 2 is not measured in full, so only seed 1 counts
        ("LunarLander-v3", "ppo.py"): [1, 9],
        ("LunarLander-v3", "trpo.py"): [1, 9],
        **{("LunarLander-v3", program): [2, 9] for program in solve.OTHERS[:3]},
        ("LunarLander-v3", "TRPO"): [2],
        # Nor is any seed here: no ratio
        ("Hopper-v5", "trpo.py"): [1],
        ("Hopper-v5", "PPO"): [2],
        ("HalfCheetah-v5", "TRPO"): [3],
    }
    rows = [
        dict(environment=env, program=program, seed=seed, steps=1, seconds=str(x))
        for (env, program), numbers in seconds.items()
        for seed, x in enumerate(numbers, 1)
    ]
    assert solve.table(rows).splitlines()[2:] == [
        "| CartPole-v1 (475) | 3.0 s | 6.0 s (2 of 3) | 8.0 s | 0 of 3 | 11.0 s | 1 of 3 | 2.7 |",
        "| Acrobot-v1 (−100) | 100.0 s | 0 of 1 | 0 of 1 | 0 of 1 | 0 of 1 | 0 of 1 | only ours |",
        "| Pendulum-v1 (−200) | 0 of 1 | 0 of 1 | 2.0 s | 2.0 s | 2.0 s | 2.0 s | not solved |",
        "| LunarLander-v3 (200) | 1.0 s | 1.0 s | 2.0 s | 2.0 s | 2.0 s | 2.0 s | 2.0 |",
        "| HalfCheetah-v5 (3,000) |  |  |  |  |  | 3.0 s |  |",
        "| Hopper-v5 (2,000) |  | 1.0 s |  | 2.0 s |  |  |  |",
    ]


@pytest.mark.slow
def test_a_run_is_timed_in_parts():
    options = dict(num_envs=2, num_steps=8, value_epochs=1)
    row = speed.in_a_new_process(speed.run_ours, "trpo", options, 100, time.time())
    assert all(row[part] > 0 for part in speed.PARTS)
    assert sum(row[part] for part in speed.PARTS) == pytest.approx(1e6 / row["steps_per_second"])
    assert 50 < row["memory"] < 5000
    assert row["first_iteration"] > 0.1


@pytest.mark.slow
def test_a_copy_is_what_runs(tmp_path):
    (tmp_path / "ppo.py").write_text("raise RuntimeError('here is the copy')", encoding="utf-8")
    with pytest.raises(RuntimeError, match="here is the copy"):
        speed.in_a_new_process(speed.run_peer, "ppo", {}, 100, time.time(), str(tmp_path))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(only="Chess"), "no setting has 'Chess' in it"),
        (dict(repeats=0), "--repeats must be at least 1"),
        (dict(against="tests"), "tests is not a copy of this project"),
        (dict(output="nowhere/speed.csv"), "there is no folder nowhere"),
        (dict(output="folder"), "folder is a folder: name a file"),
        (dict(output=""), ". is a folder: name a file"),
        (dict(growth="folder"), "folder is a folder: name a file"),
        (dict(table=True), "--table needs --solve"),
        (dict(growth="growth.png", only="hidden_size"), "leave it out with --table and with"),
        (dict(solve=True, table=True, only="CartPole"), "leave it out with --table and with"),
        (dict(solve=True, table=True, output="other.csv"), "there is no other.csv"),
        (dict(growth="nowhere/growth.png"), "there is no folder nowhere"),
        (dict(growth="growth.webq"), "cannot write growth.webq"),
        (dict(growth="growth.png", solve=True), "--solve, --growth and --against exclude each"),
        (dict(solve=True, against=str(ROOT)), "--solve, --growth and --against exclude each"),
        (dict(growth="g.png", against=str(ROOT)), "--solve, --growth and --against exclude each"),
        (dict(solve=True), "speed.csv has no times to a solution"),
        (dict(solve=True, table=True), "speed.csv has no times to a solution"),
    ],
)
def test_bad_input_loses_no_file(options, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "speed.csv").write_text("of yesterday", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    with pytest.raises(SystemExit, match="2"):
        speed.main(speed.Args(**options))
    assert sentence in capsys.readouterr().err
    assert (tmp_path / "speed.csv").read_text(encoding="utf-8") == "of yesterday"
    assert cores is None or os.sched_getaffinity(0) == cores  # only its children keep to one


def test_a_typo_in_only_is_said_before_a_solution_is_sought(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        speed.main(speed.Args(solve=True, only="Chess", output=str(tmp_path / "solve.csv")))
    assert "no program or task has 'Chess' in it" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes cannot be pinned")
def test_what_is_measured_has_one_core():
    assert len(speed.in_a_new_process(os.sched_getaffinity, 0)) == 1


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


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md"])
def test_times_to_a_solution(page):
    rows = solve.read(ROOT / "docs" / "speed_solve.csv")
    text = (ROOT / page).read_text(encoding="utf-8")
    assert solve.table(rows) in text, "python -m tools.pages writes it anew"


def test_the_growth_of_a_run_is_drawn_from_its_own_rows(monkeypatch):
    """Medians of the runs at each number of environments, by hand."""
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.setattr(speed, "GROWTH", [("num_envs", [1, 2], None), ("hidden_size", [4], None)])
    rows = [
        dict(setting=setting, steps_per_second=x, collect=x, prepare=1, update=2, log=3)
        for setting, numbers in [
            ("num_envs 1", [10, 30, 20]),
            ("num_envs 2", [50, 70, 60]),
            ("hidden_size 4", [7, 9, 8]),
        ]
        for x in numbers
    ]
    above = [axes.lines[0].get_ydata() for axes in speed.draw(rows).axes[:2]]
    assert [list(y) for y in above] == [[20, 60], [8]]
