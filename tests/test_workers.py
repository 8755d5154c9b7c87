"""Several workers: each has the weights that one with all the data would have."""

import csv
import importlib
import json
import signal

import gymnasium as gym
import numpy as np
import pytest
import torch
import worker
from processes import ROOT, Job, rows

import ppo

SCRIPTS = ["vanilla_pg", "is_pg", "trpo", "ppo"]
ENVIRONMENTS = {
    "discrete": dict(env_id="Drift-v0"),
    "continuous": dict(env_id="Drift-v0", env_kwargs='{"continuous": true}'),
    "images": dict(env_id="Drift-v0", wrappers=["worker:Image"]),
}
# One minibatch per epoch; the passes end before floating point has grown apart
SIZES = dict(num_steps=24, minibatch_size=10**6, total_steps=340, policy_epochs=3)
SIZES |= dict(value_epochs=3, hidden_size=16, cg_iters=4)
CASES = {
    3: [(script, "discrete") for script in SCRIPTS],
    2: [(script, "continuous") for script in SCRIPTS] + [("trpo", "images"), ("ppo", "images")],
}
EXACTLY = dict(by_rule=True, double=True)
APART = "ess", "weight_ess", "explained_variance", "seconds", "steps_per_second"  # of each worker


def arguments(script, name, run_dir, num_envs, **options):
    options = SIZES | ENVIRONMENTS[name] | dict(run_dir=str(run_dir), num_envs=num_envs) | options
    known = importlib.import_module(script).Args.__annotations__
    return {key: value for key, value in options.items() if key in known}


