"""tools.evaluate on episodes and a policy whose numbers are known."""

import csv
import ctypes.util
import importlib
import inspect
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from processes import ROOT, Job

import ppo
import tools
from tools import evaluate

SMALL = dict(num_envs=2, num_steps=8, minibatch_size=8, total_steps=1)


class Known(gym.Env):
    """Shows −1 for ever and pays the action. The seed plus 2 is the length; odd ones terminate."""

    observation_space = gym.spaces.Box(-9, 9, (1,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.length, self.count = self.length if seed is None else 2 + seed % 100, 0
        return np.float32([-1]), {}

    def step(self, action):
        self.count += 1
        over = self.count == self.length
        return np.float32([-1]), float(action), over and self.length % 2 == 1, over, {}


class Noise(gym.Env):
    """Pays the numbers that it shows and is given: any other random number is another return."""

    observation_space = gym.spaces.Box(-9, 9, (2,), np.float64)
    action_space = gym.spaces.Box(-9, 9, (2,))

    def observe(self):
        self.numbers = self.np_random.normal(size=2)
        return self.numbers

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 3 + self.np_random.integers(9)
        return self.observe(), {}

    def step(self, action):
        self.left -= 1
        reward = float(self.numbers @ action)
        return self.observe(), reward, self.left == 0, False, {}


gym.register("Noise-v0", Noise)

BREAKOUT = "ale_py:ALE/Breakout-v5"


def train(run_dir, script="ppo", **options):
    """A run of one iteration."""
    module = importlib.import_module(script)
    options = {k: x for k, x in (SMALL | options).items() if k in module.Args.__annotations__}
    assert module.main(module.Args(run_dir=str(run_dir), **options)) == 0
    return str(run_dir)


@pytest.fixture(params=[64, 10], ids=lambda width: f"width{width}")
def run(request, tmp_path):
    """A run whose policy likes action 1 by the number 64 tanh(tanh(z)) − 30, z the normalized obs.

    With the saved moments z is 1: the number is 11. Without them z is −1; with moments that go on
    moving z falls, and so does the number. With another width than 64 the sum is of so many units.
    """
    gym.registry.pop("Known-v0", None)
    gym.register("Known-v0", Known)
    width = request.param
    run_dir = train(tmp_path / "run", env_id="Known-v0", hidden_size=width)
    checkpoint = ppo.load_checkpoint(run_dir)
    weights = checkpoint["policy"]
    weights["net.layers.0.weight"].fill_(1)
    weights["net.layers.1.weight"].copy_(torch.eye(width))
    outputs = torch.tensor([[0.0], [64 / width]]).expand(2, width)
    weights["net.layers.2.weight"].copy_(outputs)
    for name in ("net.layers.0.bias", "net.layers.1.bias"):
        weights[name].zero_()
    weights["net.layers.2.bias"].copy_(torch.tensor([30.0, 0]))
    weights["net.normalizer.mean"].fill_(-2)
    weights["net.normalizer.std"].fill_(1)
    weights["net.normalizer.count"].fill_(1)
    torch.save(checkpoint, f"{run_dir}/checkpoint.pt")
    return run_dir


def test_returns_of_the_most_likely_actions(run, capsys):
    evaluate.main(evaluate.Args(run, episodes=4, mode=True, max_steps=99))
    said = capsys.readouterr().out
    assert "returns: 2 3 4 5\n" in said
    assert "4 episodes, mode actions: return 3.5 ± 1.12, length 3.5\n" in said


def test_mean_and_not_median_and_the_seed_is_that_of_the_first_episode(run, tmp_path, capsys):
    """Lengths of 100, 101 and 2: seeds 98, 99 and 100."""
    output = tmp_path / "evaluated.csv"
    options = dict(episodes=3, mode=True, max_steps=200, output=str(output))
    evaluate.main(evaluate.Args(run, seed=98, **options))
    said = capsys.readouterr().out
    assert "returns: 100 101 2\n" in said
    assert "3 episodes, mode actions: return 67.667 ± 46.4, length 67.7\n" in said
    with open(output, encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["return_mean"] == "67.6666667"
    assert float(row["return_std"]) == pytest.approx(np.std([100, 101, 2]))
    assert float(row["length_mean"]) == pytest.approx(203 / 3)


def test_returns_of_sampled_actions(run, capsys):
    checkpoint = ppo.load_checkpoint(run)
    checkpoint["policy"]["net.layers.2.weight"].zero_()
    checkpoint["policy"]["net.layers.2.bias"].copy_(torch.tensor([0.0, 1.5]))  # 0.82 for action 1
    torch.save(checkpoint, f"{run}/checkpoint.pt")
    evaluate.main(evaluate.Args(run, episodes=90, max_steps=200))
    said = capsys.readouterr().out
    assert "length 46.5\n" in said
    returns = np.array(said.split("returns: ")[1].split("\n")[0].split(), float)
    assert (returns <= 2 + np.arange(90)).all()
    share, steps = returns.sum() / (90 * 46.5), 90 * 46.5
    assert abs(share - 1 / (1 + np.exp(-1.5))) < 5 * np.sqrt(0.25 / steps)
    assert printed_returns(capsys, run, episodes=4, mode=True) == ["2", "3", "4", "5"]


def test_episodes_that_do_not_end_are_cut_off(run, capsys):
    evaluate.main(evaluate.Args(run, episodes=5, mode=True, max_steps=3))
    said = capsys.readouterr().out
    assert "returns: 2 3 3 3 3\n" in said
    assert "3 of them were cut off at --max-steps 3" in said


def test_observations_are_clipped_as_in_training(run, capsys):
    """20 standard deviations are 10: the number is 35 − 64 tanh(tanh(z / 20)), 7 and not −6."""
    checkpoint = ppo.load_checkpoint(run)
    weights = checkpoint["policy"]
    weights["net.normalizer.mean"].fill_(-21)
    weights["net.layers.0.weight"].fill_(1 / 20)
    weights["net.layers.2.weight"].neg_()
    weights["net.layers.2.bias"].copy_(torch.tensor([-35.0, 0]))
    torch.save(checkpoint, f"{run}/checkpoint.pt")
    evaluate.main(evaluate.Args(run, episodes=4, mode=True))
    assert "returns: 2 3 4 5\n" in capsys.readouterr().out


def test_each_evaluation_adds_a_line_to_the_output(run, tmp_path, capsys):
    output = tmp_path / "evaluated.csv"
    evaluate.main(evaluate.Args(run, episodes=4, mode=True, output=str(output)))
    evaluate.main(evaluate.Args(run, episodes=2, mode=True, output=str(output)))
    with open(output, encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["env_id"], first["script"], first["seed"]) == ("Known-v0", "ppo", "1")
    assert (first["step"], first["episodes"], first["actions"]) == (second["step"], "4", "mode")
    assert first["step"] == str(ppo.load_checkpoint(run)["progress"][1])
    assert (first["return_mean"], first["length_mean"]) == ("3.5", "3.5")
    assert float(first["return_std"]) == pytest.approx(1.25**0.5)  # of 2 3 4 5
    assert (second["episodes"], second["return_mean"], second["return_std"]) == ("2", "2.5", "0.5")


def test_a_line_of_another_script_and_of_sampled_actions(tmp_path):
    run_dir = train(tmp_path / "run", "trpo", seed=5, env_id="Noise-v0")
    output = tmp_path / "evaluated.csv"
    evaluate.main(evaluate.Args(run_dir, episodes=3, output=str(output)))
    with open(output, encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["script"], row["seed"], row["actions"]) == ("trpo", "5", "sampled")
    assert row["episodes"] == "3"


def test_an_output_without_a_folder_is_said_first(run, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "play", lambda *_: pytest.fail("it has begun"))
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(evaluate.Args(run, episodes=2, output=f"{run}/no/folder.csv"))
    assert f"there is no folder {run}/no to write" in capsys.readouterr().err


def test_a_full_disk_is_said_after_the_returns(run, monkeypatch, capsys):
    def full(*_):
        raise OSError("No space left")

    monkeypatch.setattr(tools, "add_row", full)
    with pytest.raises(SystemExit, match="1"):
        evaluate.main(evaluate.Args(run, episodes=2, output=f"{run}/evaluated.csv"))
    said = capsys.readouterr()
    assert "2 episodes" in said.out
    assert "evaluated.csv: No space left" in said.err


def test_a_film_that_cannot_be_made_is_said_after_the_returns(tmp_path, capsys, monkeypatch):
    def reset(self, **kwargs):
        raise OSError("no screen")

    run = str(tmp_path / "run")
    ppo.main(ppo.Args(num_steps=8, total_steps=1, run_dir=run))
    monkeypatch.setattr(gym.wrappers.RecordVideo, "reset", reset)
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.Args(run, episodes=2, video=True))
    said = capsys.readouterr()
    assert "2 episodes" in said.out
    assert "cannot film CartPole-v1: OSError: no screen" in said.err


# Random numbers


def printed_returns(capsys, run_dir, **options):
    evaluate.main(evaluate.Args(run_dir, max_steps=99, **options))
    return capsys.readouterr().out.split("returns: ")[1].split("\n")[0].split()


@pytest.fixture
def noise(tmp_path, capsys):
    run_dir = train(tmp_path / "noise", env_id="Noise-v0")
    capsys.readouterr()
    return run_dir


def test_an_evaluation_is_repeatable(noise, capsys):
    evaluate.main(evaluate.Args(noise, episodes=3, max_steps=99))
    first = capsys.readouterr().out
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002, whatever has been drawn before
    evaluate.main(evaluate.Args(noise, episodes=3, seed=0, max_steps=99))
    assert capsys.readouterr().out == first
    mode = printed_returns(capsys, noise, episodes=3, mode=True)
    assert printed_returns(capsys, noise, episodes=3, mode=True) == mode
    assert mode != printed_returns(capsys, noise, episodes=3)


@pytest.mark.parametrize("mode", [False, True])
def test_an_episode_depends_on_its_own_seed_alone(mode, noise, capsys):
    """Not on how many others there are: more episodes are those of before, and more."""
    seven = printed_returns(capsys, noise, episodes=7, mode=mode)
    assert len(set(seven)) == 7
    assert printed_returns(capsys, noise, episodes=3, mode=mode) == seven[:3]
    assert printed_returns(capsys, noise, episodes=4, seed=2, mode=mode) == seven[2:6]
    assert printed_returns(capsys, noise, episodes=1, seed=6, mode=mode) == seven[6:]


def test_arrays_may_be_of_another_library(tmp_path, capsys):
    run_dir = train(tmp_path / "run", env_id="odd:ForeignFlags")
    evaluate.main(evaluate.Args(run_dir, episodes=2))
    assert "returns: 4 4\n" in capsys.readouterr().out


class Heads:
    """A policy that returns random numbers, and of which the mode is the observation."""

    class head:
        @staticmethod
        def to_env(actions):
            return actions.numpy()

    def __init__(self):
        self.rows = []

    def __call__(self, obs):
        self.rows.append(len(obs))
        self.mode = obs
        return self

    def sample(self, obs):
        self.rows.append(len(obs))
        return torch.rand(len(obs), 2)


def test_actions_of_an_episode_come_from_a_generator_of_its_own():
    """Seeded with the episode's seed, it goes on from step to step."""
    policy, states = Heads(), evaluate.random_states(5, 3)
    steps = [evaluate.act(policy, torch.zeros(3, 1), False, states) for _ in range(2)]
    for i in range(3):
        generator = torch.Generator().manual_seed(5 + i)
        for step in steps:
            assert torch.equal(step[i], torch.rand(2, generator=generator))
    assert policy.rows == [1] * 6
    obs = torch.tensor([[1.0], [2], [3]])
    assert evaluate.act(policy, obs, True, states).tolist() == obs.tolist()
    assert policy.rows == [1] * 9


def test_the_mode_of_a_fair_coin_is_an_action():
    """PyTorch has NaN for it."""
    head = ppo.Policy(ppo.Normalizer((1,)), spaces.MultiBinary(2)).head
    outputs = torch.tensor([[0.0, 2.0]])

    def policy(obs):
        return head(outputs)

    actions = evaluate.act(policy, torch.zeros(1, 1), True, evaluate.random_states(0, 1))
    assert actions.tolist() == [[0, 1]]


# Environments


class Flags(gym.vector.VectorEnv):
    """Vectorized by hand: of two episodes the first has 2 steps, then pays NaN; the second has 4.

    Observation, reward and flags are of the given types.
    """

    single_observation_space = spaces.Box(0, 9, (1,))
    single_action_space = spaces.Discrete(2)

    def __init__(self, flags="bool", rewards="float64", truncates=False, num_envs=2):
        self.num_envs, self.flags, self.rewards = num_envs, flags, rewards
        self.truncates = truncates
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.closings = 0

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return np.zeros((self.num_envs, 1)), {}

    def step(self, actions):
        self.count += 1
        after_end = np.nan if self.rewards.startswith("float") else 100
        rewards = np.array([1 if self.count <= 2 else after_end, 10]).astype(self.rewards)
        over = np.array([self.count == 2, self.count == 4]).astype(self.flags)
        flags = np.zeros_like(over), over
        terminated, truncated = flags if self.truncates else flags[::-1]
        return np.zeros((self.num_envs, 1)), rewards, terminated, truncated, {}

    def close_extras(self, **kwargs):
        self.closings += 1


def small_policy():
    return ppo.Policy(ppo.Normalizer((1,)), spaces.Discrete(2), 8)


@pytest.mark.parametrize("truncates", [False, True])
@pytest.mark.parametrize("rewards", ["float32", "float64", "int32"])
@pytest.mark.parametrize("flags", ["bool", "int64", "uint8", "float32"])
def test_what_comes_after_an_end_does_not_count(flags, rewards, truncates):
    envs, args = Flags(flags, rewards, truncates), evaluate.Args("", max_steps=99)
    returns, lengths, finished = evaluate.play(envs, small_policy(), args)
    assert returns.tolist() == [2, 40]
    assert lengths.tolist() == [2, 4]
    assert finished.tolist() == [True, True]
    assert envs.count == 4  # not one step more
    assert envs.closings == 1


@pytest.mark.parametrize("max_steps", [1, 3, 4, 5])
def test_max_steps(max_steps):
    args = evaluate.Args("", max_steps=max_steps)
    returns, lengths, finished = evaluate.play(Flags(), small_policy(), args)
    assert lengths.tolist() == [min(2, max_steps), min(4, max_steps)]
    assert returns.tolist() == [min(2, max_steps), 10 * min(4, max_steps)]
    assert finished.tolist() == [max_steps >= 2, max_steps >= 4]


class Shows(gym.Env):
    """Shows observations of any space, for 3 steps."""

    action_space = spaces.Discrete(2)

    def __init__(self, space):
        self.observation_space = SPACES[space]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.count = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.count += 1
        return self.observation_space.sample(), 1, self.count == 3, False, {}


SPACES = {
    "float64": spaces.Box(-1, 1, (2,), np.float64),
    "float16": spaces.Box(-1, 1, (2, 2), np.float16),
    "int64": spaces.Box(-5, 5, (3,), np.int64),
    "uint8": spaces.Box(0, 255, (4,), np.uint8),
    "image": spaces.Box(0, 255, (6, 5, 1), np.uint8),
    "bool": spaces.Box(0, 1, (2,), bool),
    "bits": spaces.MultiBinary(3),
    "number": spaces.Discrete(4),
    "several": spaces.Dict(a=spaces.Box(0, 1, (2,)), b=spaces.Discrete(2)),
}
gym.register("Shows-v0", Shows)


@pytest.mark.parametrize("normalize_obs", [False, True])
@pytest.mark.parametrize("space", SPACES)
def test_observations_of_any_space(space, normalize_obs, tmp_path, capsys):
    kwargs = json.dumps(dict(space=space))
    options = dict(env_id="Shows-v0", env_kwargs=kwargs, normalize_obs=normalize_obs)
    run_dir = train(tmp_path / "run", hidden_size=16, **options)
    assert printed_returns(capsys, run_dir, episodes=2) == ["3", "3"]


@pytest.mark.parametrize("space", ["float64", "image", "several"])
def test_the_policy_is_the_one_that_was_trained(space, tmp_path, monkeypatch):
    """With its moments, for observations of its shape."""
    trained = []

    class Kept(ppo.Policy):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trained.append(self)

    monkeypatch.setattr(ppo, "Policy", Kept)
    kwargs = json.dumps(dict(space=space))
    run_dir = train(tmp_path / "run", hidden_size=16, env_id="Shows-v0", env_kwargs=kwargs)
    script, args, checkpoint = evaluate.load(run_dir)
    envs = script.make_envs(args, 5)
    loaded = evaluate.load_policy(script, args, checkpoint, envs)
    obs = torch.from_numpy(envs.reset(seed=3)[0])
    envs.close()
    assert torch.equal(loaded.outputs(obs), trained[0].outputs(obs))


# Every way out


def refused(capsys, run_dir, **options):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(evaluate.Args(run_dir, **options))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(episodes=0), "--episodes and --max-steps must be at least 1"),
        (dict(max_steps=0), "--episodes and --max-steps must be at least 1"),
        (dict(seed=-1), "--seed must be from 0 to 2**31"),
        (dict(seed=2**31 - 10), "--seed must be from 0 to 2**31"),
    ],
)
def test_bad_input(options, words, capsys):
    assert words in refused(capsys, "nothing", **options)


