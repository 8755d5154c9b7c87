"""Sweeps: which runs they make, what they keep, and that they go on where they stopped."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro

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
    run, children = sweep.Run(f"python {script}", Path("place")), []
    assert sweep.train(run, tmp_path / "runs", children) == (3, "é ± λ \N{REPLACEMENT CHARACTER}")
    assert children == []


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
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None
        time.sleep(0.1)
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


def test_a_run_that_fails_is_said_and_tried_again(tmp_path):
    options = ["--scripts", "ppo", "ppo --clip-eps -1", "--envs", SHORT, "--seeds", "1"]
    for _ in range(2):
        done = run_sweep(tmp_path, *options)
        assert done.returncode == 1
        assert "FAILED, exit code 2: ppo.py: --clip-eps must be above 0" in done.stdout
        assert "1 runs failed" in done.stderr
    assert "2 runs, of which 1 are done" in done.stdout
    assert len(ledger(tmp_path)) == 1


@pytest.mark.parametrize(
    ("words", "count"),
    [("ppo.py: NaN or infinity at step 9: check", 1), ("ppo.py: disk failed", 0)],
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
        (["benchmark", "--jobs", "0"], "--jobs and --seeds must be at least 1"),
    ],
)
def test_bad_input(options, words, tmp_path):
    done = run_sweep(tmp_path, *options)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
