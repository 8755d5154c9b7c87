"""Networks on another device: one made up for any machine, and a GPU where there is one."""

import csv
import dataclasses
import importlib
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from elsewhere import NAME, Device, Elsewhere
from gymnasium import spaces
from numpy.testing import assert_allclose
from torch.optim import Adam
from torch.utils._pytree import tree_map

from tools import evaluate

SCRIPTS = ["vanilla_pg", "is_pg", "trpo", "ppo"]
SMALL = dict(num_envs=3, num_steps=16, minibatch_size=16, policy_epochs=2, value_epochs=2)
CHOICES = {
    "Discrete": spaces.Discrete(3, start=1),
    "MultiDiscrete": spaces.MultiDiscrete([2, 4]),
    "MultiBinary": spaces.MultiBinary(3),
    "Box": spaces.Box(-2, 2, (2,)),
}
VECTOR, IMAGE = spaces.Box(-1, 1, (5,)), spaces.Box(0, 255, (8, 9, 3), np.uint8)
save = torch.save
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Guess(gym.Env):
    """Pays for the sum of the action, and ends in one step of ten."""

    def __init__(self, image, actions):
        self.observation_space = IMAGE if image else VECTOR
        self.action_space = CHOICES[actions]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        end = self.np_random.random() < 0.1
        return self.observation_space.sample(), float(np.sum(action)), end, False, {}


for image in (False, True):
    for actions in CHOICES:
        kwargs = dict(image=image, actions=actions)
        gym.register(f"Guess{actions}{'Image' * image}-v0", Guess, kwargs=kwargs)
ENVIRONMENTS = [f"Guess{actions}-v0" for actions in CHOICES] + ["GuessDiscreteImage-v0"]


def arguments(script, **options):
    known = {field.name for field in dataclasses.fields(script.Args)}
    return script.Args(**{k: v for k, v in (SMALL | options).items() if k in known})


def metrics(run_dir):
    rows = list(csv.DictReader(open(run_dir / "metrics.csv", encoding="utf-8")))
    return [
        {k: float(v or "nan") for k, v in row.items() if k not in ("seconds", "steps_per_second")}
        for row in rows
    ]


@pytest.fixture
def elsewhere(monkeypatch):
    optimizer = sys.modules[torch.optim.Optimizer.__module__]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", NAME])
    # Checkpoints hold tensors of PyTorch's own kinds, of which this is none
    monkeypatch.setattr(torch, "save", lambda checkpoint, file: None)
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with Device():
        yield
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


@pytest.fixture
def saved(elsewhere, monkeypatch):
    """Checkpoints hold the numbers themselves, as those of a GPU do when a CPU loads them."""

    def save_here(checkpoint, file):
        bring = lambda x: x.here if isinstance(x, Elsewhere) else x  # noqa: E731
        save(tree_map(bring, checkpoint), file)

    monkeypatch.setattr(torch, "save", save_here)


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_elsewhere_is_the_same_run(name, env_id, tmp_path, elsewhere):
    script = importlib.import_module(name)
    for device in ("cpu", NAME):
        run_dir = str(tmp_path / device)
        script.main(
            arguments(script, env_id=env_id, device=device, total_steps=90, run_dir=run_dir)
        )
    here, there = metrics(tmp_path / "cpu"), metrics(tmp_path / NAME)
    assert len(here) == 3
    np.testing.assert_equal(there, here)


@pytest.mark.parametrize("option", ["target_kl", "per-decision"])
def test_options_elsewhere(option, tmp_path, elsewhere):
    name = "ppo" if option == "target_kl" else "is_pg"
    options = dict(target_kl=1e-6) if option == "target_kl" else dict(weighting=option)
    script = importlib.import_module(name)
    for device in ("cpu", NAME):
        options |= dict(device=device, run_dir=str(tmp_path / device), entropy_coef=0.01)
        script.main(arguments(script, env_id="GuessBox-v0", total_steps=90, **options))
    np.testing.assert_equal(metrics(tmp_path / NAME), metrics(tmp_path / "cpu"))


