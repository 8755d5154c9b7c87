"""Whole runs: what is on disk, resuming, repeating a seed, evaluating and plotting."""

import csv
import importlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import worker  # noqa: F401, it registers Drift-v0
from matplotlib import pyplot

import ppo
from tools import evaluate, plot

ROOT = Path(__file__).parents[1]
SCRIPTS = ["vanilla_pg", "is_pg", "trpo", "ppo"]
# fmt: off
COLUMNS = [
    "iteration", "step", "episodes", "return_mean", "return_min", "return_max", "length_mean",
    "return_last100", "kl", "entropy", "ratio_mean", "ratio_max", "ess", "explained_variance",
    "value_loss", "learning_rate", "steps_per_second", "seconds",
]
# fmt: on
OWN_COLUMNS = {
    "vanilla_pg": [],
    "is_pg": ["weight_ess"],
    "trpo": ["step_fraction", "cg_residual", "line_search_failed"],
    "ppo": ["clip_fraction"],
}
SMALL = dict(num_envs=4, num_steps=32, minibatch_size=64, value_epochs=2)


@pytest.fixture(autouse=True)
def few_bootstrap_samples(monkeypatch):
    monkeypatch.setattr(plot, "REPS", 100)


def train(script, run_dir, **options):
    module = importlib.import_module(script)
    return module.main(module.Args(**(SMALL | dict(run_dir=str(run_dir)) | options)))


def resume(script, old_run, **options):
    module = importlib.import_module(script)
    saved = module.load_checkpoint(old_run)["args"]
    return module.main(module.Args(**(saved | dict(resume=str(old_run)) | options)))


def read(run_dir):
    with open(run_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def timeless(run_dir):
    times = "steps_per_second", "seconds"
    return [{k: v for k, v in row.items() if k not in times} for row in read(run_dir)]


def weights(run_dir):
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    names = ("policy", "value")
    return {f"{name}.{key}": x for name in names for key, x in checkpoint[name].items()}


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_on_disk(script, tmp_path):
    assert train(script, tmp_path / "run", env_id="Acrobot-v1", total_steps=1000) == 0
    rows = read(tmp_path / "run")
    assert list(rows[0]) == COLUMNS + OWN_COLUMNS[script]
    assert [int(row["iteration"]) for row in rows] == list(range(1, len(rows) + 1))
    assert [int(row["step"]) for row in rows][:3] == [128, 256, 384]  # 4 environments x 32 steps
    assert int(rows[-2]["step"]) < 1000 <= int(rows[-1]["step"])
    # Acrobot's episodes are longer than 32 steps: none has ended yet, and nothing is made up
    first = rows[0]
    assert first["episodes"] == "0"
    assert {first[name] for name in COLUMNS[3:8]} == {""}
    assert 0 < float(first["ess"]) <= 1 + 1e-6
    assert float(first["kl"]) > 0
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert (config["script"], config["args"]["env_id"]) == (script, "Acrobot-v1")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "metrics.csv",
    ]


def test_reported_returns_are_raw(tmp_path):
    train("ppo", tmp_path / "run", total_steps=1000)
    for row in read(tmp_path / "run"):  # CartPole pays 1 a step, whatever the scaler makes of it
        assert row["return_mean"] == row["length_mean"]
        if row["episodes"] != "0":
            assert float(row["return_min"]) >= 8


def test_learning_rates_fall_to_zero_at_the_end(tmp_path):
    for script, lr in [("ppo", 3e-4), ("trpo", 1e-3)]:  # trpo has that of the value function only
        options = dict(policy_lr=lr) if script == "ppo" else dict(value_lr=lr)
        train(script, tmp_path / script, env_id="Acrobot-v1", total_steps=512, **options)
        rates = [float(row["learning_rate"]) for row in read(tmp_path / script)]
        np.testing.assert_allclose(rates, [lr, lr * 0.75, lr * 0.5, lr * 0.25], rtol=1e-6)
    train("ppo", tmp_path / "fixed", total_steps=512, anneal_lr=False, policy_lr=0.01)
    assert {row["learning_rate"] for row in read(tmp_path / "fixed")} == {"0.01"}


@pytest.mark.parametrize("script", ["ppo", "trpo"])
def test_learning_rates_fall_with_the_steps_that_count(script, tmp_path):
    """Which are fewer where episodes end, since a step that only resets does not count."""
    lr = dict(policy_lr=0.01) if script == "ppo" else dict(value_lr=0.01)
    train(script, tmp_path / "run", env_id="CartPole-v1", total_steps=600, **lr)
    rows = read(tmp_path / "run")
    steps = [0, *(int(row["step"]) for row in rows)]
    assert steps[3] < 3 * 128  # some have reset
    for row, step in zip(rows, steps):
        assert float(row["learning_rate"]) == pytest.approx(0.01 * (1 - step / 600))


