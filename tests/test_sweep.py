"""Sweeps: which runs they make, what they keep, and that they go on where they stopped."""

import csv
import errno
import io
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
import tyro
from processes import wait_for

from tools import plot, sweep

ROOT = Path(__file__).parents[1]
SHORT = "CartPole-v1 --total-steps 3000"


def run_sweep(folder, *options):
    command = [sys.executable, "-m", "tools.sweep", *options]
    command += ["--results", str(folder / "results"), "--runs", str(folder / "runs")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")


def ledger(folder, name="sweep"):
    with open(folder / "results" / name / "runs.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_runs_are_the_product():
    runs = list(sweep.expand(["trpo", "ppo --clip-eps 0.1"], [SHORT, "Acrobot-v1"], 2))
    assert [run.command for run in runs[:3]] == [
        "python trpo.py --env-id CartPole-v1 --total-steps 3000 --seed 1",
        "python ppo.py --env-id CartPole-v1 --total-steps 3000 --clip-eps 0.1 --seed 1",
        "python trpo.py --env-id Acrobot-v1 --seed 1",
    ]
    assert [str(run.place) for run in runs[3:6]] == [
        "Acrobot-v1/ppo-clip-eps-0.1/seed1",
        "CartPole-v1/trpo/seed2",
        "CartPole-v1/ppo-clip-eps-0.1/seed2",
    ]
    assert len(runs) == len(set(runs)) == 8


def test_the_help_names_the_suites(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(sweep.Args, args=["--help"])
    assert set(sweep.SUITES) <= set(re.findall(r"\w+", capsys.readouterr().out))


@pytest.mark.parametrize("suite", sweep.SUITES)
def test_no_two_runs_of_a_suite_share_a_folder(suite):
    runs = [run for group in sweep.SUITES[suite] for run in sweep.expand(*group)]
    assert len({run.place for run in runs}) == len({run.command for run in runs}) == len(runs)


def test_options_of_an_environment_are_in_its_folder_and_quoted():
    (run,) = sweep.expand(["ppo"], ["""FrozenLake-v1 --env-kwargs '{"is_slippery":false}'"""], 1)
    assert run.place == Path("FrozenLake-v1-is_slippery-false/ppo/seed1")
    assert shlex.split(run.command)[5] == '{"is_slippery":false}'


def test_the_commit_is_that_of_the_scripts(tmp_path, monkeypatch):
    """And has a + where they are others than the commit's."""

    def git(*words):
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        done = subprocess.run(["git", *identity, *words], capture_output=True, encoding="utf-8")
        return done.stdout.strip()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert sweep.commit() == ""  # not in a repository
    git("init")
    (tmp_path / "common").mkdir()
    for name in ("ppo.py", "common/networks.py", "README.md"):
        (tmp_path / name).write_text("1\n", encoding="utf-8")
    git("add", ".")
    git("commit", "-m", "1")
    expected = f"commit {git('rev-parse', '--short', 'HEAD')}"
    assert len(expected) >= 14
    (tmp_path / "README.md").write_text("2\n", encoding="utf-8")
    assert sweep.commit() == expected
    (tmp_path / "common/networks.py").write_text("2\n", encoding="utf-8")
    assert sweep.commit() == f"{expected}+"
    monkeypatch.setenv("PATH", "")
    assert sweep.commit() == ""  # no git


# Runs


def test_names_of_folders():
    assert sweep.slug("ppo --clip-eps 0.1") == "ppo-clip-eps-0.1"
    assert sweep.slug("ale_py:ALE/Pong-v5") == "ale_py-ALE-Pong-v5"
    assert sweep.slug("--a  {b}") == "a-b"


def test_options_of_the_environment_come_before_those_of_the_script():
    """So that the script's own come last, and count."""
    (run,) = sweep.expand(["trpo --gamma 0.9"], ["A-v1 --gamma 0.5 --num-envs 2"], 1)
    words = "python trpo.py --env-id A-v1 --gamma 0.5 --num-envs 2 --gamma 0.9 --seed 1"
    assert run.command == words


def test_the_folder_of_an_atari_game_has_no_options_in_its_name():
    (run,) = sweep.expand(["ppo"], [sweep.PONG], 1)
    assert run.place == Path("ale_py-ALE-Pong-v5/ppo/seed1")


@pytest.mark.parametrize(
    ("suite", "count", "seeds", "million"),
    [
        # 4 scripts on 4 tasks with 5 seeds; on 9 of MuJoCo, 2 scripts with 3 and 2 with 5
        ("benchmark", 4 * 4 * 5 + 2 * 9 * 3 + 2 * 9 * 5, 5, 2 * 9 * 3 + 2 * 9 * 5),
        ("random", 9 * 3, 3, 0),
        ("table1", 6 * 7 * 3, 3, 6 * 7 * 3),
        ("reuse", 2 * 9 * 10, 10, 0),
        ("weightings", 2 * 3 * 10, 10, 0),
        ("as_in_v3", 2 * 2 * 3, 3, 2 * 2 * 3),
        ("trpo", 2 * 3 + 2 * 3 + 5, 5, 2 * 3 + 2 * 3),
        ("solved", 6 * 3, 3, 5 * 3),
        ("others", 2 * 6 * 3 + 1, 3, 2 * 3 + 1),
    ],
)
def test_suites(suite, count, seeds, million):
    commands = [run.command for group in sweep.SUITES[suite] for run in sweep.expand(*group)]
    assert len(commands) == count
    assert max(int(command.split()[-1]) for command in commands) == seeds
    assert min(int(command.split()[-1]) for command in commands) == 1
    assert sum("--total-steps 1000000 " in command for command in commands) == million


def test_what_one_batch_is_used_for():
    batch = "--num-steps 256 --policy-lr"
    assert sweep.reuse("3e-3", "1e-2") == [
        f"vanilla_pg {batch} 3e-3 --policy-epochs 1",
        f"vanilla_pg {batch} 3e-3 --policy-epochs 10",
        f"vanilla_pg {batch} 1e-2 --policy-epochs 1",
        f"vanilla_pg {batch} 1e-2 --policy-epochs 10",
        f"is_pg {batch} 3e-3 --policy-epochs 10",
        f"is_pg {batch} 1e-2 --policy-epochs 10",
        "trpo",
        "ppo",
        "ppo --policy-lr 1e-2",
    ]
    assert sweep.weightings("1e-3") == [
        f"is_pg {batch} 1e-3 --policy-epochs 10 --weighting {kind}"
        for kind in ("step", "trajectory", "per-decision")
    ]
    gammas = [re.findall(r"--gamma (\S+)", script) for script in (sweep.ZOO, *sweep.SWIMMER)]
    assert gammas == [["0.99"], ["0.9999"], ["0.9999"]]


def test_the_random_policy_learns_nothing():
    """And its runs have 100 episodes of up to 1,000 steps, at 8 environments."""
    for run in (run for group in sweep.SUITES["random"] for run in sweep.expand(*group)):
        assert "vanilla_pg.py" in run.command
        assert "--policy-lr 0 " in run.command
        assert int(re.search("--total-steps ([0-9]+)", run.command)[1]) >= 100 * 1000


HEADER = "step,episodes,return_last100,seconds"


def write_run(folder, *rows):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"script": "ppo"}', encoding="utf-8")
    (folder / "metrics.csv").write_text("\n".join([HEADER, *rows]) + "\n", encoding="utf-8")


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    """A sweep whose runs only leave files. Returns (sweep with options, commands that ran)."""
    trained = []

    def train(run, runs, children):
        trained.append(run.command)
        seed = int(run.command.split()[-1])
        write_run(runs / run.place, f"8,1,2.5,{seed}", f"16,2,{seed}.75,{seed}.5")
        return (3, "ppo.py: it failed") if seed in failing else (0, "run: x")

    def stubbed(*scripts, fail_at=(), envs=("A-v1",), **options):
        failing[:] = fail_at
        trained.clear()
        folders = dict(results=str(tmp_path / "results"), runs=str(tmp_path / "runs"))
        for path in (tmp_path / "runs").glob("*"):
            shutil.rmtree(path)
        sweep.main(sweep.Args(scripts=scripts, envs=envs, **(dict(jobs=1) | folders | options)))
        return sorted(trained)

    failing = []
    monkeypatch.setattr(sweep, "train", train)
    handler = signal.getsignal(signal.SIGTERM)
    yield stubbed
    signal.signal(signal.SIGTERM, handler)


def test_the_ledger_says_what_each_run_came_to(stubbed, tmp_path, capsys):
    commands = [f"python ppo.py --env-id A-v1 --seed {seed}" for seed in (1, 2, 3)]
    assert stubbed("ppo") == commands
    rows = {row["command"]: row for row in ledger(tmp_path)}
    assert list(rows) == commands
    for seed, command in enumerate(commands, 1):
        versions = rows[command].pop("versions")
        assert versions.startswith(f"python {platform.python_version()}, ")
        assert f"numpy {np.__version__}" in versions
        assert rows[command] == dict(
            command=command,
            exit_code="0",
            step="16",
            episodes="3",
            return_last100=f"{seed}.75",
            seconds=f"{seed}.5",
        )
        kept = tmp_path / f"results/sweep/A-v1/ppo/seed{seed}"
        curve = (kept / "metrics.csv").read_text(encoding="utf-8")
        assert curve == f"step,episodes,return_last100\n8,1,2.5\n16,2,{seed}.75\n"
        assert (kept / "config.json").read_text(encoding="utf-8") == '{"script": "ppo"}'
    first_line = (tmp_path / "results/sweep/runs.csv").read_text(encoding="utf-8").split("\n")[0]
    columns = "command,exit_code,step,episodes,return_last100,seconds,versions"
    assert first_line.strip() == columns
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "3 runs, of which 0 are done"
    said = [f"{i}/3  {command}  return {i}.8" for i, command in enumerate(commands, 1)]
    assert out[1:] == said


def test_what_is_done_is_not_done_again(stubbed, tmp_path, capsys):
    assert len(stubbed("ppo", seeds=2)) == 2
    before = (tmp_path / "results/sweep/runs.csv").read_bytes()
    assert stubbed("ppo", seeds=2) == []
    assert (tmp_path / "results/sweep/runs.csv").read_bytes() == before
    assert stubbed("ppo", seeds=3) == ["python ppo.py --env-id A-v1 --seed 3"]
    assert (tmp_path / "results/sweep/runs.csv").read_bytes().startswith(before)
    assert len(ledger(tmp_path)) == 3
    assert "3 runs, of which 2 are done" in capsys.readouterr().out


def test_failures_are_said_counted_and_tried_again(stubbed, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        stubbed("ppo", fail_at=(1, 3))
    assert stop.value.code == 1
    said = capsys.readouterr()
    assert "failed runs: 2; the same command tries them again" in said.err
    assert said.out.count("FAILED, exit code 3: ppo.py: it failed") == 2
    assert [row["command"][-1] for row in ledger(tmp_path)] == ["2"]
    assert not (tmp_path / "results/sweep/A-v1/ppo/seed1").exists()
    assert [command[-1] for command in stubbed("ppo")] == ["1", "3"]
    assert len(ledger(tmp_path)) == 3


def test_only_some_commands_and_another_name(stubbed, tmp_path, capsys):
    trained = stubbed("ppo", "trpo", only="trpo.py", seeds=1, name="mine", envs=("A-v1", "B-v1"))
    assert trained == [f"python trpo.py --env-id {env}-v1 --seed 1" for env in "AB"]
    assert len(ledger(tmp_path, "mine")) == 2
    assert (tmp_path / "results/mine/B-v1/trpo/seed1/metrics.csv").exists()
    assert "2 runs, of which 0 are done" in capsys.readouterr().out


def test_a_suite_is_kept_under_its_name(stubbed, tmp_path, monkeypatch):
    monkeypatch.setitem(sweep.SUITES, "random", [(["ppo"], ["A-v1"], 1), (["trpo"], ["B-v1"], 2)])
    assert len(stubbed(suite="random", envs=())) == 3
    assert len(ledger(tmp_path, "random")) == 3


def test_so_many_jobs_run_at_the_same_time(tmp_path, monkeypatch):
    """Two runs wait for each other, which they can only do side by side; three would not."""
    running, most = [], []

    def train(run, runs, children):
        running.append(run)
        deadline = time.time() + 60
        while len(running) < 2 and time.time() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        most.append(len(running))
        write_run(runs / run.place, "8,1,2.5,1")
        running.remove(run)
        return 0, ""

    monkeypatch.setattr(sweep, "train", train)
    runs = list(sweep.expand(["ppo"], ["A-v1"], 4))
    (tmp_path / "results").mkdir()
    assert sweep.run_all(runs, 2, tmp_path / "runs", tmp_path / "results") == 0
    assert max(most) == 2


def test_a_run_without_a_finished_episode_is_kept(tmp_path, monkeypatch, capsys):
    def train(run, runs, children):
        write_run(runs / run.place, "8,0,,1")
        return 0, ""

    monkeypatch.setattr(sweep, "train", train)
    (tmp_path / "results").mkdir()
    runs = list(sweep.expand(["ppo"], ["A-v1"], 1))
    assert sweep.run_all(runs, 1, tmp_path / "runs", tmp_path / "results") == 0
    assert "1/1  python ppo.py --env-id A-v1 --seed 1  return nan\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "words", "content", "expected"),
    [
        (0, "", "x", True),
        (0, "", "", False),
        (0, "", None, False),
        (1, "NaN or infinity at step 3", "x", True),
        (1, "NaN or infinity at step 3", "", False),
        (1, "disk full", "x", False),
        (2, "NaN or infinity at step 3", "x", False),
        (130, "", "x", False),
    ],
)
def test_which_runs_have_a_result(code, words, content, expected, tmp_path):
    metrics = tmp_path / "metrics.csv"
    if content is not None:
        metrics.write_text(content, encoding="utf-8")
    assert sweep.has_result(code, words, metrics) == expected


def test_a_run_has_a_new_folder_and_its_last_line_is_returned(tmp_path):
    script = tmp_path / "say.py"
    lines = ["import os, sys", "print(sys.argv[1:])", "folder = sys.argv[-1]"]
    lines += ["print(os.path.exists(folder), file=sys.stderr)", "print('the last')", "print()"]
    script.write_text("\n".join(lines) + "\nprint(*sys.argv[1:])\n", encoding="utf-8")
    run = sweep.Run(f"python {script} --a 'b c' --seed 7", Path("place"))
    write_run(tmp_path / "runs" / "place", "8,1,2,3")
    code, words = sweep.train(run, tmp_path / "runs", sweep.Children())
    assert (code, words) == (0, f"--a b c --seed 7 --run-dir {tmp_path / 'runs' / 'place'}")
    assert not (tmp_path / "runs" / "place").exists()
    script.write_text("", encoding="utf-8")
    assert sweep.train(run, tmp_path / "runs", sweep.Children()) == (0, "")


@pytest.mark.parametrize("rows", [1, 999, 1000, 1001, 2000, 2001])
def test_no_more_than_a_thousand_rows_are_kept(rows, tmp_path):
    write_run(tmp_path / "run", *(f"{8 * i},2,{i},{i}" for i in range(1, rows + 1)))
    outcome = sweep.keep(tmp_path / "run", tmp_path / "kept")
    assert outcome == dict(
        step=str(8 * rows), episodes=2 * rows, return_last100=str(rows), seconds=str(rows)
    )
    with open(tmp_path / "kept/metrics.csv", encoding="utf-8", newline="") as file:
        kept = list(csv.DictReader(file))
    assert len(kept) == {1: 1, 999: 999, 1000: 1000, 1001: 501, 2000: 1000, 2001: 667}[rows]
    assert kept[-1]["step"] == str(8 * rows)
    assert sum(int(row["episodes"]) for row in kept) == 2 * rows
    for one, other in itertools.pairwise(kept):  # each has the episodes since the one before
        assert 4 * int(other["episodes"]) == int(other["step"]) - int(one["step"])


def test_two_runs_of_one_folder_are_refused(tmp_path, capsys):
    one, other = sweep.Run("python ppo.py --a", Path("x")), sweep.Run("python ppo.py", Path("x"))
    with pytest.raises(SystemExit):
        sweep.refuse_shared_folders([one, other], [], tmp_path)
    assert "x would be the folder of two runs" in capsys.readouterr().err
    (tmp_path / "x").mkdir()
    sweep.refuse_shared_folders([one], [], tmp_path)  # one that is done
    with pytest.raises(SystemExit):
        sweep.refuse_shared_folders([one], [one], tmp_path)
    assert "x has another run than `python ppo.py --a`" in capsys.readouterr().err


# Whole sweeps


@pytest.mark.slow
def test_a_sweep_and_its_second_half(tmp_path):
    options = ["--scripts", "vanilla_pg", "ppo --clip-eps 0.1", "--envs", SHORT]
    first = run_sweep(tmp_path, *options, "--seeds", "1")
    assert first.returncode == 0, first.stderr
    curve = tmp_path / "results/sweep/CartPole-v1/ppo-clip-eps-0.1/seed1"
    before = (curve / "metrics.csv").read_bytes()
    second = run_sweep(tmp_path, *options, "--seeds", "2")
    assert "4 runs, of which 2 are done" in second.stdout
    assert (curve / "metrics.csv").read_bytes() == before
    rows = ledger(tmp_path)
    assert len(rows) == len({row["command"] for row in rows}) == 4
    (row,) = (r for r in rows if "ppo" in r["command"] and r["command"].endswith("--seed 1"))
    with open(
        tmp_path / "runs/sweep/CartPole-v1/ppo-clip-eps-0.1/seed1/metrics.csv", encoding="utf-8"
    ) as file:
        whole = list(csv.DictReader(file))
    assert row["exit_code"] == "0"
    assert row["step"] == whole[-1]["step"]
    assert row["return_last100"] == whole[-1]["return_last100"]
    assert int(row["episodes"]) == sum(int(r["episodes"]) for r in whole)
    for version in (f"python {sys.version.split()[0]}", "torch 2", sweep.commit()):
        assert version in row["versions"]
    config = json.loads((curve / "config.json").read_text(encoding="utf-8"))
    assert (config["script"], config["args"]["clip_eps"]) == ("ppo", 0.1)
    # The command of the ledger, run by hand, gives the curve that was kept
    command = [sys.executable, *shlex.split(row["command"])[1:], "--run-dir", tmp_path / "again"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    runs = plot.read_runs([str(tmp_path / "again")], "return_last100")["CartPole-v1"]["ppo"]
    kept = plot.read_runs([str(curve)], "return_last100")["CartPole-v1"]["ppo"]
    for column in ("step", "return_last100", "episodes"):
        assert runs[0][column].tolist() == kept[0][column].tolist()


def test_what_a_run_prints_last_is_read_in_any_encoding(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    script = tmp_path / "say.py"
    lines = ["import sys", "print('first')", "print('é ± λ', end=' ', flush=True)"]
    lines += ["sys.stdout.buffer.write(bytes([255]))", "sys.exit(3)"]
    script.write_text("\n".join(lines), encoding="utf-8")
    run, children = sweep.Run(f"python {script}", Path("place")), sweep.Children()
    assert sweep.train(run, tmp_path / "runs", children) == (3, "é ± λ \N{REPLACEMENT CHARACTER}")
    assert children.running == []


def test_long_curves_keep_every_kth_row_and_all_episodes(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "MOST_ROWS", 3)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    rows = [f"{10 * i},{i},x,{i}.5,{i}" for i in range(1, 9)]  # three to one, the last is kept
    header = "step,episodes,other,return_last100,seconds"
    (tmp_path / "metrics.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    last = sweep.keep(tmp_path, tmp_path / "kept")
    assert (tmp_path / "kept" / "metrics.csv").read_text(encoding="utf-8") == (
        "step,episodes,return_last100\n20,3,2.5\n50,12,5.5\n80,21,8.5\n"
    )
    assert last == dict(step="80", return_last100="8.5", seconds="8", episodes=36)


def test_results_of_another_command_are_not_overwritten(tmp_path):
    """Options of an environment other than env-kwargs are not in the names of folders."""
    (tmp_path / "results/sweep/CartPole-v1/ppo/seed1").mkdir(parents=True)
    done = run_sweep(tmp_path, "--scripts", "ppo", "--envs", SHORT, "--seeds", "1")
    assert done.returncode == 2
    command = "python ppo.py --env-id CartPole-v1 --total-steps 3000 --seed 1"
    assert f"seed1 has another run than `{command}`: give a --name" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_an_interrupted_run_starts_anew(tmp_path):
    options = ["--scripts", "ppo", "--seeds", "1", "--results", str(tmp_path / "results")]
    command = [sys.executable, "-m", "tools.sweep", *options, "--runs", str(tmp_path / "runs")]
    command += ["--envs", "CartPole-v1 --total-steps 20000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8")
    metrics = tmp_path / "runs/sweep/CartPole-v1/ppo/seed1/metrics.csv"
    wait_for(process, lambda: metrics.exists() and metrics.stat().st_size)
    os.kill(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in out
    assert not (tmp_path / "results/sweep/runs.csv").exists()
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    steps = [
        int(line.split(",")[1]) for line in metrics.read_text(encoding="utf-8").splitlines()[1:]
    ]
    assert len(steps) == len(set(steps)) == 10
    assert [row["exit_code"] for row in ledger(tmp_path)] == ["0"]


@pytest.mark.slow
def test_a_run_that_fails_is_said_and_tried_again(tmp_path):
    options = ["--scripts", "ppo", "ppo --clip-eps -1", "--envs", SHORT, "--seeds", "1"]
    for _ in range(2):
        done = run_sweep(tmp_path, *options)
        assert done.returncode == 1
        assert "FAILED, exit code 2: ppo.py: --clip-eps must be above 0" in done.stdout
        assert "failed runs: 1; the same command" in done.stderr
    assert "2 runs, of which 1 are done" in done.stdout
    assert len(ledger(tmp_path)) == 1


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("ppo.py: NaN or infinity at step 9: check", 1),
        ("ppo.py: NaN or infinity in policy.net [0] at step 9: check", 1),
        ("ppo.py: disk failed", 0),
    ],
)
def test_a_divergence_is_a_result_and_a_full_disk_is_not(words, count, tmp_path, monkeypatch):
    def train(run, runs, children):
        (runs / run.place).mkdir(parents=True)
        (runs / run.place / "config.json").write_text("{}", encoding="utf-8")
        header = "step,episodes,return_last100,seconds"
        (runs / run.place / "metrics.csv").write_text(f"{header}\n8,1,2.5,1\n", encoding="utf-8")
        return 1, words

    monkeypatch.setattr(sweep, "train", train)
    places = dict(results=str(tmp_path / "results"), runs=str(tmp_path / "runs"))
    args = sweep.Args(scripts=("ppo",), envs=(SHORT,), seeds=1, **places)
    if count:
        sweep.main(args)
        assert [row["exit_code"] for row in ledger(tmp_path)] == ["1"]
    else:
        with pytest.raises(SystemExit) as stop:
            sweep.main(args)
        assert stop.value.code == 1
        assert not (tmp_path / "results" / "sweep" / "runs.csv").exists()


def one_run(tmp_path):
    places = dict(results=str(tmp_path / "results"), runs=str(tmp_path / "runs"))
    return sweep.Args(scripts=("ppo",), envs=("A-v1",), seeds=1, **places)


@pytest.mark.skipif(sweep.fcntl is None, reason="the system has no locks of files")
def test_a_drive_without_locks_needs_none(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(sweep.fcntl, "lockf", lockf)
    monkeypatch.setattr(sweep, "train", train_at_once)
    sweep.main(one_run(tmp_path))
    assert len(ledger(tmp_path)) == 1


def test_results_do_not_replace_the_whole_run(tmp_path, monkeypatch, capsys):
    """Their curves would be written over its metrics."""
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / "sweep" / "A-v1" / "ppo" / "seed1"
    write_run(run_dir, "8,1,2.5,1")
    with pytest.raises(SystemExit) as stop:
        sweep.main(sweep.Args(scripts=("ppo",), envs=("A-v1",), results="runs", runs="./runs"))
    assert stop.value.code == 2
    assert "would both be in runs/sweep: give two folders" in capsys.readouterr().err
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.json", "metrics.csv"]


def test_a_run_that_no_sweep_has_made_is_not_replaced(tmp_path, monkeypatch, capsys):
    """`python ppo.py` has trained in runs/A-v1/ppo/seed1."""
    monkeypatch.chdir(tmp_path)
    run_dir = Path("runs", "A-v1", "ppo", "seed1")
    write_run(run_dir, "8,1,2.5,1")
    with pytest.raises(SystemExit) as stop:
        sweep.main(sweep.Args(scripts=("ppo",), envs=("A-v1",), runs=".", name="runs"))
    assert stop.value.code == 2
    assert f"{run_dir} is a run that no sweep has made: give another" in capsys.readouterr().err
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.json", "metrics.csv"]


def test_a_sweep_goes_on_when_nobody_reads_its_output(stubbed, tmp_path, monkeypatch):
    """As in `python -m tools.sweep … | head -1`."""

    class Gone(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    assert len(stubbed("ppo", seeds=3)) == 3
    assert len(ledger(tmp_path)) == 3


def test_a_sweep_does_not_replace_the_whole_runs_of_another(tmp_path, monkeypatch, capsys):
    """Their checkpoints are nowhere else. Once those results are gone, they may be replaced."""
    monkeypatch.setattr(sweep, "train", train_at_once)
    first, second = one_run(tmp_path), one_run(tmp_path)
    second.results = str(tmp_path / "others")
    sweep.main(first)
    first.seeds = 2
    sweep.main(first)
    with pytest.raises(SystemExit) as stop:
        sweep.main(second)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"runs/sweep has the whole runs of {tmp_path}/results/sweep: give another --runs" in said
    assert not (tmp_path / "others" / "sweep" / "runs.csv").exists()
    shutil.rmtree(tmp_path / "results")
    shutil.rmtree(tmp_path / "runs" / "sweep" / "A-v1")  # as `train` does
    sweep.main(second)
    with pytest.raises(SystemExit):
        sweep.main(first)
    sweep.main(second)  # nothing is left to do
    shutil.copytree(tmp_path / "others", tmp_path / "copy")
    second.results = str(tmp_path / "copy")
    sweep.main(second)


def test_a_folder_that_cannot_be_removed_is_said(tmp_path, monkeypatch, capsys):
    """The script would train beside it, and the sweep look for the run in vain."""

    def rmtree(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(f"{path.name} is in use")

    args = one_run(tmp_path)
    runs = tmp_path / "runs" / "sweep"
    (runs / "A-v1" / "ppo" / "seed1").mkdir(parents=True)
    (runs / "claimed").write_text(f"{tmp_path}/results/sweep", encoding="utf-8")
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(SystemExit) as stop:
        sweep.main(args)
    assert stop.value.code == 1
    assert "cannot keep a run: seed1 is in use" in capsys.readouterr().err


def test_too_many_options_for_the_name_of_a_folder_are_said(tmp_path, capsys):
    args = one_run(tmp_path)
    args.scripts = ("ppo" + " --clip-eps 0.1" * 20,)
    (tmp_path / "results" / "sweep" / "A-v1").mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        sweep.main(args)
    assert stop.value.code == 2
    assert "cannot have a folder: File name too long" in capsys.readouterr().err


def train_at_once(run, runs, children):
    write_run(runs / run.place, "8,1,2.5,1")
    return 0, ""


@pytest.mark.skipif(sweep.fcntl is None, reason="the system has no locks of files")
@pytest.mark.parametrize("more", [[], ["--total-steps", "16"]])
def test_two_sweeps_do_not_train_in_one_folder(more, tmp_path, monkeypatch):
    """The second one would remove the folder in which the first one trains."""

    second = []

    def train(run, runs, children):
        envs = " ".join(["A-v1", *more])
        second.append(run_sweep(tmp_path, "--scripts", "ppo", "--envs", envs, "--seeds", "1"))
        return train_at_once(run, runs, children)

    monkeypatch.setattr(sweep, "train", train)
    sweep.main(one_run(tmp_path))
    assert second[0].returncode == 2
    command = " ".join(["python ppo.py --env-id A-v1", *more, "--seed 1"])
    assert f"another sweep trains in the folder of `{command}`" in second[0].stderr
    assert len(ledger(tmp_path)) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left")])
def test_a_curve_without_its_line_is_not_kept(error, tmp_path, monkeypatch, capsys):
    """Else the next sweep would take it for another run's, and do nothing."""

    def full(*_):
        raise error

    monkeypatch.setattr(sweep, "train", train_at_once)
    with monkeypatch.context() as for_now:
        for_now.setattr(sweep, "append", full)
        with pytest.raises(SystemExit) as stop:
            sweep.main(one_run(tmp_path))
    assert stop.value.code == (130 if error is KeyboardInterrupt else 1)
    if error is not KeyboardInterrupt:
        assert "cannot keep a run: No space left" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "runs")
    sweep.main(one_run(tmp_path))
    assert len(ledger(tmp_path)) == 1


def test_an_error_ends_the_runs_that_wait(tmp_path, monkeypatch):
    """The first result cannot be kept while the second run is under way."""
    trained, is_over = [], threading.Event()

    def train(run, runs, children):
        trained.append(run.command)
        if len(trained) == 2:
            is_over.wait(20)
        return train_at_once(run, runs, children)

    def full(*_):
        raise OSError("No space left")

    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr(sweep, "keep", full)
    args = one_run(tmp_path)
    args.seeds, args.jobs = 5, 1
    with pytest.raises(SystemExit):
        sweep.main(args)
    is_over.set()
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(2)  # one that still waits for work does not end
    assert len(trained) <= 2


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="Ctrl-C is no signal here")
def test_ctrl_c_while_a_run_starts(tmp_path, monkeypatch, capsys):
    """The run would go on to its end, though the sweep says that it has stopped."""

    have_ended, end = threading.Event(), sweep.Children.end

    def versions():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        have_ended.wait(60)
        return ""

    def end_and_say(children):
        end(children)
        have_ended.set()

    monkeypatch.setattr(sweep.Children, "end", end_and_say)

    script = tmp_path / "say.py"
    script.write_text(f"open({str(tmp_path / 'it has run')!r}, 'w').close()", encoding="utf-8")
    monkeypatch.setattr(sweep, "versions", versions)
    args = one_run(tmp_path)
    args.scripts = (str(tmp_path / "say"),)
    with pytest.raises(SystemExit) as stop:
        sweep.main(args)
    assert stop.value.code == 130
    assert "stopped; the same command goes on" in capsys.readouterr().out
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(20)
    assert not (tmp_path / "it has run").exists()


def test_a_process_that_starts_as_the_others_end_is_ended(monkeypatch):
    popen, children = subprocess.Popen, sweep.Children()
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]

    def end_and_start(*args, **options):
        children.end()
        return popen(*args, **options)

    started = [children.start(sleep), children.start(sleep)]
    monkeypatch.setattr(subprocess, "Popen", end_and_start)
    started.append(children.start(sleep))
    for child in started:
        child.communicate(timeout=30)
        assert child.returncode != 0
    with pytest.raises(CancelledError):
        children.start(sleep)


def test_the_versions_are_those_at_the_start_of_a_run(tmp_path, monkeypatch):
    commit = ["earlier"]

    def train(run, runs, children):
        commit[:] = ["later"]
        return train_at_once(run, runs, children)

    monkeypatch.setattr(sweep, "versions", lambda: commit[0])
    monkeypatch.setattr(sweep, "train", train)
    sweep.main(one_run(tmp_path))
    assert [row["versions"] for row in ledger(tmp_path)] == ["earlier"]


# The list of runs that are done, as others have left it

LINES = [",".join(sweep.COLUMNS), 'python a.py,0,8,1,2.5,3,"x 1, y 2"', "python b.py,0,8,1,2.5,3,x"]


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("", ""),
        ("\n".join(LINES), "ab"),
        ("\r\n".join(LINES) + "\r\n", "ab"),
        ("\n".join(LINES[:2]) + "\npython b.py,0,8", "a"),  # of a disk that was full
        ("\n".join(LINES[:2]) + "\npython b.py", "a"),
    ],
)
def test_half_a_line_is_not_a_run(text, done, tmp_path):
    ledger = tmp_path / "runs.csv"
    ledger.write_text(text, encoding="utf-8", newline="")
    assert sweep.commands_of(ledger) == {f"python {name}.py" for name in done}
    sweep.append(ledger, dict.fromkeys(sweep.COLUMNS, "c") | dict(command="python c.py"))
    assert sweep.commands_of(ledger) == {f"python {name}.py" for name in [*done, "c"]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xef\xbb\xbf" + "\n".join(LINES).encode(), "without a byte order mark"),
        (b"script,seed\nppo,1\n", "must begin with command,exit_code,step,episodes,return_last100"),
        ("\n".join(LINES).replace(",", ";").encode(), "must begin with command,exit_code,step"),
        ("\n".join(LINES).encode("utf-16"), "cannot read"),
        ("\n".join([*LINES, 'python c.py,0,8,1,2,3,"x 1']).encode(), "unexpected end of data"),
        (f"{LINES[0]}\n{LINES[1]}{LINES[1]}\n".encode(), "cannot read"),  # two joined
    ],
)
def test_a_list_that_cannot_be_read_is_left_alone(content, words, stubbed, tmp_path, capsys):
    file = tmp_path / "results" / "sweep" / "runs.csv"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        stubbed("ppo")
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert words in err
    assert f"{file}" in err
    assert err.count("\n") == 1
    assert file.read_bytes() == content
    assert not (tmp_path / "runs").exists()


def test_results_need_a_folder(stubbed, tmp_path, capsys):
    (tmp_path / "page.md").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        stubbed("ppo", results=str(tmp_path / "page.md"))
    assert stop.value.code == 2
    assert "page.md" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder in which nobody can write")
@pytest.mark.parametrize("name", ["kernel", "new"])
def test_results_need_a_folder_that_can_be_written_in(name, stubbed, capsys):
    """Which is said before anything is trained: /sys/kernel is there, /sys/new cannot be made."""
    with pytest.raises(SystemExit) as stop:
        stubbed("ppo", results="/sys", name=name)
    assert stop.value.code == 2
    assert f"cannot write in /sys/{name}: " in capsys.readouterr().err


def test_what_is_all_done_can_be_asked_for_where_nothing_can_be_written(
    stubbed, tmp_path, monkeypatch
):
    stubbed("ppo")
    monkeypatch.setattr(sweep.tempfile, "TemporaryFile", None)
    assert stubbed("ppo") == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nonsense"], "there is no suite nonsense, only benchmark"),
        ([], "name a suite (benchmark, "),
        (["benchmark", "--scripts", "ppo", "--envs", "CartPole-v1"], "name a suite"),
        (
            ["--scripts", "ppo", "--envs", SHORT, "CartPole-v1 --gamma 0.9"],
            "CartPole-v1/ppo/seed1 would be the folder of two runs",
        ),
        (["benchmark", "--scripts", "ppo"], "name a suite (benchmark, "),
        (["benchmark", "--seeds", "10"], "--seeds and --name are for a sweep of your own"),
        (["benchmark", "--name", "x"], "--seeds and --name are for a sweep of your own"),
        (["benchmark", "--envs", SHORT], "name a suite (benchmark, "),
        (["--scripts", "ppo"], "name a suite (benchmark, "),
        (["benchmark", "--jobs", "0"], "--jobs and --seeds must be at least 1"),
        (["benchmark", "--only", "Cartpole"], "no command has 'Cartpole' in it"),
        (["--scripts", "ppo --x '", "--envs", SHORT], 'cannot read "ppo --x \'": No closing'),
        (["--scripts", "ppo", "--envs", ""], "a script or an environment is empty"),
        (["--scripts", "ppo", "--envs", "A-v1 --env-kwargs"], "--env-kwargs has no value in 'A-v1"),
    ],
)
def test_bad_input(options, words, tmp_path):
    done = run_sweep(tmp_path, *options)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())