class Fails(gym.Env):
    """An environment in which something goes wrong; `opened` are those that are not closed."""

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 9}  # noqa: RUF012, as Gymnasium has it
    opened = 0

    def __init__(self, where="", render_mode=None):
        Fails.opened += 1
        self.where, self.render_mode = where, render_mode

    def reset(self, *, seed=None, options=None):
        if self.where == "reset":
            raise ArithmeticError("in reset")
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.count += 1
        if self.where == "step" and self.count == 3:
            raise ArithmeticError("in step")
        if self.where == "interrupt" and self.count == 3:
            raise KeyboardInterrupt
        return np.zeros(1, np.float32), 1.0, False, self.count == 5, {}

    def render(self):
        if self.where == "no picture":
            return None
        if self.where == "render" or (self.where == "later render" and self.count == 2):
            raise ArithmeticError("in render")
        return np.zeros((16, 16, 3), np.uint8)

    def close(self):
        Fails.opened -= 1


gym.register("Fails-v0", Fails)


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """Make a run whose environment fails from now on, at a given place."""

    def failing(where, **options):
        run_dir = train(tmp_path / "run", env_id="Fails-v0", **options)
        monkeypatch.setitem(gym.registry["Fails-v0"].kwargs, "where", where)
        monkeypatch.setattr(Fails, "opened", 0)
        return run_dir

    return failing


