"""Whatever stops a run, what is on disk stays whole: kills, full disks, races and signals."""

import csv
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import CONTEXT, ROOT, Job, command_line, main_of, rows

import ppo

SIZES = dict(num_envs=4, num_steps=32, minibatch_size=64, value_epochs=2, policy_epochs=2)
OFTEN = SIZES | dict(checkpoint_interval=1e-9)


def check_metrics(run_dir):
    """No torn line, no gap, no step twice. Returns the last iteration."""
    text = (run_dir / "metrics.csv").read_text(encoding="utf-8")
    assert text.endswith("\n") or not text
    lines = list(csv.reader(text.splitlines()))
    assert {len(line) for line in lines} <= {len(lines[0]) if lines else 0}
    assert [int(line[0]) for line in lines[1:]] == list(range(1, max(len(lines), 1)))
    steps = [int(line[1]) for line in lines[1:]]
    assert steps == sorted(set(steps))
    return len(steps)


def resume(run_dir, **options):
    saved = ppo.load_checkpoint(run_dir)["args"]
    return ppo.main(ppo.Args(**(saved | dict(resume=str(run_dir)) | options)))


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_killed_at_any_moment(env_id, tmp_path):
    """15 times: at a random moment, or in the middle of a checkpoint being written."""
    chance, resumed, in_writing = random.Random(env_id), 0, 0
    for k in range(15):
        for leftover in half_written(tmp_path):
            leftover.unlink()
        runs = sorted(tmp_path.glob("runs/*/ppo/*"), key=lambda run: len(run.name))
        saved = [run for run in runs if (run / "checkpoint.pt").exists()]
        arguments = OFTEN | dict(env_id=env_id, total_steps=10**7)
        if saved and k % 5:  # go on with the last; else a run of the same name as those before
            arguments = ppo.load_checkpoint(saved[-1])["args"] | dict(resume=str(saved[-1]))
            resumed += 1
            runs.remove(saved[-1])
        others = {path: path.read_bytes() for run in runs for path in run.glob("*.*")}
        process = CONTEXT.Process(target=main_of, args=("ppo", arguments, tmp_path))
        process.start()
        end = time.time() + (chance.uniform(0, 1.5) if k % 2 else 30)
        while time.time() < end and not (k % 2 == 0 and half_written(tmp_path, again=True)):
            time.sleep(1e-4)
        assert process.is_alive()
        process.kill()
        process.join(300)
        in_writing += len(half_written(tmp_path))
        after = sorted(tmp_path.glob("runs/*/ppo/*"), key=lambda run: len(run.name))
        assert all(path.read_bytes() == content for path, content in others.items())
        for run in after:
            if not (run / "metrics.csv").exists():
                continue
            check_metrics(run)
            if (run / "checkpoint.pt").exists():
                iteration, step, *_ = ppo.load_checkpoint(run)["progress"]
                copy = Path(shutil.copytree(run, tmp_path / f"copy{k}-{run.name}"))
                assert resume(copy, total_steps=step + 200) == 0
                assert check_metrics(copy) > iteration
    assert resumed == 12
    assert in_writing


def half_written(folder, again=False):
    """Checkpoints that are not whole yet; or only those that will not be the first of their run."""
    files = folder.glob("runs/*/ppo/*/checkpoint.tmp")
    return [path for path in files if not again or path.with_suffix(".pt").exists()]


