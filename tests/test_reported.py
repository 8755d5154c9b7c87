"""What users have met with environments, numbers and systems of their own."""

import csv
import importlib
import json
import math
import multiprocessing
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from gymnasium import spaces
from numpy.testing import assert_allclose
from processes import ROOT, Job, command_line, rows
from recording import Recorder, make_batch
from torch.distributions import Bernoulli, Categorical, kl_divergence

import is_pg
import ppo
import trpo
from common.networks import Normalizer, Policy
from common.returns import RewardScaler, gae

SCRIPTS = ["vanilla_pg", "is_pg", "trpo", "ppo"]
SMALL = dict(num_envs=2, num_steps=64, minibatch_size=32, value_epochs=2)
COMMAND = ["--num-envs", 2, "--num-steps", 64, "--minibatch-size", 32, "--run-dir", "run"]
NAN = math.nan
LINES = (ROOT / "tests" / "odd.py").read_text(encoding="utf-8").splitlines()
RAISES = next(i for i, line in enumerate(LINES, start=1) if "raise KeyError" in line)


def train(tmp_path, env_id, name="ppo", env_kwargs=None, **options):
    """Run a script here. Returns its folder, of which each call has one of its own."""
    script = importlib.import_module(name)
    run_dir = tmp_path / str(len(list(tmp_path.iterdir())))
    kwargs = json.dumps(env_kwargs or {})
    options = dict(env_id=f"odd:{env_id}", env_kwargs=kwargs, run_dir=str(run_dir)) | options
    script.main(script.Args(**(SMALL | options)))
    return run_dir