@pytest.mark.parametrize("where", ["", "reset", "step", "interrupt", "render"])
def test_environments_are_closed_on_every_way_out(where, failing, capsys):
    errors = (SystemExit, ArithmeticError, KeyboardInterrupt)
    run_dir = failing(where)
    if where:
        with pytest.raises(errors):
            evaluate.main(evaluate.Args(run_dir, episodes=3, video=True))
    else:
        evaluate.main(evaluate.Args(run_dir, episodes=3, video=True))
    assert Fails.opened == 0
    if where == "render":  # only the film needs it
        said = capsys.readouterr()
        assert "3 episodes" in said.out


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.filterwarnings("ignore")  # Gymnasium's, of the same
def test_an_environment_that_draws_nothing_is_said(older, failing, capsys):
    """An older film is not passed off as a new one."""
    run_dir = failing("no picture")
    if older:
        video = Path(run_dir, "video")
        video.mkdir()
        (video / "older.mp4").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        evaluate.main(evaluate.Args(run_dir, episodes=3, video=True))
    said = capsys.readouterr()
    assert (stop.value.code, said.out.count("video")) == (2, 0)
    assert said.err.endswith("cannot film Fails-v0: its render() gives no pictures\n")


@pytest.mark.parametrize("script", ["ppo", "trpo"])
@pytest.mark.parametrize("where", ["reset", "step"])
def test_an_environment_that_fails_in_play_is_said(where, script, failing, capsys):
    """In a sentence of its own: that of the scripts is about training, and names --resume."""
    run_dir = failing(where, script=script)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.main(evaluate.Args(run_dir, episodes=2))
    said = capsys.readouterr()
    assert (stop.value.code, said.out) == (1, "")
    words = rf"ArithmeticError: in {where} \(test_evaluate\.py, line \d+\)"
    assert re.fullmatch(f"error: cannot play Fails-v0: {words}\n", said.err)


