"""Progress, status lines, rows and checkpoints of a run, at times that the tests choose."""

import csv
import importlib
import io
import json
import math
import os
import re
import signal
import types
from dataclasses import fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import odd
import pytest
import torch
from recording import make_batch

import ppo
from common import workers
from common.networks import CategoricalHead, StableCategorical

SCRIPTS = ["vanilla_pg", "is_pg", "trpo", "ppo"]
SMALL = dict(num_envs=2, num_steps=64, minibatch_size=64, policy_epochs=1, value_epochs=1)
ROW = {"return_last100": 7.25, "return_mean": 99.0, "kl": 0.01, "steps_per_second": 20.0}


def arguments(tmp_path, env_id="odd:Flags", **options):
    return ppo.Args(**(SMALL | dict(env_id=env_id, run_dir=str(tmp_path / "run")) | options))


def metrics(tmp_path):
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def clock(monkeypatch):
    """Time as the tests set it: clock.now, in seconds."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(ppo.time, "time", lambda: clock.now)
    return clock


def advance(monkeypatch, clock, seconds):
    """Each rollout takes so many seconds."""
    collect = ppo.collect

    def slow(*args):
        clock.now += seconds
        return collect(*args)

    monkeypatch.setattr(ppo, "collect", slow)


def test_a_finished_run_does_not_train_again(tmp_path, capsys):
    """It is_over at once, since its step is at total_steps."""
    args = arguments(tmp_path, total_steps=200)
    ppo.main(args)
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    weights = ppo.load_checkpoint(tmp_path / "run")["policy"]
    again = ppo.Args(**(vars(args) | dict(resume=args.run_dir)))
    assert ppo.main(again) == 0
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before
    for name, x in ppo.load_checkpoint(tmp_path / "run")["policy"].items():
        assert torch.equal(x, weights[name])


def test_all_episodes_of_an_iteration_are_counted(tmp_path):
    """2 environments × 201 steps, of which every other one resets: 202 episodes of one step."""
    ppo.main(arguments(tmp_path, "odd:Same", num_steps=201, total_steps=10))
    [row] = metrics(tmp_path)
    assert (row["episodes"], row["step"]) == ("202", "202")


def test_seconds_go_on_after_a_resume(tmp_path, clock, monkeypatch):
    """10 s for each of 104 steps, then as long again; steps per second are those of all."""
    advance(monkeypatch, clock, 10.0)
    args = arguments(tmp_path, total_steps=200)
    ppo.main(args)
    clock.now += 5000  # between the runs
    ppo.main(ppo.Args(**(vars(args) | dict(resume=args.run_dir, total_steps=400))))
    rows = metrics(tmp_path)
    assert [float(row["seconds"]) for row in rows] == [10, 20, 30, 40]
    for row in rows:
        speed = int(row["step"]) / float(row["seconds"])
        assert float(row["steps_per_second"]) == pytest.approx(speed, rel=1e-8)


def test_a_checkpoint_is_saved_when_it_is_due_and_at_the_end(tmp_path, clock, monkeypatch):
    """Iterations of 10 s and an interval of 25 s: after the first, the fourth and the last."""
    advance(monkeypatch, clock, 10.0)
    saved = []
    monkeypatch.setattr(torch, "save", lambda checkpoint, file: saved.append(checkpoint))
    ppo.main(arguments(tmp_path, total_steps=500, checkpoint_interval=25.0))
    assert [checkpoint["progress"][0] for checkpoint in saved] == [1, 4, 5]


def test_rows_are_on_disk_before_the_run_ends(tmp_path, monkeypatch):
    save, rows = ppo.Run.save, []

    def spy(run):
        rows.append(len(metrics(tmp_path)))
        save(run)

    monkeypatch.setattr(ppo.Run, "save", spy)
    ppo.main(arguments(tmp_path, total_steps=300))
    assert rows == [1, 2, 3]


@pytest.mark.parametrize(("is_terminal", "interval"), [(False, 10.0), (True, 0.1)])
def test_status_lines(is_terminal, interval, tmp_path, clock, monkeypatch, capsys):
    """80 of 100 steps at 20 a second leave a second; in a terminal the line is cut to its width."""
    run = ppo.Run(arguments(tmp_path, total_steps=100))
    run.step = 80
    monkeypatch.setattr(ppo.sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setattr(os, "get_terminal_size", lambda: os.terminal_size((31, 24)))
    run.show(ROW)
    assert run.next_line == pytest.approx(clock.now + interval)
    line = "step 80/100 (80%)  ETA 0.0 min  return 7.2  KL 0.0100  20 steps/s"
    out = capsys.readouterr().out
    assert out == (f"\r\x1b[K{line[:30]}" if is_terminal else line + "\n")
    run.step = 120  # the last rollout went past the end
    run.show(ROW | {"steps_per_second": 0.01})
    assert "(120%)  ETA 0.0" in capsys.readouterr().out
    run.close()


def test_a_status_line_when_one_is_due_and_at_the_end(tmp_path, clock, monkeypatch, capsys):
    """Iterations of 4 s, lines 10 s apart: iterations 1, 4 and 5."""
    advance(monkeypatch, clock, 4.0)
    ppo.main(arguments(tmp_path, total_steps=500))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    steps = [row["step"] for row in metrics(tmp_path)]
    assert [line.split()[1] for line in lines] == [f"{steps[i]}/500" for i in (0, 3, 4)]


def test_options_of_the_caller_are_stronger_than_those_of_the_run(tmp_path):
    args = arguments(tmp_path, "odd:Shown", env_kwargs=json.dumps(dict(length=5, at=99)))
    envs = ppo.make_envs(args, 1, length=3)
    assert envs.unwrapped.envs[0].unwrapped.length == 3
    assert envs.unwrapped.envs[0].unwrapped.at == 99
    envs.close()


def test_a_checkpoint_of_other_weights_does_not_fit(tmp_path, capsys):
    args = arguments(tmp_path, total_steps=100)
    ppo.main(args)
    path = tmp_path / "run" / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["policy"]["net.layers.0.weight"] = torch.zeros(3, 3)
    torch.save(checkpoint, path)
    with pytest.raises(SystemExit) as stop:
        ppo.main(ppo.Args(**(vars(args) | dict(resume=args.run_dir, total_steps=300))))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "does not fit: Error(s) in loading state_dict for Policy: size mismatch" in said
    assert said.count("\n") == 1


def test_the_optimizers_go_on_where_they_were(tmp_path, monkeypatch):
    """Adam's own count of steps, of both networks."""
    args = arguments(tmp_path, total_steps=100)
    ppo.main(args)
    opened, parts = ppo.Run.open, {}
    monkeypatch.setattr(ppo.Run, "open", lambda run, x: parts.update(x) or opened(run, x))
    ppo.main(ppo.Args(**(vars(args) | dict(resume=args.run_dir, total_steps=200))))
    for name in ("policy_optimizer", "value_optimizer"):
        steps = {int(x["step"]) for x in parts[name].state.values()}
        assert steps == {4}, name  # two minibatches in each of two iterations


