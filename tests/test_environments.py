"""Environments that people name: iterations of each script, and an evaluation of what it saves."""

import csv
import importlib
import json
import math
import multiprocessing
import time

import gymnasium as gym
import numpy as np
import pytest

import ppo
from tools import evaluate

SMALL = dict(num_envs=2, num_steps=8, total_steps=40, policy_epochs=2, value_epochs=2)
IMAGE = dict(wrappers=("minigrid.wrappers:ImgObsWrapper",))
ENVIRONMENTS = {
    # classic control
    "CartPole-v1": {},
    "Acrobot-v1": {},
    "MountainCar-v0": {},
    "MountainCarContinuous-v0": {},
    "Pendulum-v1": {"env_kwargs": '{"g": 9.81}'},
    # toy text
    "FrozenLake-v1": {"env_kwargs": '{"is_slippery": false}'},
    "CliffWalking-v1": {},
    "Taxi-v4": {},
    "Blackjack-v1": {},
    # Box2D
    "LunarLander-v3": {},
    "LunarLanderContinuous-v3": {},
    "BipedalWalker-v3": {},
    "CarRacing-v3": {},
    "CarRacing-v3 discrete": {"env_kwargs": '{"continuous": false}'},
    # MuJoCo
    "HalfCheetah-v5": {},
    "Hopper-v5": {},
    "Walker2d-v5": {},
    "Ant-v5": {},
    "Humanoid-v5": {},
    "Swimmer-v5": {},
    "Reacher-v5": {},
    "Pusher-v5": {},
    "InvertedPendulum-v5": {},
    "InvertedDoublePendulum-v5": {},
    # Atari
    "ale_py:ALE/Pong-v5": {},
    "ale_py:ALE/Breakout-v5": {},
    # MiniGrid: its observations hold a text, which these wrappers leave out or spell
    "minigrid:MiniGrid-Empty-5x5-v0": IMAGE,
    "minigrid:MiniGrid-DoorKey-5x5-v0": {"wrappers": ("minigrid.wrappers:FlatObsWrapper",)},
}


@pytest.mark.slow
@pytest.mark.parametrize("script", ["vanilla_pg", "is_pg", "trpo", "ppo"])
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment(name, script, tmp_path, capsys):
    module, run = importlib.import_module(script), tmp_path / "run"
    names = module.Args.__annotations__
    options = {key: value for key, value in SMALL.items() if key in names} | ENVIRONMENTS[name]
    args = module.Args(env_id=name.split()[0], run_dir=str(run), **options)
    assert module.main(args) == 0
    with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 3
    for row in rows:
        known = {column: float(cell) for column, cell in row.items() if cell}
        assert all(map(math.isfinite, known.values()))
        assert set(row) - set(known) <= {column for column in row if "return" in column} | {
            "length_mean"
        }
    # 8 steps of 2 environments a row, less a dummy step after each end but the very last
    ends, steps = sum(int(row["episodes"]) for row in rows), int(rows[-1]["step"])
    assert 0 <= steps - (16 * len(rows) - ends) <= 2
    capsys.readouterr()
    evaluate.main(evaluate.Args(str(run), episodes=2, max_steps=20))
    assert "2 episodes, sampled actions: return" in capsys.readouterr().out