def read(run_dir):
    with open(run_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("count", CASES)
def test_workers_do_what_one_does_with_all_the_data(count, tmp_path):
    """On 6 environments in all; all workers have the same weights after each update."""
    processes = []
    for workers in (1, count):
        folder = tmp_path / str(workers)
        folder.mkdir()
        runs = [
            (script, arguments(script, name, folder / f"{script}-{name}", 6 // workers), EXACTLY)
            for script, name in CASES[count]
        ]
        processes += worker.start_workers(folder, workers, runs)
    for process in processes:
        process.join(300)
        assert process.exitcode == 0, [
            path.read_text(encoding="utf-8") for path in tmp_path.glob("*/stderr-*")
        ]
    for script, name in CASES[count]:
        alone, together = (tmp_path / str(k) / f"{script}-{name}" for k in (1, count))
        assert_same_runs(alone, together)
        files = [together.with_name(f"{script}-{name}-weights-{k}.pt") for k in range(count)]
        first, *others = map(torch.load, files)
        assert len(first) == 3
        for other in others:
            for step, same in zip(first, other, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(step, same, strict=True))
        assert not torch.equal(first[0][0], first[1][0])
        files = [together.with_name(f"{script}-{name}-seed-{k}.pt") for k in range(count)]
        assert len({torch.load(file) for file in files}) == count


def assert_same_runs(alone, together):
    rows, others = read(alone), read(together)
    assert len(rows) == len(others) == 3
    for row, other in zip(rows, others):
        for column in row.keys() - set(APART):
            one, many = (float(x[column] or "nan") for x in (row, other))
            where = f"{column} of {alone.name}"
            np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-7, err_msg=where)
    one, many = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (alone, together))
    assert one["progress"][:2] == many["progress"][:2]
    for part in ("policy", "value", "scaler"):
        assert one[part].keys() == many[part].keys()
        for key, x in one[part].items():
            torch.testing.assert_close(many[part][key], x, rtol=1e-5, atol=1e-7)


def test_workers_take_as_many_steps_each(tmp_path):
    """With minibatches of unequal numbers of transitions, down to one; each acts by itself."""
    options = dict(num_steps=20, num_envs=2, entropy_coef=0.01, total_steps=150)
    cases = dict(some=dict(minibatch_size=7), one=dict(minibatch_size=1))
    cases["kl"] = cases["again"] = dict(minibatch_size=7, policy_lr=0.01, target_kl=2e-3)
    alone = arguments("ppo", "discrete", tmp_path / "some", **options, minibatch_size=7)
    ppo.main(ppo.Args(**alone))
    cases["some"] |= dict(total_steps=400, resume=str(tmp_path / "some"))  # two go on with it
    runs = [
        ("ppo", arguments("ppo", "discrete", tmp_path / name, **(options | case)), {})
        for name, case in cases.items()
    ]
    for process in worker.start_workers(tmp_path, 2, runs):
        process.join(300)
        assert process.exitcode == 0, [
            path.read_text(encoding="utf-8") for path in tmp_path.glob("stderr-*")
        ]
    for name in cases:
        one, other = (torch.load(tmp_path / f"{name}-weights-{k}.pt") for k in (0, 1))
        rows = read(tmp_path / name)
        assert [int(row["iteration"]) for row in rows] == list(range(1, len(rows) + 1))
        assert len(one) >= 2
        seeds = {torch.load(tmp_path / f"{name}-seed-{k}.pt") for k in (0, 1)}
        assert len(seeds) == 2
        assert (
            json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))["workers"]
            == 2
        )
        for step, same in zip(one, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(step, same, strict=True))
    first, again = (tmp_path / f"{name}-weights-1.pt" for name in ("kl", "again"))
    for step, same in zip(torch.load(first), torch.load(again), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(step, same, strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:3"])
def test_each_worker_has_its_gpu(device, monkeypatch, tmp_path):
    """By its number on the machine; what is not on the GPU goes by gloo all the same."""
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "6")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", calls.append)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    envs = gym.make_vec("CartPole-v1", 2)
    envs.reset = lambda seed: 1 / 0  # that is enough
    monkeypatch.setattr(ppo, "make_envs", lambda *_: envs)
    with pytest.raises(SystemExit):
        ppo.main(ppo.Args(device=device, run_dir=str(tmp_path / "run")))
    both = ["cpu:gloo,cuda:nccl"]
    assert calls == {"cpu": ["gloo"], "cuda": [*both, 2], "cuda:3": both}[device]


@pytest.mark.slow
def test_workers_end_without_a_word(tmp_path):
    """Gloo's threads outlive the last message, and may abort a process that ends in order."""
    for k in range(4):
        options = ["--total-steps", 300, "--num-steps", 32, "--num-envs", 2, "--run-dir", f"run{k}"]
        ends = [job.end() for job in start_two([ROOT / "ppo.py", *options], tmp_path)]
        assert [(code, err) for code, _, err in ends] == [(0, ""), (0, "")]
        assert ends[0][1].endswith(f"\nrun: run{k}\n")
        assert ends[1][1] == ""


@pytest.mark.slow
def test_a_worker_names_the_folder_that_the_first_one_made(tmp_path):
    """Its name was taken; only the second worker sees the NaN in its own rewards."""
    (tmp_path / "run").mkdir()
    options = ["--env-id", "odd:Lost", "--env-kwargs", '{"how": "nan"}', "--run-dir", "run"]
    options += ["--num-envs", 1, "--num-steps", 64, "--seed", 4]
    first, second = start_two([ROOT / "ppo.py", *options], tmp_path)
    code, _, err = second.end()
    assert code == 1
    assert "in rewards or last observations: " in err
    assert "the last checkpoint is in run-2" in err
    assert first.end()[0] == 1  # by the moments that they share, or as the second is gone


def start_two(command, folder):
    """Two workers that train as one, with buffered output."""
    env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(worker.free_port()))
    ranks = [dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    return [Job(command, folder, **env, **rank, PYTHONUNBUFFERED="") for rank in ranks]


@pytest.fixture
def torchrun(tmp_path):
    """Two workers that torchrun has started, once two iterations are over."""
    options = ["--total-steps", 10**8, "--checkpoint-interval", 1e-9, "--run-dir", "run"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    job = Job([*launcher, ROOT / "ppo.py", *options], tmp_path)
    job.wait_for(lambda: rows(tmp_path / "run") > 2)
    yield job
    for process in job.alive():
        process.kill()


@pytest.mark.slow
def test_a_worker_that_dies_stops_the_others(torchrun, tmp_path):
    (process,) = torchrun.alive(RANK="1")
    process.kill()
    code, _, err = torchrun.end(timeout=60)
    assert code == 1
    assert "ppo.py: disk, memory or a worker failed" in err
    assert "--resume" in err
    assert torchrun.alive() == []
    resume_alone(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_workers_at_one_iteration(signum, torchrun, tmp_path):
    torchrun.process.send_signal(signum)
    _, out, err = torchrun.end(timeout=60)  # the exit code is torchrun's own
    assert "run: run\n" in out
    assert "ppo.py: " not in err
    assert torchrun.alive() == []
    iteration, step, *_ = ppo.load_checkpoint(tmp_path / "run")["progress"]
    last = read(tmp_path / "run")[-1]
    assert (int(last["iteration"]), int(last["step"])) == (iteration, step)
    resume_alone(tmp_path / "run")


def resume_alone(run_dir):
    """Without torchrun; there are as many workers as one likes."""
    checkpoint = ppo.load_checkpoint(run_dir)
    step = checkpoint["progress"][1]
    saved = checkpoint["args"] | dict(run_dir="run", resume=str(run_dir), total_steps=step + 3000)
    assert ppo.main(ppo.Args(**saved)) == 0
    steps = [int(row["step"]) for row in read(run_dir)]
    assert steps == sorted(set(steps))
    assert steps[-1] >= step + 3000