@pytest.mark.parametrize("name", ["gamma", "gae_lambda", "policy_lr", "entropy_coef"])
def test_both_ends_of_a_range_are_in_it(name):
    ppo.check(ppo.Args(**{name: 0.0}))
    ppo.check(ppo.Args(**{name: 1.0}))


def test_signs_of_rewards_do_not_hang_on_how_an_id_begins(tmp_path, monkeypatch):
    """Of ale_py:ALE/Pong-v5 as of ALE/Pong-v5; here rewards of 3 become 1, and V never moves."""
    scaled = []
    monkeypatch.setattr(ppo.RewardScaler, "forward", lambda self, x, *_: scaled.append(x) or x)
    for env_id in ("ALE/Three-v0", "odd:ALE/Three-v0", "Three-v0"):
        odd.gym.registry.pop(env_id.removeprefix("odd:"), None)
        kwargs = dict(reward=3.0, at=99)
        odd.gym.register(env_id.removeprefix("odd:"), odd.Shown, kwargs=kwargs)
        run_dir = str(tmp_path / env_id.replace("/", "-").replace(":", "-"))
        options = dict(vectorization_mode="sync", total_steps=100, run_dir=run_dir)
        ppo.main(arguments(tmp_path, env_id, **options))
    assert [x.max() for x in scaled] == [1, 1, 3]


def test_seeds_near_the_largest_fit(tmp_path, monkeypatch):
    """Environment i adds i, and all seeds have to stay below 2**31."""
    seeds = []

    class Envs(odd.Flags):
        def reset(self, *, seed=None, options=None):
            seeds.append(seed)
            return super().reset()

    monkeypatch.setattr(ppo, "make_envs", lambda args, num_envs: Envs(num_envs))
    run = ppo.Run(arguments(tmp_path))
    for run.seed in (2**31 - 3, 2**31 - 1, 2**31, 2**32 - 1):
        run.start_envs()
    run.close()
    assert all(0 <= seed <= 2**31 - 2 for seed in seeds)