def test_an_environment_whose_process_is_lost_is_said(failing, capsys, monkeypatch):
    run_dir = failing("", vectorization_mode="async")
    capsys.readouterr()
    act = evaluate.act

    def kill_one(*args):
        process = multiprocessing.active_children()[0]
        process.kill()
        process.join()
        return act(*args)

    monkeypatch.setattr(evaluate, "act", kill_one)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(evaluate.Args(run_dir, episodes=2))
    assert stop.value.code == 1
    words = capsys.readouterr().err
    assert "cannot play Fails-v0: a process ended, perhaps for lack of memory (" in words
    assert words.count("\n") == 1
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_ctrl_c_ends_it_without_a_traceback(tmp_path):
    run_dir = train(tmp_path / "run", env_id="test_evaluate:Fails-v0")
    checkpoint = ppo.load_checkpoint(run_dir)
    checkpoint["args"]["env_kwargs"] = json.dumps(dict(where="interrupt"))
    torch.save(checkpoint, f"{run_dir}/checkpoint.pt")
    status, out, err = Job(["-m", "tools.evaluate", run_dir], ROOT).end()
    assert (status, out) == (-signal.SIGINT, "")
    assert "Traceback" not in err


def test_environments_are_closed_where_the_policy_does_not_fit(failing, capsys):
    run_dir = failing("")
    checkpoint = ppo.load_checkpoint(run_dir)
    checkpoint["policy"]["net.layers.0.bias"] = torch.zeros(3)
    torch.save(checkpoint, f"{run_dir}/checkpoint.pt")
    words = refused(capsys, run_dir)
    assert "cannot set up Fails-v0: RuntimeError: Error(s) in loading state_dict" in words
    assert words.count("\n") == 1
    assert Fails.opened == 0