def metrics(run_dir):
    with open(run_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# An environment that fails


@pytest.mark.parametrize(
    ("name", "mode", "how", "words"),
    [
        ("ppo", "async", "killed", "its process ended, perhaps for lack of memory (EOFError"),
        ("trpo", "async", "string", "could not convert string to float"),
        ("is_pg", "sync", "string", "could not convert string to float"),
        ("ppo", "sync", "socket", "failed: ConnectionRefusedError: no simulator (odd.py, line "),
        ("trpo", "sync", "exit", "SystemExit:  (odd.py, line "),
        ("vanilla_pg", "sync", "error", f"KeyError: 'no such room' (odd.py, line {RAISES})"),
    ],
)
def test_an_environment_that_fails_ends_the_run_in_a_sentence(name, mode, how, words, tmp_path):
    kwargs = json.dumps(dict(how=how))
    options = ["--env-id", "odd:Lost", "--env-kwargs", kwargs, "--vectorization-mode", mode]
    job = Job([ROOT / f"{name}.py", *COMMAND, *options, "--total-steps", 10**6], tmp_path)
    code, _, err = job.end(timeout=120)
    assert code == 1
    assert err.count("\n") == 1, err
    assert f"{name}.py: an environment failed: " in err
    assert words in err
    assert not job.alive()
    assert importlib.import_module(name).load_checkpoint(tmp_path / "run")["progress"][1] > 0


@pytest.mark.parametrize(
    ("ending", "context"),
    [
        ("nan", "fork"),
        ("device", "fork"),
        ("SIGINT", "fork"),
        ("SIGINT", "spawn"),  # the default of macOS and Windows
        ("SIGINT", "forkserver"),  # that of Linux from Python 3.14 on
        ("SIGTERM", "fork"),
        ("SIGTERM", "spawn"),
    ],
)
def test_no_process_of_an_environment_outlives_the_run(ending, context, tmp_path):
    kwargs = dict(at=3 if ending == "nan" else 99, vector_kwargs=dict(context=context))
    options = ["--vectorization-mode", "async", "--total-steps", 10**7, "--env-id", "odd:Shown"]
    options += ["--env-kwargs", json.dumps(kwargs)]
    options += ["--device", "cuda:99"] if ending == "device" else []
    job = Job([ROOT / "ppo.py", *COMMAND, *options], tmp_path)
    if ending.startswith("SIG"):
        job.wait_for(lambda: rows(tmp_path / "run") > 1)
        for process in job.alive():  # as Ctrl-C in a terminal reaches all of them
            with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                process.send_signal(signal.Signals[ending])
    code, out, err = job.end(timeout=120)
    assert code == dict(nan=1, device=2, SIGINT=130, SIGTERM=143)[ending]
    assert err.count("\n") == (0 if ending.startswith("SIG") else 1), err
    assert "Traceback" not in out + err
    assert not job.alive()


@pytest.mark.parametrize("seed", [1, 4])  # the first environment is lost, or the second
def test_an_environment_that_is_lost_in_its_reset_is_not_waited_for(seed, tmp_path):
    options = ["--vectorization-mode", "async", "--env-id", "odd:Deaf", "--seed", seed]
    job = Job([ROOT / "ppo.py", *COMMAND, *options], tmp_path)
    code, _, err = job.end(timeout=50)
    assert (code, err.count("\n")) == (2, 1), err
    assert "cannot set up odd:Deaf: EOFError" in err
    assert "wrappers" not in err
    assert not job.alive()


@pytest.mark.parametrize("handler", ["SIG_DFL", "default_int_handler"])
def test_environments_that_are_not_closed_end_with_python(handler, tmp_path):
    """As where one calls make_envs alone: multiprocessing then ends its processes by SIGTERM."""
    code = f"import signal, ppo; signal.signal(signal.SIGTERM, signal.{handler}); "
    code += "envs = ppo.make_envs(ppo.Args(vectorization_mode='async'), 2); envs.reset()"
    job = Job(["-c", code], ROOT)
    assert job.end(timeout=60) == (0, "", "")
    assert not job.alive()


def test_only_processes_of_the_environments_are_ended(tmp_path):
    """They could not be set up, but had started a process; another was there before."""
    other = multiprocessing.Process(target=time.sleep, args=(60,))
    other.start()
    with pytest.raises(SystemExit):
        train(tmp_path, "Starting")
    assert multiprocessing.active_children() == [other]
    other.kill()
    other.join()


@pytest.mark.parametrize("output", ["read by no one", "none"])
def test_ctrl_c_saves_though_the_output_is_gone(output, tmp_path, monkeypatch):
    """As that of `python ppo.py | tee log`, where Ctrl-C ends tee as well; and as in pythonw."""
    if output == "none":
        monkeypatch.setattr(sys, "stdout", None)
        assert len(metrics(train(tmp_path, "Flags", total_steps=300))) == 3
        return
    options = ["--env-id", "odd:Flags", "--total-steps", 10**9]
    job = Job([ROOT / "ppo.py", *COMMAND, *options], tmp_path)
    job.wait_for(lambda: rows(tmp_path / "run") > 2)
    job.process.stdout.close()
    job.process.send_signal(signal.SIGINT)
    assert job.process.stderr.read() == ""
    assert job.process.wait(timeout=60) == 130
    last = metrics(tmp_path / "run")[-1]
    assert ppo.load_checkpoint(tmp_path / "run")["progress"][1] == int(last["step"])


def test_a_folder_that_leads_nowhere_is_said(tmp_path, capsys):
    """A link to a disk that is not there: no suffix would help."""
    (tmp_path / "runs").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "Flags", run_dir=str(tmp_path / "runs" / "one"))
    assert stop.value.code == 2
    assert "cannot set up the folder of the run: " in capsys.readouterr().err


# Numbers