def test_a_resumed_run_seeds_the_gpu_anew(tmp_path, monkeypatch):
    """The checkpoint has the random numbers of the processor; a GPU must not repeat its own."""
    script, seeds = importlib.import_module("ppo"), []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    args = arguments(
        script, env_id="GuessBox-v0", total_steps=90, seed=7, run_dir=str(tmp_path / "run")
    )
    for more in (
        {},
        dict(total_steps=180, resume=args.run_dir),
        dict(total_steps=270, resume=args.run_dir),
    ):
        script.main(dataclasses.replace(args, **more))
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert all(seed > 2**32 for seed in seeds[1:])  # and not those of other runs


def test_tensors_of_two_places_do_not_meet(elsewhere):
    there = torch.ones(3, device=NAME)
    assert there.device.type == NAME
    assert (2 * there).sum().item() == 6
    with pytest.raises(RuntimeError, match="two places"):
        there + torch.ones(3)
    with pytest.raises(TypeError, match="bring it here"):
        there.numpy()


def train_resume_and_evaluate(name, env_id, device, tmp_path):
    """To 90 steps, on to 180, and two episodes."""
    script, run_dir = importlib.import_module(name), str(tmp_path / "run")
    args = arguments(script, env_id=env_id, device=device, total_steps=90, run_dir=run_dir)
    assert script.main(args) == 0
    first = metrics(tmp_path / "run")
    more = dataclasses.replace(args, total_steps=180, resume=run_dir)
    assert script.main(more) == 0
    rows = metrics(tmp_path / "run")
    np.testing.assert_equal(rows[: len(first)], first)
    assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1))
    # An iteration has 48 steps, less those that only reset: so many it takes to get there
    assert first[-2]["step"] < 90 <= first[-1]["step"]
    assert rows[-2]["step"] < 180 <= rows[-1]["step"]
    evaluate.main(evaluate.Args(run_dir=run_dir, episodes=2))


@needs_gpu
@pytest.mark.parametrize("env_id", ENVIRONMENTS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_on_a_gpu_can_be_resumed_and_evaluated(name, env_id, tmp_path):
    train_resume_and_evaluate(name, env_id, "cuda", tmp_path)


@pytest.mark.parametrize("env_id", ["GuessBox-v0", "GuessDiscreteImage-v0"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_elsewhere_can_be_resumed_and_evaluated(name, env_id, tmp_path, saved, capsys):
    train_resume_and_evaluate(name, env_id, NAME, tmp_path)
    assert "2 episodes, sampled actions: return" in capsys.readouterr().out


@needs_gpu
@pytest.mark.parametrize("env_id", ENVIRONMENTS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_update_on_a_gpu_is_that_of_the_processor(name, env_id):
    """Up to the rounding of other kernels, which also may not multiply in TF32."""
    script = importlib.import_module(name)
    args = arguments(script, env_id=env_id, minibatch_size=48)  # so that no order is drawn
    envs = script.make_envs(args, args.num_envs)
    space = envs.single_observation_space
    updated = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        normalizer = script.Normalizer(space.shape, True, space.dtype)
        policy = script.Policy(normalizer, envs.single_action_space, 8)
        value = script.Value(normalizer, 8)
        if device == "cpu":
            obs, done = envs.reset(seed=1)[0], np.zeros(args.num_envs, bool)
            scaler = script.RewardScaler(args.num_envs, args.gamma)
            batch, *_ = script.collect(envs, obs, done, policy, value, scaler, args)
        tensors = {k: x.to(device) for k, x in batch._asdict().items() if torch.is_tensor(x)}
        policy, value = policy.to(device), value.to(device)
        with torch.no_grad():
            batch = batch._replace(**tensors, old_dist=policy(tensors["obs"]))
        optimizers = [Adam(x.parameters(), 1e-3, eps=1e-5, fused=True) for x in (policy, value)]
        own = optimizers[:1] if name != "trpo" else []
        script.update_policy(policy, *own, batch, args)
        script.update_value(value, optimizers[1], batch, args)
        with torch.no_grad():
            updated[device] = policy.outputs(batch.obs).cpu(), value(batch.obs).cpu()
    for here, there in zip(*updated.values()):
        assert_allclose(there, here, rtol=1e-2, atol=1e-3)