def test_learning_rates_rise_with_the_steps_to_train_for(tmp_path):
    """They are those of a run that had the larger number of steps from its start."""
    options = dict(env_id="Acrobot-v1", policy_lr=0.01)
    train("ppo", tmp_path / "run", total_steps=256, **options)
    resume("ppo", tmp_path / "run", total_steps=512)
    rates = [float(row["learning_rate"]) for row in read(tmp_path / "run")]
    np.testing.assert_allclose(rates, [0.01, 0.005, 0.005, 0.0025], rtol=1e-6)


def test_a_taken_name_gets_a_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        train("ppo", "", total_steps=128, env_id="CartPole-v1", seed=7)
    runs = tmp_path / "runs" / "CartPole-v1" / "ppo"
    assert sorted(path.name for path in runs.iterdir()) == ["seed7", "seed7-2", "seed7-3"]
    for _ in range(2):
        train("ppo", "given/", total_steps=128)
    assert sorted(tmp_path.glob("given*")) == [tmp_path / "given", tmp_path / "given-2"]


def test_a_name_has_no_folders_but_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gym.register("toys/Toy-v0", Toy, kwargs=dict(action_space=SPACES["Discrete"]))
    for env_id in ("toys/Toy-v0", "json:toys/Toy-v0"):  # the second imports a module first
        train("ppo", "", total_steps=128, env_id=env_id)
    runs = {path.relative_to(tmp_path) for path in tmp_path.rglob("seed1")}
    names = "toys-Toy-v0", "json-toys-Toy-v0"
    assert {str(run) for run in runs} == {f"runs/{name}/ppo/seed1" for name in names}


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Drift-v0"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_seed_fixes_everything(script, env_id, tmp_path):
    options = dict(env_id=env_id, total_steps=1000)
    if env_id == "Drift-v0":
        options |= dict(total_steps=400, wrappers=["worker:Image"])
    for name, seed in [("one", 5), ("same", 5), ("other", 6)]:
        train(script, tmp_path / name, seed=seed, **options)
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    assert timeless(one) == timeless(same)
    assert same_weights(one, same)
    assert timeless(one) != timeless(other)


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume(script, tmp_path):
    run = tmp_path / "run"
    train(script, run, total_steps=1000)
    before = read(run)
    with open(run / "metrics.csv", "a", encoding="utf-8") as file:
        file.write("9,99999,a row that no checkpoint knows of\n99,9")
    copy = shutil.copytree(run, tmp_path / "copy")
    for run_dir in (run, copy):
        assert resume(script, run_dir, total_steps=2000) == 0
    rows = read(run)
    assert rows[: len(before)] == before
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps))
    assert steps[-1] >= 2000
    assert [int(row["iteration"]) for row in rows] == list(range(1, len(rows) + 1))
    assert timeless(run) == timeless(copy)
    assert same_weights(run, copy)