def test_environments_are_closed_where_no_film_can_be_set_up(failing, capsys, monkeypatch):
    def make_stage(*args):
        raise OSError("no\nfilm")

    run_dir = failing("")
    monkeypatch.setattr(evaluate, "make_stage", make_stage)
    words = refused(capsys, run_dir, video=True)
    assert words == "error: cannot set up Fails-v0: OSError: no film\n"
    assert Fails.opened == 0


def test_a_film_that_would_show_something_else_is_refused(capsys):
    class Script:
        def make_envs(self, args, num_envs, wrappers, **options):
            asked.append((args, num_envs, wrappers, options))
            return stage

    asked, stage, args = [], Flags(num_envs=1), ppo.Args()
    space, wrapper = spaces.Box(0, 9, (1,)), gym.Wrapper
    assert evaluate.make_stage(Script(), args, space, wrapper) is stage
    options = dict(vectorization_mode="sync", render_mode="rgb_array")
    assert asked == [(args, 1, [wrapper], options)]
    assert stage.closings == 0
    with pytest.raises(SystemExit):
        evaluate.make_stage(Script(), args, spaces.Box(0, 9, (2,)), wrapper)
    words = "cannot film CartPole-v1 with observations of the shape (2,)"
    assert words in capsys.readouterr().err
    assert stage.closings == 1


class Stages:
    """A script that notes which environments it is asked for."""

    def __init__(self, space):
        self.space, self.asked = space, []

    def make_envs(self, args, num_envs, wrappers, **options):
        self.asked.append((args, num_envs, wrappers, options))
        stage = Flags(num_envs=1)
        stage.single_observation_space = self.space
        return stage


@pytest.mark.parametrize("own", [{}, dict(vectorization_mode="vector_entry_point")])
def test_the_stage_of_an_atari_game(own):
    """Frames as they come, prepared by wrappers to the stacks of Atari's own vectorized form."""
    space, wrapper = spaces.Box(0, 255, (3, 60, 40), np.uint8), gym.Wrapper
    script = Stages(space)
    frames = dict(img_height=60, img_width=40, stack_num=3, num_threads=2, reward_clipping=True)
    frames |= dict(noop_max=7, use_fire_reset=False, frameskip=5, episodic_life=True)
    of_a_game = dict(repeat_action_probability=0.5, full_action_space=True, continuous=True)
    of_a_game |= dict(max_num_frames_per_episode=99, continuous_action_threshold=0.2)
    kwargs = json.dumps(of_a_game | frames | own)
    args = ppo.Args(env_id="ale_py:ALE/Pong-v5", env_kwargs=kwargs)
    evaluate.make_stage(script, args, space, wrapper)
    (single, num_envs, (first, start, prepare, stack), options) = script.asked[0]
    assert json.loads(single.env_kwargs) == of_a_game
    assert (single.env_id, num_envs, first) == (args.env_id, 1, wrapper)
    assert options == dict(vectorization_mode="sync", render_mode="rgb_array", frameskip=1)
    assert start.keywords == dict(noop_max=7, use_fire_reset=False)
    assert prepare.func is gym.wrappers.AtariPreprocessing
    assert prepare.keywords == dict(
        noop_max=0,
        frame_skip=5,
        screen_size=(40, 60),  # width and height
        terminal_on_life_loss=True,
        grayscale_obs=True,
    )
    assert stack.func is gym.wrappers.FrameStackObservation
    assert stack.keywords == dict(stack_size=3, padding_type="zero")


def test_defaults_of_an_atari_game_are_those_of_the_vectorized_form():
    entry_point = importlib.import_module("ale_py.vector_env").AtariVectorEnv
    there = inspect.signature(entry_point).parameters
    start, prepare, _ = evaluate.atari_wrappers(ppo.Args(env_id=BREAKOUT), (4, 84, 84))
    for name in ("noop_max", "use_fire_reset"):
        assert start.keywords[name] == there[name].default
    names = dict(frame_skip="frameskip", grayscale_obs="grayscale")
    names |= dict(terminal_on_life_loss="episodic_life")
    for name, name_there in names.items():
        assert prepare.keywords[name] == there[name_there].default


@pytest.mark.parametrize(
    "own",
    [
        dict(wrappers=("gymnasium.wrappers:FrameStackObservation",)),
        dict(vectorization_mode="sync"),
        dict(vectorization_mode="async"),
        dict(env_kwargs='{"vectorization_mode": "sync"}'),
        dict(env_id="CarRacing-v3"),
    ],
    ids=str,
)
def test_frames_that_are_not_those_of_the_vectorized_form_are_filmed_as_they_are(own):
    """Even if they have three dimensions as its stacks have."""
    space, wrapper = spaces.Box(0, 255, (210, 160, 3), np.uint8), gym.Wrapper
    script, args = Stages(space), ppo.Args(**(dict(env_id="ale_py:ALE/Pong-v5") | own))
    evaluate.make_stage(script, args, space, wrapper)
    options = dict(vectorization_mode="sync", render_mode="rgb_array")
    assert script.asked == [(args, 1, [wrapper], options)]