class Paying(gym.Env):
    """Pays 5, −7 and 0 and ends."""

    observation_space = gym.spaces.Box(0, 255, (40, 40, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.rewards = [5.0, -7.0, 0.0]
        return np.zeros((40, 40, 3), np.uint8), {}

    def step(self, action):
        reward = self.rewards.pop(0)
        return np.zeros((40, 40, 3), np.uint8), reward, not self.rewards, False, {}


gym.register("ALE/Paying-v0", Paying)


def test_signs_of_atari_rewards_are_learned_from_and_raw_ones_reported(tmp_path, monkeypatch):
    seen, scaler = [], ppo.RewardScaler.forward

    def spy(self, rewards, done, valid):
        seen.append(rewards[:3, 0].tolist())
        return scaler(self, rewards, done, valid)

    monkeypatch.setattr(ppo.RewardScaler, "forward", spy)
    options = dict(env_id="ALE/Paying-v0", vectorization_mode="sync", run_dir=str(tmp_path / "run"))
    ppo.main(ppo.Args(**(SMALL | options | dict(total_steps=10))))
    assert seen == [[1, -1, 0]]
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["return_min"], row["return_max"]) == ("-2", "-2")
    for network in ("policy", "value"):  # images go through convolutions
        weights = ppo.load_checkpoint(tmp_path / "run")[network]
        assert weights["net.layers.0.weight"].shape == (32, 3, 8, 8)


@pytest.mark.parametrize("seed", range(1, 5))
def test_seeds_fit_in_31_bits(seed, tmp_path, monkeypatch):
    """As those of the Atari environment must, which takes them for C's int."""
    seen, reset = [], Paying.reset

    def spy(self, *, seed=None, options=None):
        seen.append(seed)
        return reset(self)

    monkeypatch.setattr(Paying, "reset", spy)
    options = dict(env_id="ALE/Paying-v0", vectorization_mode="sync", run_dir=str(tmp_path / "run"))
    ppo.main(ppo.Args(**(SMALL | options | dict(total_steps=10, seed=seed))))
    first, second, *later = seen
    assert second == first + 1  # one for each of the two environments, and for no later reset
    assert 0 <= first < second < 2**31
    assert set(later) == {None}


@pytest.mark.parametrize("env_kwargs", ["{}", '{"vectorization_mode": "vector_entry_point"}'])
def test_the_atari_environment_does_not_clip_rewards(env_kwargs):
    envs = ppo.make_envs(ppo.Args(env_id="ale_py:ALE/Pong-v5", env_kwargs=env_kwargs), 2)
    options = envs.unwrapped.spec.kwargs
    assert options["reward_clipping"] is False
    assert options["repeat_action_probability"] == 0.25  # sticky actions
    assert not {"maxpool", "noop_max", "use_fire_reset", "grayscale"} & set(options)  # defaults
    assert envs.single_observation_space.shape == (4, 84, 84)
    assert type(envs.unwrapped).__name__ == "AtariVectorEnv"
    envs.close()


@pytest.mark.slow
def test_films_of_atari_have_the_frames_of_training(tmp_path, capsys):
    kwargs = '{"img_height": 44, "img_width": 40, "stack_num": 3}'
    env_id, run = "ale_py:ALE/Pong-v5", str(tmp_path / "run")
    ppo.main(
        ppo.Args(env_id=env_id, env_kwargs=kwargs, run_dir=run, **(SMALL | {"total_steps": 16}))
    )
    weights = ppo.load_checkpoint(run)["policy"]
    assert weights["net.layers.0.weight"].shape == (32, 3, 8, 8)
    assert len(weights["net.normalizer.mean"]) == 3 * 44 * 40
    evaluate.main(evaluate.Args(run, episodes=1, max_steps=20, video=True))
    assert "video: " in capsys.readouterr().out


def workers():
    return multiprocessing.active_children()


@pytest.mark.parametrize("ending", ["done", "NaN", "interrupted"])
def test_processes_of_environments_end_with_the_run(ending, tmp_path, monkeypatch):
    """Whether it is done, stopped by `fail` or by an exception."""
    seen, update = [], ppo.update_policy

    def spy(policy, *rest):
        seen.append(len(workers()))
        if ending == "NaN":
            next(policy.parameters()).data.fill_(math.nan)
        elif ending == "interrupted":
            raise KeyError
        return update(policy, *rest) if ending == "done" else {}

    monkeypatch.setattr(ppo, "update_policy", spy)
    options = SMALL | dict(vectorization_mode="async", run_dir=str(tmp_path / "run"))
    code = None
    try:
        code = ppo.main(ppo.Args(env_id="Pendulum-v1", **options))
    except SystemExit as stop:
        code = stop.code
    except KeyError:
        code = "KeyError"
    assert code == {"done": 0, "NaN": 1, "interrupted": "KeyError"}[ending]
    assert seen[0] == 2
    for _ in range(100):
        if not workers():
            break
        time.sleep(0.1)
    assert not workers()


def test_options_of_the_environment(tmp_path, monkeypatch):
    """From --env-kwargs and --wrappers to each environment, in training and in evaluation."""
    made = []

    def note(env):
        made.append(env.unwrapped.g)
        return env

    monkeypatch.setattr(gym.wrappers, "note", note, raising=False)
    options = dict(env_kwargs=json.dumps({"g": 3.5}), wrappers=("gymnasium.wrappers:note",))
    run = str(tmp_path / "run")
    ppo.main(ppo.Args(env_id="Pendulum-v1", run_dir=run, **(SMALL | options)))
    assert made == [3.5] * 2
    evaluate.main(evaluate.Args(run, episodes=3, max_steps=5))
    assert made == [3.5] * 5
    others = ppo.make_envs(ppo.Args(env_id="Pendulum-v1", **options), 2, [lambda env: note(env)])
    assert made == [3.5] * 9  # one more wrapper around each
    others.close()


def test_an_environment_may_speak_of_its_episodes_too(tmp_path):
    """In infos of the name that SB3's Monitor and Gymnasium's own wrapper use."""
    options = SMALL | dict(total_steps=400, vectorization_mode="sync")
    for wrappers in ((), ("gymnasium.wrappers:RecordEpisodeStatistics",)):
        run = str(tmp_path / f"run{len(wrappers)}")
        assert ppo.main(ppo.Args(wrappers=wrappers, run_dir=run, **options)) == 0
    files = [tmp_path / f"run{i}/metrics.csv" for i in (0, 1)]
    plain, own = (np.genfromtxt(file, delimiter=",", encoding="utf-8") for file in files)
    assert plain[1:, 2].sum() > 10  # episodes
    np.testing.assert_array_equal(plain[:, :8], own[:, :8])


def test_the_order_of_wrappers(monkeypatch):
    """The first one is the innermost, and those of a tool are around them."""

    class Inner(gym.Wrapper):
        pass

    class Outer(gym.Wrapper):
        pass

    class Tool(gym.Wrapper):
        pass

    for wrapper in (Inner, Outer):
        monkeypatch.setattr(gym.wrappers, wrapper.__name__, wrapper, raising=False)
    names = ("gymnasium.wrappers:Inner", "gymnasium.wrappers:Outer")
    envs = ppo.make_envs(ppo.Args(env_id="Acrobot-v1", wrappers=names), 1, [Tool])
    env, found = envs.unwrapped.envs[0], []
    while isinstance(env, gym.Wrapper):
        found.append(type(env))
        env = env.env
    assert found[:3] == [Tool, Outer, Inner]
    envs.close()


def test_wrappers_go_around_an_environment_that_has_a_vectorized_form():
    """CartPole-v1 comes as arrays of cart-poles, which take no wrappers: they are made singly."""
    options = dict(wrappers=("gymnasium.wrappers:TimeAwareObservation",))
    envs = ppo.make_envs(ppo.Args(env_id="CartPole-v1", **options), 3)
    assert envs.single_observation_space.shape == (5,)
    assert isinstance(envs.unwrapped, gym.vector.SyncVectorEnv)
    envs.close()
    mode = dict(vectorization_mode="async")
    envs = ppo.make_envs(ppo.Args(env_id="CartPole-v1", **options, **mode), 1)
    assert isinstance(envs.unwrapped, gym.vector.AsyncVectorEnv)
    envs.close()