def test_resume_on_the_command_line(tmp_path):
    """At the options of the run, but for those that are given anew."""
    run = tmp_path / "run"
    train("ppo", run, total_steps=128, gamma=0.9)
    command = [sys.executable, ppo.__file__, "--resume", str(run), "--total-steps", "256"]
    subprocess.run([*command, "--seed", "5"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    saved = ppo.load_checkpoint(run)["args"]
    assert saved == vars(ppo.Args()) | SMALL | dict(
        run_dir=str(run), resume=str(run), total_steps=256, gamma=0.9, seed=5
    )


def test_resume_goes_on_from_the_saved_state(tmp_path):
    """With learning rates of 0, weights stay; statistics and optimizers go on as saved."""
    run = tmp_path / "run"
    ends_early = '{"max_episode_steps": 20}'  # of the 32 steps of an iteration
    train("ppo", run, total_steps=500, env_kwargs=ends_early)
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert torch.equal(saved["rng"], torch.get_rng_state())
    *_, recent, _ = saved["progress"]
    before = read(run)
    assert np.mean(recent) == pytest.approx(float(before[-1]["return_last100"]))
    resume("ppo", run, total_steps=700, policy_lr=0.0, value_lr=0.0)
    row = read(run)[len(before)]
    new, mean = int(row["episodes"]), float(row["return_mean"])
    assert new >= 4
    last100 = (sum(recent) + new * mean) / (len(recent) + new)
    assert len(recent) + new <= 100
    assert float(row["return_last100"]) == pytest.approx(last100)
    assert float(row["seconds"]) > float(before[-1]["seconds"])
    after = torch.load(run / "checkpoint.pt", weights_only=True)
    for part in ("policy", "value"):
        weights = {name for name in saved[part] if "normalizer" not in name}
        assert len(weights) == 6
        assert all(torch.equal(saved[part][name], after[part][name]) for name in weights)
    assert saved["policy"]["net.normalizer.count"] < after["policy"]["net.normalizer.count"]
    assert saved["scaler"]["moments.count"] < after["scaler"]["moments.count"]
    first, second = (x["policy_optimizer"]["state"][0]["step"] for x in (saved, after))
    assert first < second


def test_resume_keeps_environment_and_architecture(tmp_path, capsys):
    run = tmp_path / "run"
    train("ppo", run, total_steps=128)
    kept = {path.name: path.read_bytes() for path in run.iterdir()}
    for change in (dict(env_id="Acrobot-v1"), dict(hidden_size=32), dict(run_dir="elsewhere")):
        with pytest.raises(SystemExit) as stop:
            resume("ppo", run, **(dict(total_steps=1000) | change))
        assert stop.value.code == 2
        assert "cannot change" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == kept


class Toy(gym.Env):
    """Observations of several kinds at once; any action space."""

    observation_space = gym.spaces.Dict(
        position=gym.spaces.Box(-1, 1, (2, 2)),
        place=gym.spaces.Tuple([gym.spaces.Discrete(3), gym.spaces.MultiDiscrete([2, 4])]),
        doors=gym.spaces.MultiBinary(3),
    )

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return self.observation_space.sample(), 1.0, self.np_random.random() < 0.1, False, {}


SPACES = {
    "Discrete": gym.spaces.Discrete(3, start=-1),
    "MultiDiscrete": gym.spaces.MultiDiscrete([2, 5, 3]),
    "MultiBinary": gym.spaces.MultiBinary(4),
    "Box": gym.spaces.Box(-0.5, 2, (2, 3)),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", SPACES)
def test_every_script_takes_every_space(script, name, tmp_path):
    env_id, kwargs = f"{name}-{script}-v0", dict(action_space=SPACES[name])
    gym.register(env_id, Toy, kwargs=kwargs, max_episode_steps=20)
    assert train(script, tmp_path / "run", env_id=env_id, total_steps=256) == 0
    kl = [float(row["kl"]) for row in read(tmp_path / "run")]
    assert np.isfinite(kl).all()


def test_tensorboard_files(tmp_path):
    """Of what a run has done after its checkpoint, and does again, the events count once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("ppo", tmp_path / "run", total_steps=256, tensorboard=True)
    shutil.copy(tmp_path / "run" / "checkpoint.pt", tmp_path)
    for total_steps in (512, 768):
        shutil.copy(tmp_path / "checkpoint.pt", tmp_path / "run")  # as if it had been killed
        resume("ppo", tmp_path / "run", total_steps=total_steps)
    events = EventAccumulator(str(tmp_path / "run")).Reload().Scalars("kl")
    assert len(events) == 7
    assert [event.step for event in events] == [int(row["step"]) for row in read(tmp_path / "run")]


def test_plot(tmp_path):
    for script in ("ppo", "trpo"):
        for seed in (1, 2):
            train(script, tmp_path / f"{script}{seed}", total_steps=500, seed=seed)
    runs = plot.read_runs([str(tmp_path)], "return_last100")
    assert {script: len(series) for script, series in runs["CartPole-v1"].items()} == {
        "ppo": 2,
        "trpo": 2,
    }
    rows = [row for row in read(tmp_path / "ppo1") if row["return_last100"]]
    series = runs["CartPole-v1"]["ppo"][0]
    for column in ("step", "return_last100"):
        assert series[column].tolist() == [float(row[column]) for row in rows]
    picture = tmp_path / "curves.png"
    plot.main(plot.Args(run_dirs=[str(tmp_path)], output=str(picture)))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [r"$\nonsense$", "", 5])
def test_a_plot_takes_any_name_as_it_is(name, tmp_path):
    train("ppo", tmp_path / "run", total_steps=500)
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "run" / "config.json").write_text(
        json.dumps(config | {"script": name}), encoding="utf-8"
    )
    plot.main(plot.Args([str(tmp_path)], str(tmp_path / "curves.png")))
    assert (tmp_path / "curves.png").exists()


def test_plots_keep_options_of_the_environment_apart(tmp_path):
    kwargs = '{"sutton_barto_reward": true}'
    train("ppo", tmp_path / "plain", total_steps=500)
    train("ppo", tmp_path / "other", total_steps=500, env_kwargs=kwargs)
    runs = plot.read_runs([str(tmp_path)], "return_last100")
    assert sorted(runs) == ["CartPole-v1", f"CartPole-v1 {kwargs}"]


def test_plots_keep_runs_of_another_length_apart_and_take_a_run_once(tmp_path, capsys):
    """With annealing a longer run is not the same one continued."""
    train("ppo", tmp_path / "first", total_steps=500)
    train("ppo", tmp_path / "second", total_steps=500, seed=2)
    shutil.copytree(tmp_path / "first", tmp_path / "the_first_again")
    train("ppo", tmp_path / "longer", total_steps=1100)
    capsys.readouterr()
    runs = plot.read_runs([str(tmp_path)], "return_last100")["CartPole-v1"]
    found = {label: len(series) for label, series in runs.items()}
    assert found == {"ppo --total-steps 500": 2, "ppo --total-steps 1100": 1}
    said = f"{tmp_path / 'the_first_again'} is left out: {tmp_path / 'first'} has the same options"
    assert said in capsys.readouterr().out


def test_plots_take_the_longest_of_the_runs_of_a_seed(tmp_path, capsys):
    """One that was given up is before the one in its place, by name."""
    train("ppo", tmp_path / "seed1", total_steps=800)
    for name in ("seed1-2", "seed1-3"):
        shutil.copytree(tmp_path / "seed1", tmp_path / name)
    rows = (
        (tmp_path / "seed1" / "metrics.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    )
    (tmp_path / "seed1" / "metrics.csv").write_text("".join(rows[:-2]), encoding="utf-8")
    ((run,),) = plot.read_runs([str(tmp_path)], "return_last100")["CartPole-v1"].values()
    assert len(run) == len(rows) - 1
    out = capsys.readouterr().out
    for name in ("seed1", "seed1-3"):
        assert f"{tmp_path / name} is left out: {tmp_path / 'seed1-2'} has the same options" in out


def test_plots_keep_apart_what_makes_another_batch_or_environment(tmp_path):
    """Workers, which are in config.json but no option, and the form of the environment."""
    train("ppo", tmp_path / "alone", total_steps=300)
    config = json.loads((tmp_path / "alone" / "config.json").read_text(encoding="utf-8"))
    assert config["workers"] == 1
    for name, change in [("many", dict(workers=4)), ("old", {})]:
        shutil.copytree(tmp_path / "alone", tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    del config["workers"]  # as in runs of before it was kept
    config["args"]["seed"] = 2
    (tmp_path / "old" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    runs = plot.read_runs([str(tmp_path)], "return_last100")["CartPole-v1"]
    assert {k: len(x) for k, x in runs.items()} == {"ppo --workers 1": 2, "ppo --workers 4": 1}
    config["args"]["vectorization_mode"] = "async"
    (tmp_path / "many" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    runs = plot.read_runs([str(tmp_path)], "return_last100")["CartPole-v1"]
    assert len(runs) == 2


@pytest.mark.slow
def test_profiles_of_scripts_that_have_no_environment_in_common(tmp_path, capsys):
    for script, env_id in [("ppo", "CartPole-v1"), ("trpo", "CartPole-v0")]:
        options = dict(env_id=env_id, total_steps=8000)
        train(script, tmp_path / "runs" / script, **options)
        train("vanilla_pg", tmp_path / "random" / script, policy_lr=0.0, **options)
    folders = dict(random=str(tmp_path / "random"), profiles=str(tmp_path / "profiles.png"))
    with pytest.raises(SystemExit):
        plot.main(plot.Args([str(tmp_path / "runs")], output="", **folders))
    assert "no script has runs of all of these: CartPole-v1, CartPole-v0" in capsys.readouterr().err


def test_the_last_words_name_a_command_only_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    train("ppo", tmp_path / "here", total_steps=128)
    assert f"evaluate: python -m tools.evaluate {tmp_path / 'here'}" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)  # such as with a copy of the script
    train("ppo", tmp_path / "there", total_steps=128)
    assert capsys.readouterr().out.endswith(f"run: {tmp_path / 'there'}\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_gives_the_signals_back(script, tmp_path):
    """In a project of one's own, or a notebook, Ctrl-C works afterward as before."""
    handlers = [(signum, signal.getsignal(signum)) for signum in (signal.SIGINT, signal.SIGTERM)]
    train(script, tmp_path / "run", total_steps=128)
    assert handlers == [(signum, signal.getsignal(signum)) for signum, _ in handlers]


def test_all_runs_of_a_length_count_to_the_end():
    kinds = [("step", float), ("return_last100", float)]
    ends = [(1000, 8), (990, 2), (500, 100)]  # two that are done, and one that is half done
    runs = [np.array([(0, 0), end], kinds) for end in ends]
    axes = pyplot.figure().add_subplot()
    plot.draw(axes, runs, "return_last100", "ppo")
    steps, means = axes.lines[0].get_data()
    assert (steps[-1], means[-1]) == (1000, 5)
    assert axes.lines[0].get_color() == "C3"  # ppo's in every panel
    early = steps[99]  # of the half-done run too
    assert means[99] == pytest.approx((early / 1000 * 8 + early / 990 * 2 + early / 5) / 3)


def test_what_runs_end_with():
    kinds = [("step", float), ("return_last100", float)]
    runs = [np.array([(10, 1), (1000 + i, end)], kinds) for i, end in enumerate([2, -7.25, 1234.5])]
    sentence = plot.last(runs, "return_last100")
    assert sentence == "ends with 2 (-7.25 to 1,234) at step 1,002 (runs: 3)"
    assert plot.last(runs[1:2], "return_last100") == "ends with -7.25 at step 1,001 (runs: 1)"


def test_steps_to_reach_a_bar():
    kinds = [("step", float), ("return_last100", float), ("episodes", float)]
    early = np.array([(10, 480, 5), (20, 470, 99), (30, 475, 100), (40, 490, 104)], kinds)
    late = np.array([(10, 20, 50), (20, 100, 120), (50, 500, 140)], kinds)
    never = np.array([(10, 20, 150)], kinds)
    sentence = plot.steps_to_reach([early, late, never], "return_last100", 475)
    assert sentence == "2 of 3 runs reach 475, at step 40 (30 to 50)"
    assert plot.steps_to_reach([never], "return_last100", 475) == "0 of 1 runs reach 475"


@pytest.mark.slow
def test_evaluate_films_an_episode(tmp_path, capsys):
    train("ppo", tmp_path / "run", total_steps=128)
    evaluate.main(evaluate.Args(run_dir=str(tmp_path / "run"), episodes=2, video=True))
    assert "2 episodes, sampled actions: return" in capsys.readouterr().out
    (video,) = (tmp_path / "run" / "video").glob("*.mp4")
    assert b"ftyp" in video.read_bytes()[:16]


# A random policy gets 22 on CartPole and -1200 on Pendulum
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "env_id", "steps", "least"),
    [
        ("vanilla_pg", "CartPole-v1", 40_000, 250),
        ("is_pg", "CartPole-v1", 40_000, 250),
        ("trpo", "CartPole-v1", 40_000, 250),
        ("ppo", "CartPole-v1", 40_000, 250),
        ("trpo", "Pendulum-v1", 130_000, -400),
        ("ppo", "Pendulum-v1", 140_000, -400),
    ],
)
def test_it_learns_and_evaluates_as_it_trained(script, env_id, steps, least, tmp_path, capsys):
    module = importlib.import_module(script)
    module.main(module.Args(env_id=env_id, total_steps=steps, run_dir=str(tmp_path / "run")))
    trained = float(read(tmp_path / "run")[-1]["return_last100"])
    assert trained >= least
    capsys.readouterr()
    evaluate.main(evaluate.Args(run_dir=str(tmp_path / "run"), episodes=20))
    evaluated = float(capsys.readouterr().out.split("return ")[1].split(" ±")[0])
    assert evaluated >= least


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("script", ["vanilla_pg", "is_pg", "ppo"])
def test_without_a_step_the_policy_is_the_one_that_acted(script, env_id, tmp_path):
    """At a learning rate of 0 every ratio is 1: even the moments of observations wait."""
    train(script, tmp_path / "run", env_id=env_id, total_steps=600, policy_lr=0.0)
    rows = read(tmp_path / "run")
    assert len(rows) > 3
    for row in rows:
        numbers = [float(row[name]) for name in ("kl", "ratio_mean", "ratio_max", "ess")]
        assert numbers == pytest.approx([0, 1, 1, 1], abs=1e-6)