@pytest.mark.parametrize("x", [-104.0, -103.0, -17.5, -2.0, 0.0, 0.3, 16.0, 16.5, 17.0, 90.0])
@pytest.mark.parametrize("shift", [-1.0, -0.5, 0.0, 0.4, 0.5])
def test_kl_of_policies_that_are_almost_sure(x, shift):
    """Against torch in double precision, which the probabilities of these logits need."""
    space = spaces.MultiBinary(1)
    head = Policy(Normalizer((2,)), space).head
    old, new = torch.tensor([[x]]), torch.tensor([[x + shift]], requires_grad=True)
    kl = kl_divergence(head(old), head(new))
    kl.sum().backward()
    y = torch.tensor([[x + shift]], dtype=torch.float64, requires_grad=True)
    exact = bernoulli_kl(old.double(), y)
    exact.sum().backward()
    rare = torch.sigmoid(-old.double().abs()).item() + 1e-30  # the smaller probability
    assert_allclose(kl.detach(), exact.detach()[0], rtol=1e-3, atol=1e-6 * rare)
    assert_allclose(new.grad, y.grad, rtol=1e-3, atol=1e-6 * rare)


def bernoulli_kl(x, y):
    """Σ p log(p / q) with log p = −log(1 + e⁻ˣ), which torch keeps exact for any x."""
    log_ratio = -torch.logaddexp(-x, 0 * x) + torch.logaddexp(-y, 0 * y)
    log_ratio_of_no = -torch.logaddexp(x, 0 * x) + torch.logaddexp(y, 0 * y)
    return torch.sigmoid(x) * log_ratio + torch.sigmoid(-x) * log_ratio_of_no


def test_kl_of_ordinary_policies_is_that_of_torch():
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 3)
    for space, usual in [(spaces.MultiBinary(3), Bernoulli), (spaces.Discrete(3), Categorical)]:
        head = Policy(Normalizer((2,)), space).head
        expected = kl_divergence(usual(logits=x), usual(logits=y))
        expected = expected.sum(-1) if usual is Bernoulli else expected
        assert_allclose(kl_divergence(head(x), head(y)), expected, rtol=1e-4, atol=1e-7)


def test_kl_of_choices_whose_probability_underflows():
    """KL((1 − ε, ε) ‖ (1 − ε′, ε′)) is at most ε (log ε − log ε′), far below one."""
    head = Policy(Normalizer((2,)), spaces.Discrete(2)).head
    old, new = head(torch.tensor([[0.0, -100.0]])), head(torch.tensor([[0.0, -120.0]]))
    assert new.probs[0, 1] == 0
    assert 0 <= kl_divergence(old, new).item() < 1e-40


@pytest.mark.slow
def test_trpo_finds_steps_for_buttons(tmp_path):
    """With torch's own KL three line searches in four failed, once the policy was sure."""
    options = dict(num_envs=8, num_steps=128, max_kl=0.1, gamma=0.5, total_steps=60_000)
    table = metrics(train(tmp_path, "Buttons", "trpo", **options))
    assert float(table[-1]["return_last100"]) > 195  # of 200
    assert sum(float(row["line_search_failed"]) for row in table[-30:]) <= 1


def overflowing(script, advantage):
    """A policy e¹⁰⁰ times as likely to do what was done, its batch with another transition, and
    the gradient of that one alone.
    """
    policy = Policy(Normalizer((1,)), spaces.Discrete(2), hidden_size=4)
    obs, actions = torch.tensor([[0.5], [-0.5]]), torch.tensor([1, 0])
    old_dist = Categorical(logits=torch.tensor([[0.0, -100.0], [0.0, 0.0]]))
    mask = torch.ones(1, 2, dtype=torch.bool)
    fields = dict(obs=obs, actions=actions, advantages=torch.tensor([advantage, 1.0]))
    batch = make_batch(script, old_dist, **fields, valid=mask, done=mask)
    other = policy(obs[1:]).log_prob(actions[1:])
    slopes = torch.autograd.grad(other.sum() / 2, list(policy.parameters()))
    return policy, batch, torch.cat([slope.flatten() for slope in slopes])


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("script", [ppo, is_pg], ids=["ppo", "is_pg"])
def test_a_ratio_that_overflows_leaves_the_gradient_finite(script, advantage):
    policy, batch, expected = overflowing(script, advantage)
    recorder = Recorder(policy)
    script.update_policy(policy, recorder, batch, script.Args(policy_epochs=1))
    assert torch.cosine_similarity(recorder.gradients[0], expected, dim=0) > 0.999


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_that_overflows_leaves_the_gradient_of_trpo_finite(advantage, monkeypatch):
    policy, batch, expected = overflowing(trpo, advantage)
    seen = []

    def conjugate_gradient(matvec, b, iters, tolerance):
        seen.append(b)
        return 0 * b, 0.0  # no step

    monkeypatch.setattr(trpo, "conjugate_gradient", conjugate_gradient)
    trpo.update_policy(policy, batch, trpo.Args())
    assert torch.cosine_similarity(seen[0], expected, dim=0) > 0.999