PARTS = {
    "policy.net.layers.2.bias[1]": lambda policy, value, scaler: policy.net.layers[-1].bias,
    "value.net.layers.2.bias[0]": lambda policy, value, scaler: value.net.layers[-1].bias,
    "scaler.moments.mean[0]": lambda policy, value, scaler: scaler.moments.mean,
}


@pytest.mark.parametrize("name", PARTS)
def test_nan_in_any_part_of_a_run_is_named(name, tmp_path, monkeypatch, capsys):
    """It gets there after the update of the second iteration."""
    networks, collect, refuse_nan = [], ppo.collect, ppo.Run.refuse_nan

    def watch(envs, obs, done, policy, value, scaler, args):
        networks[:] = policy, value, scaler
        return collect(envs, obs, done, policy, value, scaler, args)

    def poison(run, batch):
        if run.iteration == 1:
            PARTS[name](*networks).data[-1] = math.nan
        refuse_nan(run, batch)

    monkeypatch.setattr(ppo, "collect", watch)
    monkeypatch.setattr(ppo.Run, "refuse_nan", poison)
    with pytest.raises(SystemExit) as stop:
        ppo.main(arguments(tmp_path, total_steps=500))
    assert stop.value.code == 1
    assert f"at step 104 in {name}: " in capsys.readouterr().err  # steps that reset do not count
    assert len(metrics(tmp_path)) == 1


def test_the_file_of_metrics_is_closed(tmp_path, monkeypatch):
    runs, finish = [], ppo.Run.finish
    monkeypatch.setattr(ppo.Run, "finish", lambda run: runs.append(run) or finish(run))
    ppo.main(arguments(tmp_path, total_steps=100))
    assert runs[0].csv.closed


def test_large_numbers_of_steps_are_written_in_full(tmp_path):
    run = types.SimpleNamespace(csv=io.StringIO(), events=None)
    ppo.Run.write(run, {"step": 12_345_678_901, "kl": 0.01234567891, "return_mean": math.nan})
    assert run.csv.getvalue() == "step,kl,return_mean\n12345678901,0.0123456789,\n"


def test_the_folder_is_named_after_the_environment(tmp_path, monkeypatch):
    """A slash or a colon would not do in the name of a folder everywhere."""
    monkeypatch.chdir(tmp_path)
    gym.register("corner/Flags", vector_entry_point=odd.Flags)
    ppo.main(arguments(tmp_path, env_id="odd:corner/Flags", run_dir="", total_steps=100, seed=7))
    assert (tmp_path / "runs" / "odd-corner-Flags" / "ppo" / "seed7" / "metrics.csv").exists()


class Announcing(odd.Flags):
    """Has an entry of its own under the key that Gymnasium's wrapper uses."""

    def step(self, actions):
        *rest, infos = super().step(actions)
        return *rest, infos | {"episode": {"r": self.count}, "_episode": self.count == 4}


def test_an_environment_may_tell_of_episodes_itself(tmp_path):
    gym.register("Announcing", vector_entry_point=Announcing)
    ppo.main(arguments(tmp_path, env_id="Announcing", total_steps=100))
    assert metrics(tmp_path)[0]["return_mean"] == "4"


def test_what_is_not_known_is_empty_in_a_row(tmp_path):
    """The first episode of 100 steps ends in the second iteration, of 64 steps each."""
    kwargs = '{"at": 999, "length": 100}'
    ppo.main(arguments(tmp_path, "odd:Shown", env_kwargs=kwargs, total_steps=200))
    unknown = ["return_mean", "return_min", "return_max", "length_mean", "return_last100"]
    first, second = metrics(tmp_path)
    assert [first[name] for name in unknown] == [""] * 5
    assert first["episodes"] == "0"
    assert second["episodes"] == "2"
    assert second["length_mean"] == "100"
    assert "" not in [second[name] for name in unknown]


