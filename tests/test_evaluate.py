"""tools.evaluate on episodes and a policy whose numbers are known."""

import csv

import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo
from tools import evaluate


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


@pytest.fixture
def run(tmp_path):
    """A run whose policy likes action 1 by the number 64 tanh(tanh(z)) − 30, z the normalized obs.

    With the saved moments z is 1: the number is 11. Without them z is −1; with moments that go on
    moving z falls, and so does the number.
    """
    gym.registry.pop("Known-v0", None)
    gym.register("Known-v0", Known)
    args = ppo.Args(env_id="Known-v0", num_steps=8, minibatch_size=8, total_steps=1)
    args.run_dir = str(tmp_path / "run")
    ppo.main(args)
    checkpoint = ppo.load_checkpoint(args.run_dir)
    weights = checkpoint["policy"]
    weights["net.layers.0.weight"].fill_(1)
    weights["net.layers.1.weight"].copy_(torch.eye(64))
    weights["net.layers.2.weight"].copy_(torch.tensor([[0.0], [1]]).expand(2, 64))
    for name in ("net.layers.0.bias", "net.layers.1.bias"):
        weights[name].zero_()
    weights["net.layers.2.bias"].copy_(torch.tensor([30.0, 0]))
    weights["net.normalizer.mean"].fill_(-2)
    weights["net.normalizer.std"].fill_(1)
    weights["net.normalizer.count"].fill_(1)
    torch.save(checkpoint, f"{args.run_dir}/checkpoint.pt")
    return args.run_dir


def test_returns_of_the_most_likely_actions(run, capsys):
    evaluate.main(evaluate.Args(run, episodes=4, mode=True))
    said = capsys.readouterr().out
    assert "returns: 2 3 4 5\n" in said
    assert "4 episodes, mode actions: return 3.5 ± 1.12, length 3.5\n" in said


def test_returns_of_sampled_actions(run, capsys):
    checkpoint = ppo.load_checkpoint(run)
    checkpoint["policy"]["net.layers.2.weight"].zero_()
    checkpoint["policy"]["net.layers.2.bias"].copy_(torch.tensor([0.0, 1.5]))  # 0.82 for action 1
    torch.save(checkpoint, f"{run}/checkpoint.pt")
    evaluate.main(evaluate.Args(run, episodes=90))
    said = capsys.readouterr().out
    assert "length 46.5\n" in said
    returns = np.array(said.split("returns: ")[1].split("\n")[0].split(), float)
    assert (returns <= 2 + np.arange(90)).all()
    share, steps = returns.sum() / (90 * 46.5), 90 * 46.5
    assert abs(share - 1 / (1 + np.exp(-1.5))) < 5 * np.sqrt(0.25 / steps)


def test_episodes_that_do_not_end_are_cut_off(run, capsys):
    evaluate.main(evaluate.Args(run, episodes=4, mode=True, max_steps=3))
    said = capsys.readouterr().out
    assert "returns: 2 3 3 3\n" in said
    assert "2 of them were cut off at --max-steps 3" in said


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


def test_an_output_that_cannot_be_written_is_said(run, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.Args(run, episodes=2, output=f"{run}/no/folder.csv"))
    assert "cannot write" in capsys.readouterr().err


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