# Environments of all kinds


@pytest.mark.parametrize("truncates", [False, True])
@pytest.mark.parametrize("name", SCRIPTS)
def test_nan_after_an_episode_matters_only_if_it_was_truncated(name, truncates, tmp_path, capsys):
    """V of the last observation is part of the returns only if the episode could go on."""
    options = dict(name=name, env_kwargs=dict(truncates=truncates), total_steps=500)
    if not truncates:
        run_dir = train(tmp_path, "Shown", **options)
        assert float(metrics(run_dir)[-1]["return_last100"]) > 3
        return
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "Shown", **options)
    assert stop.value.code == 1
    assert "in rewards or last observations" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("env_kwargs", "words"),
    [
        (dict(odd=math.inf, at=3), "observations[1]:"),
        (dict(odd=1e200, at=3), "observations[1]:"),  # no float32
        (dict(at=99, reward=math.inf), "rewards"),
        (dict(at=99, reward=1e200), "rewards"),
    ],
)
def test_nothing_infinite_is_saved(env_kwargs, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "Shown", env_kwargs=env_kwargs, total_steps=500)
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert f"NaN or infinity at step 0 in {words}" in err
    assert "nothing is saved" in err
    assert not list(tmp_path.glob("*/checkpoint.pt"))


def test_nan_in_a_weight_is_named_with_its_place(tmp_path, monkeypatch, capsys):
    update_value = ppo.update_value

    def poison(value, *rest):
        update_value(value, *rest)
        with torch.no_grad():
            value.net.layers[0].weight[5, 2] = math.nan

    monkeypatch.setattr(ppo, "update_value", poison)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "Shown", env_kwargs=dict(at=99), total_steps=500)
    assert stop.value.code == 1
    assert "in value.net.layers.0.weight[5, 2]: check" in capsys.readouterr().err


def test_gae_ignores_what_follows_an_end():
    """A_0 = r_0 − V(s_0) though V of the terminal state is NaN; step 1 only resets."""
    rewards, values = [[1.0], [0.0], [2.0]], [[0.5], [NAN], [0.25], [0.75]]
    end = np.array([[True], [False], [False]])
    advantages = gae(np.array(rewards), np.array(values), end, end, 0.9, 0.8)
    assert_allclose(advantages[[0, 2], 0], [0.5, 2 + 0.9 * 0.75 - 0.25], rtol=1e-12)


def test_reward_scaling_ignores_what_a_reset_pays():
    """Discounted returns are 1, then 2 after a reset: their standard deviation is a half."""
    scaler = RewardScaler(1, 0.9)
    rewards = np.array([[1.0], [NAN], [2.0]])
    done = np.array([[True], [False], [False]])
    valid = np.array([[True], [False], [True]])
    scaled = scaler(rewards, done, valid)
    assert_allclose(scaled[[0, 2], 0], [2, 4], rtol=1e-6)
    assert_allclose(scaler.discounted, [2])