@pytest.fixture
def run(tmp_path):
    ppo.main(ppo.Args(total_steps=200, run_dir=str(tmp_path / "run"), **OFTEN))
    return tmp_path / "run"


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_place_of_the_last(run, monkeypatch):
    """After a power cut a file that was not synced may be empty, under whatever name."""
    calls, fsync, replace = [], os.fsync, os.replace

    def spy_fsync(descriptor):
        new = run / "checkpoint.tmp"
        is_new = new.exists() and os.path.samestat(os.fstat(descriptor), new.stat())
        calls.append(str(new) if is_new else "another file")
        return fsync(descriptor)

    def spy_replace(source, target):
        calls.append((str(source), str(target)))
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    resume(run, total_steps=300)
    writes = [call for call in calls if "config" not in str(call)]
    one = [f"{run}/checkpoint.tmp", (f"{run}/checkpoint.tmp", f"{run}/checkpoint.pt")]
    assert writes == one * (len(writes) // 2) != []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_leaves_the_last_checkpoint(run, capsys):
    before = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.tmp").symlink_to("/dev/full")
    assert command_line("ppo", "--resume", run, "--total-steps", 1000) == 1
    out, err = capsys.readouterr()
    assert "No space left on device" in err
    assert "Traceback" not in out + err
    assert (run / "checkpoint.pt").read_bytes() == before
    (run / "checkpoint.tmp").unlink()  # there is space again
    assert resume(run, total_steps=1000) == 0
    check_metrics(run)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_disk_that_gets_full_amid_a_checkpoint(share, run, tmp_path):
    """Files can only be half as large as the checkpoint is, or lack room for its last byte."""
    before = (run / "checkpoint.pt").read_bytes()
    shutil.copytree(run, tmp_path / "copy")
    resume(tmp_path / "copy", total_steps=300)  # one iteration
    size = (tmp_path / "copy" / "checkpoint.pt").stat().st_size
    args = run, int(share * size) - 1, tmp_path / "stderr"
    process = CONTEXT.Process(target=resume_with_little_space, args=args)
    process.start()
    process.join(300)
    assert process.exitcode == 1
    assert "File too large" in (tmp_path / "stderr").read_text(encoding="utf-8")
    assert 0 < (run / "checkpoint.tmp").stat().st_size < size
    assert (run / "checkpoint.pt").read_bytes() == before
    assert resume(run, total_steps=1000) == 0
    check_metrics(run)


def resume_with_little_space(run_dir, size, stderr):
    sys.stdout, sys.stderr = (
        open(os.devnull, "w", encoding="utf-8"),
        open(stderr, "w", encoding="utf-8", buffering=1),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    sys.exit(command_line("ppo", "--resume", run_dir, "--total-steps", 1000))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError("Unable to allocate 9.00 TiB for an array"),
    ],
    ids=["gpu", "cpu", "numpy"],
)
def test_memory_that_runs_out_is_no_bug(error, run, capsys, monkeypatch):
    def run_out(*_):
        raise error

    before = (run / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(torch.Tensor, "backward", run_out)
    assert command_line("ppo", "--resume", run, "--total-steps", 1000) == 1
    err = capsys.readouterr().err
    words = f"{type(error).__name__}: {error} (test_crashes.py, line "
    assert err.startswith(f"ppo.py: disk, memory or a worker failed: {words}")
    assert err.count("\n") == 1
    assert (run / "checkpoint.pt").read_bytes() == before


def test_a_bug_is_shown_with_its_traceback(run, monkeypatch):
    def multiply(*_):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(torch.Tensor, "backward", multiply)
    with pytest.raises(RuntimeError, match="shapes"):
        command_line("ppo", "--resume", run, "--total-steps", 1000)


def test_a_shorter_or_missing_csv_gets_no_hole(run):
    (run / "metrics.csv").unlink()
    resume(run, total_steps=300)
    lines = (run / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("iteration,step,")
    assert lines[1].startswith("3,")
    assert len(lines) == 2


def test_a_name_that_is_taken_in_the_last_instant(tmp_path, monkeypatch):
    mkdir, taken = Path.mkdir, []

    def outrun(self, *args, **kwargs):
        if self.name.startswith("run") and len(taken) < 2:  # by somebody else
            mkdir(self)
            (self / "metrics.csv").write_text("theirs", encoding="utf-8")
            taken.append(self.name)
        return mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", outrun)
    ppo.main(ppo.Args(total_steps=100, run_dir=str(tmp_path / "run"), **SIZES))
    assert taken == ["run", "run-2"]
    assert all(
        (tmp_path / name / "metrics.csv").read_text(encoding="utf-8") == "theirs" for name in taken
    )
    check_metrics(tmp_path / "run-3")


def test_runs_that_start_at_once_have_folders_of_their_own(tmp_path):
    barrier = CONTEXT.Barrier(4)
    args = "ppo", SIZES | dict(total_steps=100), tmp_path, barrier
    processes = [CONTEXT.Process(target=main_of, args=args) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    runs = list(tmp_path.glob("runs/CartPole-v1/ppo/*"))
    assert sorted(run.name for run in runs) == ["seed1", "seed1-2", "seed1-3", "seed1-4"]
    assert all(check_metrics(run) == 1 for run in runs)


# Signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", ["make_envs", "collect", "update_policy", "save"])
def test_a_signal_in_any_phase_saves_the_iteration(phase, signum, tmp_path, monkeypatch):
    owner, name = (torch, "save") if phase == "save" else (ppo, phase)
    original, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == (1 if phase == "make_envs" else 3):
            os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        run_dir = tmp_path / "run"
        code = ppo.main(ppo.Args(total_steps=10**6, run_dir=str(run_dir), **OFTEN))
    finally:
        signal.signal(signal.SIGINT, handlers[0])
        signal.signal(signal.SIGTERM, handlers[1])
    assert code == 128 + signum
    iteration = check_metrics(run_dir)
    # While it saves, the decision to go on is made: one more iteration follows
    assert iteration == {"make_envs": 1, "save": 4}.get(phase, 3)
    assert ppo.load_checkpoint(run_dir)["progress"][0] == iteration


def test_the_exit_code_is_of_the_first_signal(tmp_path, monkeypatch):
    update_policy = ppo.update_policy

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return update_policy(*args)

    monkeypatch.setattr(ppo, "update_policy", interrupted)
    assert ppo.main(ppo.Args(total_steps=10**6, run_dir=str(tmp_path / "run"), **OFTEN)) == 130


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_environments_in_processes_of_their_own_end_too(signum, tmp_path):
    """A terminal sends its signal to all of them."""
    options = ["--vectorization-mode", "async", "--num-envs", 3, "--num-steps", 32]
    options += ["--total-steps", 10**8, "--checkpoint-interval", 1e-9, "--run-dir", "run"]
    job = Job([ROOT / "ppo.py", *options], tmp_path)
    job.wait_for(lambda: rows(tmp_path / "run") > 2)
    assert len(job.alive()) >= 4
    if signum == signal.SIGKILL:
        job.process.kill()
    else:
        os.killpg(job.process.pid, signum)
    code, _, err = job.end()
    assert code == (128 + signum if signum != signal.SIGKILL else -signum)
    deadline = time.time() + 10
    while job.alive() and time.time() < deadline:
        time.sleep(0.05)
    assert job.alive() == []
    assert "Traceback" not in err or signum == signal.SIGKILL  # Gymnasium says that it is alone
    iteration, step, *_ = ppo.load_checkpoint(tmp_path / "run")["progress"]
    if signum != signal.SIGKILL:
        assert check_metrics(tmp_path / "run") == iteration
    assert resume(tmp_path / "run", total_steps=step + 200, vectorization_mode=None) == 0
    check_metrics(tmp_path / "run")