def not_filmed(env):
    """In place of the wrapper that films."""
    return env


@pytest.mark.parametrize(
    ("game", "options"),
    [
        (BREAKOUT, {}),
        (BREAKOUT, dict(use_fire_reset=False)),
        (BREAKOUT, dict(frameskip=3, img_height=60, img_width=50, stack_num=2)),
        (BREAKOUT, dict(grayscale=False, full_action_space=True, noop_max=0)),
        (BREAKOUT, dict(episodic_life=True, continuous=True)),
        ("ale_py:ALE/MsPacman-v5", {}),  # which has no FIRE
    ],
    ids=str,
)
def test_a_film_of_atari_shows_what_the_vectorized_form_shows(game, options):
    """Frame by frame, where neither the start nor the buttons are random."""
    kwargs = dict(noop_max=1, repeat_action_probability=0) | options
    args = ppo.Args(env_id=game, env_kwargs=json.dumps(kwargs))
    envs = ppo.make_envs(args, 1)
    stage = evaluate.make_stage(ppo, args, envs.single_observation_space, not_filmed)
    np.testing.assert_array_equal(stage.reset(seed=3)[0], envs.reset(seed=3)[0])
    envs.action_space.seed(0)
    over = False
    for _ in range(60):
        if over:
            break
        actions = envs.action_space.sample()
        seen, filmed = envs.step(actions), stage.step(actions)
        for one, other in zip(seen[:4], filmed[:4], strict=True):
            np.testing.assert_array_equal(one, other)
        over = seen[2][0]
    assert over == ("episodic_life" in options)  # a life is lost
    envs.close()
    stage.close()


def test_a_film_of_raw_frames_of_atari_shows_those_of_the_evaluation():
    """Their shape could be that of a stack of 210 pictures."""
    args = ppo.Args(env_id=BREAKOUT, vectorization_mode="sync")
    envs = ppo.make_envs(args, 1)
    stage = evaluate.make_stage(ppo, args, envs.single_observation_space, not_filmed)
    np.testing.assert_array_equal(stage.reset(seed=3)[0], envs.reset(seed=3)[0])
    for action in (1, 2, 2, 3, 0, 0, 2):
        seen, filmed = envs.step(np.array([action])), stage.step(np.array([action]))
        np.testing.assert_array_equal(seen[0], filmed[0])
    assert seen[0].shape == (1, 210, 160, 3)
    envs.close()
    stage.close()


@pytest.mark.parametrize(
    ("game", "noop_max", "frames"),
    [
        (BREAKOUT, 4, {1, 2, 3}),  # FIRE, and up to two more
        ("ale_py:ALE/MsPacman-v5", 3, {0, 1, 2}),
    ],
)
def test_a_film_of_atari_starts_as_late_as_the_vectorized_form(game, noop_max, frames):
    args = ppo.Args(env_id=game, env_kwargs=json.dumps(dict(noop_max=noop_max)))
    envs = ppo.make_envs(args, 1)
    stage = evaluate.make_stage(ppo, args, envs.single_observation_space, not_filmed)
    ale = stage.unwrapped.envs[0].unwrapped.ale
    envs.reset(seed=1)
    stage.reset(seed=1)
    seen, filmed = set(), set()
    for _ in range(40):
        _, info = envs.reset()
        seen.add(info["episode_frame_number"].item())
        stage.reset()
        filmed.add(ale.getEpisodeFrameNumber())
    assert seen == filmed == frames
    envs.close()
    stage.close()


class Buttons(gym.Env):
    """A game that notes what is pressed, and is over after one NOOP."""

    pressed = ()

    @property
    def ale(self):
        return self

    def get_action_meanings(self):
        return ["NOOP", "FIRE", "RIGHT"]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.pressed = []
        return 0, {}

    def act(self, button):
        self.pressed.append(button)

    def game_over(self):
        return self.pressed[-2:] == [1, 0]

    def reset_game(self):
        self.pressed.append("reset")


def test_fire_is_pressed_before_the_wait_and_a_game_that_is_over_starts_again():
    start = evaluate.AtariStart(Buttons(), 30, True)
    start.reset(seed=1)
    pressed = start.unwrapped.pressed
    waited = np.random.default_rng(1).integers(30)
    assert waited == 14
    assert pressed == [1, 0, "reset", *[0] * 12]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(maxpool=False), "maxpool=False"),
        (dict(life_loss_info=True), "life_loss_info=True"),
        (dict(maxpool=True, life_loss_info=False, num_threads=1), ""),
        (dict(maxpool=False, vectorization_mode="sync"), ""),  # no such option of the game
    ],
    ids=str,
)
def test_options_of_atari_that_no_film_has_are_named(options, words, capsys):
    args = ppo.Args(env_id=BREAKOUT, env_kwargs=json.dumps(options))
    if words:
        with pytest.raises(SystemExit):
            evaluate.refuse_to_film(args)
        words = f"error: cannot film {BREAKOUT} with {words}, which only its vectorized form has\n"
    else:
        evaluate.refuse_to_film(args)
    assert capsys.readouterr().err == words


@pytest.mark.slow
def test_options_of_atari_that_no_film_has_are_named_after_the_returns(tmp_path, capsys):
    output = tmp_path / "evaluated.csv"
    run_dir = train(tmp_path / "run", env_id=BREAKOUT, env_kwargs='{"maxpool": false}')
    capsys.readouterr()
    args = evaluate.Args(run_dir, episodes=2, max_steps=3, video=True, output=str(output))
    with pytest.raises(SystemExit) as stop:
        evaluate.main(args)
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert "2 episodes, sampled actions" in said.out
    assert len(output.read_text(encoding="utf-8").splitlines()) == 2
    assert f"cannot film {BREAKOUT} with maxpool=False" in said.err


