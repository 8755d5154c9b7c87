"""Bad input, trouble and signals: one sentence, the right exit code, nothing lost on disk."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from processes import rows, wait_for

import ppo
import trpo
from tools import evaluate, plot

ROOT = Path(__file__).parents[1]


def refused(main, capsys):
    """What a call that must end with exit code 2 says."""
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--env-id CartPol-v1", "Did you mean: `CartPole`?"),
        ("--env-id nowhere:Env-v0", "No module named 'nowhere'"),
        ("--gamma 1.5", "--gamma must be from 0 to 1, not 1.5"),
        ("--resume nothing", "nothing has no checkpoint.pt that can be read"),
        ("--total-step 10", "--total-steps"),  # a typo: the option that was meant
        ("--num-envs many", "--num-envs"),
    ],
)
def test_the_command_line(options, words, tmp_path):
    command = [sys.executable, ROOT / "ppo.py", *options.split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert result.returncode == 2
    assert words in result.stderr + result.stdout
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []  # no run directory is left behind


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(gae_lambda=-0.1), "--gae-lambda must be from 0 to 1"),
        (dict(gamma=float("nan")), "--gamma must be from 0 to 1"),
        (dict(num_envs=0), "--num-envs must be at least 1"),
        (dict(total_steps=0), "--total-steps must be at least 1"),
        (dict(clip_eps=0.0), "--clip-eps must be above 0"),
        (dict(env_id="minigrid:MiniGrid-Empty-5x5-v0"), "try --wrappers"),
        (dict(env_kwargs="{gravity: 5}"), "JSONDecodeError"),
        (dict(env_kwargs='{"gravitas": 5}'), "gravitas"),
        (dict(wrappers=("gymnasium.wrappers:NoSuchWrapper",)), "NoSuchWrapper"),
        (dict(wrappers=("sys:exit",)), "SystemExit"),
        (dict(device="abacus"), "abacus"),
        (dict(device="cuda:99"), "cannot set up"),
        (dict(seed=-1), "--seed must be from 0 to 2**32 - 1, not -1"),
        (dict(seed=2**32), "--seed must be"),  # its noise would be that of seed 0
        (dict(num_steps=1), "--num-steps must be at least 2"),
        (dict(max_grad_norm=1e38), "--max-grad-norm must be above 0 (below 1e38, or inf)"),
        (dict(hidden_size=10**12), "cannot set up"),
        (dict(num_steps=10**15), "cannot set up"),
    ],
)
def test_impossible_arguments(options, words, tmp_path, capsys):
    args = ppo.Args(run_dir=str(tmp_path / "run"), **options)
    assert words in refused(lambda: ppo.main(args), capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_infinite_trust_region(tmp_path, capsys):
    """It has no edge up to which the full step could go."""
    args = trpo.Args(run_dir=str(tmp_path / "run"), max_kl=float("inf"))
    assert "--max-kl must be from 0 to 1, not inf" in refused(lambda: trpo.main(args), capsys)


def test_a_place_where_no_directory_can_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("not a directory", encoding="utf-8")
    args = ppo.Args(run_dir=str(tmp_path / "file" / "run"))
    said = refused(lambda: ppo.main(args), capsys)
    assert "cannot set up the folder of the run: " in said
    assert f"File exists: '{tmp_path / 'file'}'" in said


class Spaces(gym.Env):
    def __init__(self, observation_space=None, action_space=None):
        self.observation_space = observation_space or gym.spaces.Box(-1, 1)
        self.action_space = action_space or gym.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.mark.parametrize(
    ("spaces", "words"),
    [
        (dict(action_space=gym.spaces.Text(3)), "Text"),
        (dict(action_space=gym.spaces.Dict(a=gym.spaces.Discrete(2))), "Dict"),
        (dict(observation_space=gym.spaces.Sequence(gym.spaces.Discrete(2))), "Sequence"),
        (dict(observation_space=gym.spaces.Graph(gym.spaces.Discrete(2), None)), "Graph"),
    ],
)
def test_unsupported_spaces_are_named(spaces, words, tmp_path, capsys):
    gym.registry.pop("Spaces-v0", None)
    gym.register("Spaces-v0", Spaces, kwargs=spaces)
    args = ppo.Args(env_id="Spaces-v0", run_dir=str(tmp_path / "run"))
    assert words in refused(lambda: ppo.main(args), capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("missing", "options", "words"),
    [
        ("torch.utils.tensorboard", dict(tensorboard=True), "tensorboard"),
        ("mujoco", dict(env_id="HalfCheetah-v5"), 'pip install "gymnasium[mujoco]"'),
    ],
)
def test_a_missing_package_is_named(missing, options, words, tmp_path, capsys, monkeypatch):
    for name in list(sys.modules):
        if name.startswith("gymnasium.envs.mujoco"):  # another test may have imported them
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    args = ppo.Args(run_dir=str(tmp_path / "run"), **options)
    assert words in refused(lambda: ppo.main(args), capsys)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    ppo.main(ppo.Args(total_steps=100, num_steps=32, run_dir=str(run_dir)))
    return run_dir


def test_damaged_and_foreign_checkpoints(run, tmp_path, capsys):
    whole = (run / "checkpoint.pt").read_bytes()
    copy = tmp_path / "checkpoint.pt"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # among the weights, where any bits are a number
    damages = b"", b"not a checkpoint", whole[: len(whole) // 2], whole[:-100], bytes(flipped)
    for damaged in damages:
        copy.write_bytes(damaged)
        message = refused(lambda: ppo.load_checkpoint(tmp_path), capsys)
        assert "no checkpoint.pt that can be read" in message
    for foreign in ({"weights": [1, 2, 3]}, {"script": "ppo", "args": {"learning_rate": 0.1}}):
        torch.save(foreign, copy)
        refused(lambda: ppo.load_checkpoint(tmp_path), capsys)
    assert "a run of ppo.py" in refused(lambda: trpo.load_checkpoint(run), capsys)


class Trap:
    """A pickle of it makes a directory wherever it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_a_checkpoint_is_executed(run, tmp_path, capsys):
    checkpoint = ppo.load_checkpoint(run)
    torch.save(checkpoint | {"trap": Trap(tmp_path / "sprung")}, tmp_path / "checkpoint.pt")
    assert "UnpicklingError" in refused(lambda: ppo.load_checkpoint(tmp_path), capsys)
    assert not (tmp_path / "sprung").exists()