@pytest.mark.parametrize("weighting", ["trajectory", "per-decision"])
def test_importance_weights_restart_after_an_impossible_action(weighting):
    """A weight of 0 at the end of an episode, log ρ = −∞, says nothing of the next one."""
    log_ratio = torch.tensor([-math.inf, 0.5])
    masks = dict(valid=torch.tensor([[True], [True]]), done=torch.tensor([[True], [False]]))
    batch = make_batch(is_pg, None, obs=log_ratio, advantages=torch.tensor([2.0, 3.0]), **masks)
    args = is_pg.Args(weighting=weighting)
    weights, weighted = is_pg.weighted_advantages(log_ratio, batch, args)
    assert_allclose(weights, [0, math.exp(0.5)], rtol=1e-6)
    assert_allclose(weighted, [0, 3 * math.exp(0.5)], rtol=1e-6)


@pytest.mark.parametrize("weighting", ["trajectory", "per-decision"])
def test_importance_weights_do_not_overflow(weighting):
    """A product of ratios is at most e²⁰."""
    log_ratio = torch.tensor([70.0, 70.0], requires_grad=True)
    masks = dict(valid=torch.tensor([[True], [True]]), done=torch.tensor([[False], [True]]))
    batch = make_batch(is_pg, None, obs=log_ratio, advantages=torch.tensor([1.0, 1.0]), **masks)
    weights, _ = is_pg.weighted_advantages(log_ratio, batch, is_pg.Args(weighting=weighting))
    assert_allclose(weights.detach(), [math.exp(20)] * 2, rtol=1e-6)
    log_ratio = torch.tensor([30.0, -15.0])  # the product of all, not of what is left of one
    weights, _ = is_pg.weighted_advantages(log_ratio, batch, is_pg.Args(weighting=weighting))
    assert_allclose(weights, [math.exp(20), math.exp(15)], rtol=1e-6)


def test_flags_may_be_of_any_type(tmp_path):
    """Eight iterations, in each of which a step in five resets."""
    tables = {}
    for flags in ("bool", "int64", "uint8", "float64"):
        run_dir = train(tmp_path, "Flags", env_kwargs=dict(flags=flags), total_steps=800)
        tables[flags] = without_times(metrics(run_dir))
    assert tables["bool"][0]["step"] == "104"  # 2 environments, 64 steps less 12 resets
    assert {row["return_mean"] for row in tables["bool"]} == {"4"}
    assert all(table == tables["bool"] for table in tables.values())


def test_arrays_may_be_of_another_library(tmp_path):
    foreign = metrics(train(tmp_path, "ForeignFlags", total_steps=300))
    own = metrics(train(tmp_path, "Flags", total_steps=300))
    assert without_times(foreign) == without_times(own)


def without_times(table):
    times = ("seconds", "steps_per_second")
    return [{name: x for name, x in row.items() if name not in times} for row in table]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "uint32", "uint64", "int64"])
def test_actions_may_be_of_any_integer_type(dtype, many, tmp_path):
    run_dir = train(tmp_path, "Bytes", env_kwargs=dict(dtype=dtype, many=many), total_steps=100)
    returns = float(metrics(run_dir)[0]["return_mean"]) / 9
    low, high = (0.5, 2.5) if many else (1.2, 2.8)  # 1.5 and 2 on average
    assert low < returns < high


def test_returns_that_are_all_alike_leave_nothing_to_explain(tmp_path):
    for name in SCRIPTS:
        [row] = metrics(train(tmp_path, "Same", name, total_steps=10))
        assert row["explained_variance"] == ""
        assert all(math.isfinite(float(x)) for x in row.values() if x)


# Options, checkpoints and systems


def test_a_checkpoint_with_other_options_says_which(tmp_path, capsys):
    run_dir = train(tmp_path, "Flags", total_steps=100)
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    checkpoint["args"]["step_size"] = checkpoint["args"].pop("policy_lr")
    torch.save(checkpoint, run_dir / "checkpoint.pt")
    assert command_line("ppo", "--resume", run_dir) == 2
    err = capsys.readouterr().err
    assert "{'step_size'}, unknown here" in err
    assert "lacks {'policy_lr'}" in err
    del checkpoint["args"]["step_size"]  # an option that is newer than the run has its default
    torch.save(checkpoint, run_dir / "checkpoint.pt")
    assert ppo.load_checkpoint(run_dir)["args"]["policy_lr"] == ppo.Args.policy_lr