def test_a_checkpoint_of_a_device_that_is_not_there_can_be_read(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        ppo.main(arguments(tmp_path, total_steps=100))
    weights = ppo.load_checkpoint(tmp_path / "run")["policy"].values()
    assert {x.device.type for x in weights} == {"cpu"}


def test_a_run_that_has_moved_resumes_where_it_is(tmp_path):
    args = arguments(tmp_path, total_steps=100)
    ppo.main(args)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    ppo.main(ppo.Args(**(vars(args) | dict(resume=str(moved), total_steps=200))))
    assert not (tmp_path / "run").exists()
    assert ppo.load_checkpoint(moved)["progress"][1] == 208


@pytest.mark.parametrize("change", ["rows that the checkpoint does not know", "rows are lost"])
def test_rows_after_a_crash(change, tmp_path):
    """A resumed run truncates its csv to the csv_size of the checkpoint, if it is that long."""
    args = arguments(tmp_path, total_steps=200)
    ppo.main(args)
    path = tmp_path / "run" / "metrics.csv"
    header, first, second = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [first] if change == "rows are lost" else [first, second, second]
    path.write_text("".join([header, *rows]), encoding="utf-8")
    ppo.main(ppo.Args(**(vars(args) | dict(resume=args.run_dir, total_steps=300))))
    expected = ["104", "310"] if change == "rows are lost" else ["104", "206", "310"]
    assert [row["step"] for row in metrics(tmp_path)] == expected
    assert b"\0" not in path.read_bytes()  # a file that is made longer is filled with these


def test_event_files_go_on_after_the_last_saved_step(tmp_path, monkeypatch):
    purged = []

    def make_writer(folder, purge_step):
        purged.append(purge_step)
        return types.SimpleNamespace(add_scalar=lambda *args: None, close=lambda: None)

    monkeypatch.setattr(ppo, "resolve_name", lambda name: make_writer)
    args = arguments(tmp_path, total_steps=100, tensorboard=True)
    ppo.main(args)
    ppo.main(ppo.Args(**(vars(args) | dict(resume=args.run_dir, total_steps=200))))
    assert purged == [1, 105]


def test_the_second_of_two_signals_kills(tmp_path):
    with ppo.Run(arguments(tmp_path)) as run:
        os.kill(os.getpid(), signal.SIGINT)
        assert run.signals == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == run.stop


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_a_signal_counts_only_in_the_process_of_the_run(is_elsewhere, signum, tmp_path):
    """Gymnasium also makes one environment in the process of the run."""
    with ppo.Run(arguments(tmp_path)) as run:
        assert ppo.ignore_signals("env", os.getpid() + is_elsewhere) == "env"
        os.kill(os.getpid(), signum)
        assert run.signals == ([] if is_elsewhere else [signum])


def test_the_number_of_workers_is_recorded(tmp_path, monkeypatch):
    opened = ppo.Run.open

    def open_as_one_of_three(run, parts):
        run.num_workers = 3
        opened(run, parts)
        run.num_workers = 1

    monkeypatch.setattr(ppo.Run, "open", open_as_one_of_three)
    ppo.main(arguments(tmp_path, total_steps=100))
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["workers"] == 3


def test_environments_close_although_a_process_of_theirs_is_lost(tmp_path):
    envs = ppo.make_envs(arguments(tmp_path, "odd:Shown", vectorization_mode="async"), 2)
    envs.reset()
    lost, other = envs.unwrapped.processes
    lost.kill()
    lost.join()
    envs.close()
    assert not other.is_alive()


def test_environments_close_although_training_fails(tmp_path, monkeypatch):
    """A callback does it: nothing else would close envs to which a traceback still refers."""
    made, make_envs = [], ppo.make_envs

    def make(*args):
        made.append(make_envs(*args))
        return made[0]

    def collect(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(ppo, "make_envs", make)
    monkeypatch.setattr(ppo, "collect", collect)
    with pytest.raises(ZeroDivisionError):
        ppo.main(arguments(tmp_path, "odd:Shown"))
    [envs] = made
    assert envs.unwrapped.closed


def test_a_signal_to_any_worker_ends_the_run(tmp_path, monkeypatch):
    """bool(self.signals) is False here, and True in the other worker."""

    def gather(x):
        return [x, True] if isinstance(x, bool) else [x]

    monkeypatch.setattr(ppo, "gather", gather)
    ppo.main(arguments(tmp_path, total_steps=1000))
    assert [row["step"] for row in metrics(tmp_path)] == ["104"]


def test_metrics_of_workers_are_weighted_by_their_transitions(tmp_path, monkeypatch):
    """average_metrics has all metrics, with len(batch.obs) as their weight: 104 of 128 steps."""
    seen = []

    def average_metrics(own, weight):
        seen.append((*own, weight))
        return workers.average_metrics(own, weight)

    monkeypatch.setattr(ppo, "average_metrics", average_metrics)
    ppo.main(arguments(tmp_path, total_steps=100))
    [of_all, own] = seen
    assert of_all[0] == "kl"
    assert of_all[-1] == 104
    assert own == ("clip_fraction", 104)


def test_metrics_are_averaged_in_double_precision():
    """float32 would make 1/3 of it 0.3333333433."""
    assert workers.average_metrics({"kl": 1 / 3}, 5) == {"kl": 1 / 3}


def test_epochs_end_by_the_kl_that_measure_says(monkeypatch):
    """It is that of all workers, not the mean KL of this one alone, which is 0."""
    kls, steps = iter([0.0, 9.0]), []
    monkeypatch.setattr(ppo, "measure", lambda policy, batch: {"kl": next(kls)})
    monkeypatch.setattr(ppo, "minimize", lambda *args: steps.append(args))
    dist = torch.distributions.Categorical(logits=torch.zeros(4, 2))
    ones = torch.ones(4)
    batch = make_batch(ppo, dist, obs=ones, actions=ones, advantages=ones)
    ppo.update_policy(lambda obs: dist, None, batch, ppo.Args(target_kl=1.0))
    assert len(steps) == 1


def test_a_step_counts_with_as_many_transitions_as_it_has(monkeypatch):
    """Between workers, whose minibatches have unequal lengths."""
    sizes = []
    monkeypatch.setattr(ppo, "minimize", lambda loss, optimizer, size, args: sizes.append(size))
    fields = dict(obs=torch.zeros(10, 1), actions=torch.zeros(10), advantages=torch.ones(10))
    fields |= dict(returns=torch.zeros(10), fewest=10)
    old_dist = torch.distributions.Categorical(logits=torch.zeros(10, 2))
    batch = make_batch(ppo, old_dist, **fields)
    args = ppo.Args(minibatch_size=4, policy_epochs=1, value_epochs=1)

    def policy(obs):
        return torch.distributions.Categorical(logits=torch.zeros(len(obs), 2))

    ppo.update_policy(policy, None, batch, args)
    ppo.update_value(lambda obs: torch.zeros(len(obs)), None, batch, args)
    assert sizes == [4, 4, 2] * 2


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64, np.int8])
def test_sizes_of_choices_have_any_integer_type(dtype):
    """nvec has the space's type, and torch does little with a tensor of unsigned sizes."""
    head = CategoricalHead(gym.spaces.MultiDiscrete([2, 4], dtype=dtype))
    assert head.shape == (2, 4)
    assert head.padding.tolist() == [[0, 0, -1e9, -1e9], [0, 0, 0, 0]]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_ratio_that_would_overflow_is_e_to_the_20(script):
    """The old policy was certain of the other action of the first transition."""
    script = importlib.import_module(script)
    old = StableCategorical(logits=torch.tensor([[0.0, -1000.0], [0.0, 0.0]]))
    actions = torch.tensor([1, 0])
    returns = torch.tensor([1.0, 2.0])
    batch = make_batch(script, old, actions=actions, returns=returns, values=torch.zeros(2))
    uniform = StableCategorical(logits=torch.zeros(2, 2))
    metrics = script.measure(lambda obs: uniform, batch)
    assert metrics["ratio_max"] == pytest.approx(math.exp(20))
    assert metrics["ratio_mean"] == pytest.approx((math.exp(20) + 1) / 2)
    assert metrics["ess"] == pytest.approx(0.5)
    assert metrics["kl"] == pytest.approx(math.log(2) / 2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_options_of_adam(script, tmp_path):
    script = importlib.import_module(script)
    options = SMALL | dict(env_id="odd:Flags", run_dir=str(tmp_path / "run"), total_steps=100)
    options = {name: x for name, x in options.items() if name in script.Args.__annotations__}
    script.main(script.Args(**options))
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    names = [name for name in checkpoint if name.endswith("optimizer")]
    assert len(names) == (1 if script.__name__ == "trpo" else 2)
    expected = dict(eps=1e-5, betas=(0.9, 0.999), weight_decay=0)
    expected |= dict(amsgrad=False, maximize=False)
    for name in names:
        (group,) = checkpoint[name]["param_groups"]
        assert {option: group[option] for option in expected} == expected


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_a_range(script, capsys):
    """None may be negative, or NaN."""
    script = importlib.import_module(script)
    for field in fields(script.Args):
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            for x in (-1, math.nan):
                with pytest.raises(SystemExit, match="2"):
                    script.check(script.Args(**{field.name: x}))
                option = f"--{field.name.replace('_', '-')} must be"
                assert option in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_leaves_config_json_whole(tmp_path):
    args = arguments(tmp_path, total_steps=100)
    ppo.main(args)
    config = tmp_path / "run" / "config.json"
    before = config.read_bytes()
    (tmp_path / "run" / "config.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        ppo.main(ppo.Args(**(vars(args) | dict(resume=args.run_dir, total_steps=300))))
    assert config.read_bytes() == before


def test_an_error_of_two_lines_is_described_by_its_first():
    try:
        raise ValueError("one\ntwo")
    except ValueError as error:
        described = ppo.describe(error)
    assert re.fullmatch(r"ValueError: one \(test_bookkeeping.py, line \d+\)", described)