def test_moviepy_that_is_missing_is_named(failing, capsys, monkeypatch):
    run_dir = failing("")
    monkeypatch.setitem(sys.modules, "moviepy", None)
    assert "cannot set up Fails-v0: DependencyNotInstalled" in refused(capsys, run_dir, video=True)


def test_an_environment_may_raise_anything_when_it_is_made(failing, capsys, monkeypatch):
    run_dir = failing("")
    monkeypatch.setitem(gym.registry["Fails-v0"].kwargs, "nonsense", 1)
    assert "cannot set up Fails-v0: TypeError: " in refused(capsys, run_dir)


@pytest.mark.parametrize("where", ["step", ""])
def test_processes_of_environments_end_with_an_error(where, failing):
    """One that fails in the process of an environment, or one of the policy here."""
    run_dir = failing(where, vectorization_mode="async")
    script, trained, checkpoint = evaluate.load(run_dir)
    envs = script.make_envs(trained, 2)
    policy = evaluate.load_policy(script, trained, checkpoint, envs)
    if not where:
        policy.head.to_env = None
    assert len(multiprocessing.active_children()) == 2
    with pytest.raises((SystemExit, ArithmeticError, TypeError)):
        evaluate.play(envs, policy, evaluate.Args("", max_steps=20))
    deadline = time.time() + 10
    while multiprocessing.active_children() and time.time() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("error", [KeyboardInterrupt, EOFError])
def test_a_signal_in_the_middle_of_a_step_is_not_waited_for(error, failing):
    """Ctrl-C between the answers of two processes; the first would not answer again.

    So too if the other process is about to end, and has closed its pipe.
    """
    run_dir = failing("", vectorization_mode="async")
    script, trained, checkpoint = evaluate.load(run_dir)
    envs = script.make_envs(trained, 2)
    policy = evaluate.load_policy(script, trained, checkpoint, envs)
    processes, pipes = envs.unwrapped.processes, envs.unwrapped.parent_pipes
    to_env = policy.head.to_env

    def interrupt(*args):
        raise error

    def to_env_at_last(actions):
        pipes[1].recv = interrupt
        return to_env(actions)

    policy.head.to_env = to_env_at_last
    rescue = threading.Timer(20, lambda: [process.kill() for process in processes])
    rescue.start()
    with pytest.raises(error):
        evaluate.play(envs, policy, evaluate.Args("", max_steps=20))
    assert rescue.is_alive(), "it waited until the processes were killed"
    rescue.cancel()
    assert not any(process.is_alive() for process in processes)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_process_behind(signum, tmp_path):
    options = dict(env_id="MountainCarContinuous-v0", vectorization_mode="async")
    kwargs = json.dumps(dict(max_episode_steps=10**9))
    run_dir = train(tmp_path / "run", env_kwargs=kwargs, **options)
    options = ["--episodes", "3", "--max-steps", "1_000_000_000"]
    job = Job(["-m", "tools.evaluate", run_dir, *options], ROOT)
    job.wait_for(lambda: len(job.alive()) >= 4)
    time.sleep(1)
    os.kill(job.process.pid, signum)
    job.end()
    deadline = time.time() + 20
    while job.alive() and time.time() < deadline:
        time.sleep(0.1)
    assert job.alive() == []


# Films


@pytest.fixture
def without_display(monkeypatch):
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setitem(os.environ, "MUJOCO_GL", "")  # so that it is restored
    del os.environ["MUJOCO_GL"]


@pytest.mark.parametrize(
    ("libraries", "backend"),
    [(["EGL", "OSMesa"], "egl"), (["EGL"], "egl"), (["OSMesa"], "osmesa"), ([], None)],
)
def test_opengl_without_a_display(libraries, backend, without_display, monkeypatch):
    monkeypatch.setattr(evaluate, "find_library", lambda name: name if name in libraries else None)
    missing = evaluate.choose_opengl()
    assert os.environ.get("MUJOCO_GL") == backend
    assert ("library EGL or OSMesa" in missing) == (backend is None)


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_choose_their_opengl_themselves(system, without_display, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(evaluate, "find_library", lambda name: name)
    assert evaluate.choose_opengl() == ""
    assert "MUJOCO_GL" not in os.environ


@pytest.mark.parametrize("name", ["MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"])
def test_a_display_or_a_choice_of_ones_own_is_left_alone(name, without_display, monkeypatch):
    monkeypatch.setattr(evaluate, "find_library", lambda name: name)
    monkeypatch.setenv(name, "glfw")
    assert evaluate.choose_opengl() == ""
    assert os.environ.get("MUJOCO_GL") == ("glfw" if name == "MUJOCO_GL" else None)


ELSEWHERE = """
import ctypes, ctypes.util, os, platform, sys
find, CDLL, system = ctypes.util.find_library, ctypes.CDLL, platform.system

def pretend():
    name = sys._getframe(1).f_code.co_filename
    return "{system}" if name.endswith("gl_context.py") else system()

class NoEGL(CDLL):
    def __init__(self, name=None, *args, **kwargs):
        if "EGL" in str(name):
            raise OSError("cannot open " + name)
        super().__init__(name, *args, **kwargs)

platform.system = pretend
ctypes.util.find_library = lambda name: None if name in ("EGL", "OSMesa") else find(name)
ctypes.CDLL = ctypes.cdll._dlltype = NoEGL
for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
    os.environ.pop(name, None)
from tools import evaluate
evaluate.main(evaluate.Args({run!r}, episodes=1, max_steps=9, video={video}))
"""


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "run", env_id="InvertedPendulum-v5")