@pytest.mark.parametrize("error", [NameError, RuntimeError, ValueError, TypeError])
def test_an_error_in_a_changed_network_shows_where_it_is(error, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise error("a mistake of mine")

    monkeypatch.setattr(ppo, "Policy", broken)
    with pytest.raises(error, match="a mistake of mine"):
        train(tmp_path, "Flags", total_steps=100)


def test_runs_leave_the_process_as_they_found_it(tmp_path):
    """Whether they end well, cannot begin or fail: handlers, threads, files, processes."""
    train(tmp_path, "Flags", total_steps=100, tensorboard=True)  # what is imported stays
    before = state_of_this_process()
    for k in range(3):
        mode = "async" if k else "sync"
        options = dict(total_steps=100, num_threads=2, vectorization_mode=mode)
        train(tmp_path, "Shown", tensorboard=True, env_kwargs=dict(at=99), **options)
        with pytest.raises(SystemExit):
            train(tmp_path, "Shown", env_kwargs=dict(at=3), **options)
        with pytest.raises(SystemExit):
            train(tmp_path, "Shown", device="cuda:99", env_kwargs=dict(at=99), **options)
        with pytest.raises(SystemExit):
            train(tmp_path, "NoSuch", **options)
    assert state_of_this_process() == before


def state_of_this_process():
    process = psutil.Process()
    for _ in range(100):  # threads need a moment to end
        if threading.active_count() == 1:
            break
        time.sleep(0.02)
    return dict(
        handlers=[signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)],
        threads=torch.get_num_threads(),
        running=threading.active_count(),
        files=sorted(file.path for file in process.open_files() if "events" in file.path),
        processes=[x.cmdline() for x in process.children() if "tracker" not in str(x.cmdline())],
    )


def test_a_run_in_a_thread(tmp_path):
    """There, no handler of signals can be set."""
    runs = []
    thread = threading.Thread(target=lambda: runs.append(train(tmp_path, "Flags", total_steps=100)))
    thread.start()
    thread.join()
    assert len(metrics(runs[0])) == 1


def test_a_rank_alone_is_not_a_worker(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # some schedulers set it for jobs of one process
    run_dir = train(tmp_path, "Flags", total_steps=100)
    assert (run_dir / "checkpoint.pt").exists()
    assert len(metrics(run_dir)) == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_where_the_encoding_has_no_greek(name, tmp_path):
    job = Job([ROOT / f"{name}.py", "--help"], tmp_path, PYTHONIOENCODING="ascii")
    code, out, err = job.end()
    assert (code, err) == (0, "")
    assert "discount, ?" in out


def test_steps_of_a_long_run_are_not_rounded(tmp_path):
    run_dir = train(tmp_path, "Flags", total_steps=100)
    run = ppo.Run(ppo.Args(run_dir=str(run_dir)))
    with open(run_dir / "long.csv", "w+", encoding="utf-8") as run.csv:
        run.events = None
        run.write({"step": 12_345_678_901, "episodes": 0, "kl": NAN, "value_loss": 1 / 3})
        run.csv.seek(0)
        assert run.csv.read() == "step,episodes,kl,value_loss\n12345678901,0,,0.333333333\n"
    run.close()


def test_a_device_without_double_precision_is_refused_in_a_sentence(tmp_path, capsys, monkeypatch):
    """As PyTorch does on Apple's GPUs."""
    ones = torch.ones

    def single_ones(*size, dtype=None, device=None):
        if dtype == torch.float64 and device == "mps":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return ones(*size, dtype=dtype, device="cpu")

    monkeypatch.setattr(torch, "ones", single_ones)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "Flags", device="mps")
    assert stop.value.code == 2
    assert "Cannot convert a MPS Tensor to float64" in capsys.readouterr().err
    assert not list(Path(tmp_path).iterdir())