def test_tools_refuse_what_is_not_a_run(run, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"script": "no_such_script"}', encoding="utf-8")
    elsewhere = evaluate.Args(str(tmp_path))
    assert "not a run" in refused(lambda: evaluate.main(evaluate.Args("nothing")), capsys)
    assert "no_such_script.py" in refused(lambda: evaluate.main(elsewhere), capsys)
    assert "no file or folder nothing" in refused(lambda: plot.main(plot.Args(["nothing"])), capsys)
    (tmp_path / "empty").mkdir()
    assert "no run" in refused(lambda: plot.main(plot.Args([str(tmp_path / "empty")])), capsys)
    assert "no column luck" in refused(lambda: plot.main(plot.Args([str(run)], "", "luck")), capsys)


class Breaks(gym.Env):
    """Sends a NaN from its 300th step on, as observation or as reward."""

    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, where):
        self.where, self.steps = where, 0

    def reset(self, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        broken = np.nan if self.steps >= 300 else 0.5
        obs = np.full(3, broken if self.where == "obs" else 0.1, np.float32)
        return obs, broken if self.where == "reward" else 1.0, self.steps % 9 == 0, False, {}


@pytest.mark.parametrize("where", ["obs", "reward"])
@pytest.mark.parametrize("script", [ppo, trpo], ids=["ppo", "trpo"])
def test_nan_stops_training_and_keeps_the_last_checkpoint(script, where, tmp_path, capsys):
    gym.registry.pop("Breaks-v0", None)
    gym.register("Breaks-v0", Breaks, kwargs=dict(where=where))
    run_dir = tmp_path / "run"
    sizes = dict(num_envs=2, num_steps=128, minibatch_size=64, checkpoint_interval=1e-9)
    with pytest.raises(SystemExit) as stop:
        script.main(script.Args(env_id="Breaks-v0", run_dir=str(run_dir), **sizes))
    assert stop.value.code == 1
    assert str(run_dir) in capsys.readouterr().err
    checkpoint = script.load_checkpoint(run_dir)
    assert checkpoint["progress"][0] == 2  # the third iteration saw it
    assert all(x.isfinite().all() for x in checkpoint["policy"].values())
    assert len((run_dir / "metrics.csv").read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops(signum, code, tmp_path):
    command = [sys.executable, ROOT / "ppo.py", "--total-steps", "10_000_000", "--run-dir", "run"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    metrics = tmp_path / "run" / "metrics.csv"
    wait_for(process, lambda: rows(tmp_path / "run") > 2)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert "run: run\n" in out
    last = metrics.read_text(encoding="utf-8").splitlines()[-1].split(",")
    assert ppo.load_checkpoint(tmp_path / "run")["progress"][:2] == (int(last[0]), int(last[1]))


def test_a_second_signal_kills(tmp_path):
    sizes = ["--num-envs", "64", "--num-steps", "100000", "--total-steps", "10_000_000"]
    command = [sys.executable, ROOT / "ppo.py", *sizes, "--run-dir", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    wait_for(process, (tmp_path / "run" / "metrics.csv").exists)
    deadline = time.monotonic() + 60
    try:
        while process.poll() is None and time.monotonic() < deadline:
            process.send_signal(signal.SIGINT)  # the first waits for the end of the iteration
            time.sleep(0.5)
        assert process.poll() == -signal.SIGINT
    finally:
        process.kill()