@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows"])
def test_mujoco_without_a_film_needs_no_opengl(system, pendulum):
    """MuJoCo refuses `egl` on other systems; on Linux the library may be missing."""
    code = ELSEWHERE.format(system=system, run=pendulum, video=False)
    status, out, err = Job(["-c", code], ROOT).end()
    assert (status, err) == (0, "")
    assert "1 episodes, sampled actions: return" in out


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_a_film_without_opengl_is_one_sentence_after_the_returns(pendulum):
    code = ELSEWHERE.format(system="Linux", run=pendulum, video=True)
    status, out, err = Job(["-c", code], ROOT).end()
    assert status == 2
    assert "1 episodes, sampled actions: return" in out
    words = (
        "error: cannot film InvertedPendulum-v5: without a display MuJoCo draws with the library"
    )
    assert err.splitlines()[-1].startswith(words)
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not ctypes.util.find_library("EGL"), reason="EGL")
def test_a_film_of_mujoco_without_a_display(pendulum):
    env = dict.fromkeys(("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"), "")
    code = "import os; [os.environ.pop(name) for name in " + repr(list(env)) + "]; "
    code += "from tools import evaluate; "
    code += f"evaluate.main(evaluate.Args({pendulum!r}, episodes=1, max_steps=9, video=True))"
    status, out, err = Job(["-c", code], ROOT, **env).end()
    assert status == 0, err
    assert "video: " in out


def test_a_film_in_which_the_environment_fails_is_said_after_the_returns(failing, capsys):
    run_dir = failing("later render")
    words = refused(capsys, run_dir, episodes=2, video=True)
    assert "error: cannot film Fails-v0: ArithmeticError: in render\n" in words
    assert "--resume" not in words


def test_the_film_is_of_the_first_episode_and_named_by_what_it_shows(tmp_path, capsys):
    run_dir = train(tmp_path / "run", env_id="Pendulum-v1", total_steps=20)
    videos = tmp_path / "run" / "video"
    videos.mkdir()
    (videos / "step99-of-before.mp4").write_bytes(b"")
    capsys.readouterr()
    evaluate.main(evaluate.Args(run_dir, episodes=2, max_steps=5, video=True))
    out = capsys.readouterr().out
    first, second = out.split("returns: ")[1].split("\n")[0].split()
    assert first != second
    assert f"of an episode of return {first}\n" in out
    step = f"step{ppo.load_checkpoint(run_dir)['progress'][1]}"
    film = videos / f"{step}-sampled-seed0-episode-0.mp4"
    assert f"video: {film}, of" in out
    assert b"ftyp" in film.read_bytes()[:16]
    evaluate.main(evaluate.Args(run_dir, episodes=1, max_steps=5, video=True, mode=True, seed=3))
    names = ["step99-of-before.mp4", film.name, f"{step}-mode-seed3-episode-0.mp4"]
    assert sorted(path.name for path in videos.iterdir()) == sorted(names)
    assert {path.name for path in Path(run_dir).glob("*video*")} == {"video"}


def test_an_unfinished_film_replaces_none(failing, capsys):
    run_dir = failing("later render")
    step = f"step{ppo.load_checkpoint(run_dir)['progress'][1]}"
    film = Path(run_dir, "video", f"{step}-sampled-seed0-episode-0.mp4")
    film.parent.mkdir()
    film.write_bytes(b"of before")
    refused(capsys, run_dir, video=True)
    assert film.read_bytes() == b"of before"
    assert {path.name for path in Path(run_dir).glob("*video*")} == {"video"}


def test_a_file_of_other_columns_gets_no_line(run, tmp_path, capsys):
    output = tmp_path / "other.csv"
    output.write_text("env_id,return\nA,3\n", encoding="utf-8")
    assert "has other columns" in refused(capsys, run, episodes=2, output=str(output))
    assert output.read_text(encoding="utf-8") == "env_id,return\nA,3\n"


@pytest.mark.parametrize(
    "data", ["env_id,script\n".encode("utf-16"), b"\x89PNG\r\n"], ids=["utf-16", "png"]
)
def test_a_file_that_is_not_utf_8_gets_no_line(data, run, tmp_path, capsys):
    output = tmp_path / "other"
    output.write_bytes(data)
    words = refused(capsys, run, episodes=2, output=str(output))
    assert words == f"error: {output} has other columns: give another file, or remove it\n"
    assert output.read_bytes() == data


class Strict(gym.Env):
    """Takes only actions that are within its bounds."""

    observation_space = gym.spaces.Box(-9, 9, (1,))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.count += 1
        return np.zeros(1, np.float32), 1.0, self.count == 50, False, {}


def test_actions_are_clipped_as_in_training(tmp_path, capsys):
    gym.register("Strict-v0", Strict)
    run = str(tmp_path / "run")
    ppo.main(ppo.Args(env_id="Strict-v0", num_steps=8, total_steps=1, run_dir=run))
    checkpoint = ppo.load_checkpoint(run)
    checkpoint["policy"]["head.log_std"].fill_(1.0)  # most actions are out of bounds
    torch.save(checkpoint, f"{run}/checkpoint.pt")
    evaluate.main(evaluate.Args(run, episodes=3))
    assert "returns: 50 50 50\n" in capsys.readouterr().out
