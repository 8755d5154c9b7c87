"""Any command line, checkpoint or config.json: done, or a sentence and its code."""

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import command_line

import ppo
import trpo
from tools import evaluate, plot

SCRIPTS = ["vanilla_pg", "is_pg", "trpo", "ppo"]
SIZES = dict(num_envs=2, num_steps=8, minibatch_size=8, policy_epochs=1, value_epochs=1)
FIXED = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

# Values for the options, by kind; most are right, so that other options are read too
texts = ["many", "1_000", "1e3", "0x10", "-0", "True", "None", "[]", "1,2", "", " ", "--seed"]
numbers = st.integers().map(str) | st.floats().map(str) | st.sampled_from(texts)
huge = st.sampled_from([10**12, 10**17, 10**18, 2**63, 10**25]).map(str)
few = st.sampled_from(["1", "2", "3"])  # as no work may be long
counts = few | few | few | st.sampled_from(["0", "-1", "1.5", *texts])
sizes = counts | huge | st.integers(max_value=3).map(str)
inside = st.sampled_from(["0", "1e-300", "0.1", "0.5", "0.999999", "1"])
outside = st.sampled_from(["1.5", "-0.1", "nan", "inf", "-inf", "1e300", "-0.0"])
fractions = inside | inside | outside | numbers
positives = st.sampled_from(["1e-300", "0.5", "1", "1e300", "inf", "0", "-1", "nan"]) | numbers
flags = st.sampled_from(["", "", "", "True", "no"])
objects = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
environments = ["CartPole-v1", "CartPole", "CartPole-v9", "CartPole-v0", "Pendulum-v1"]
environments += ["FrozenLake-v1", "Blackjack-v1", "nowhere:X-v0", "math:CartPole-v1"]
environments += ["a/b/c-v1", ":", "::"]
environments += ["ALE/Pong-v5", "HumanoidStandup-v2"]
wrappers = [
    "gymnasium.wrappers:ClipReward",
    "gymnasium.wrappers:TimeLimit",
    "math:pi",
    "no:X",
    "id",
]
kwargs = ["{}", "{", '{"render_mode": "none"}', '{"num_envs": 3}']
kwargs += ['{"max_episode_steps": 3}']
VALUES = {
    "env-id": st.sampled_from(environments) | st.text(max_size=8),
    "env-kwargs": st.sampled_from(kwargs) | objects.map(json.dumps),
    "wrappers": st.sampled_from(wrappers),
    "vectorization-mode": st.sampled_from(["sync", "vector_entry_point", "None", ""]),
    "device": st.sampled_from(["cpu", "cuda", "cuda:99", "meta", "mps", "cpu:1", "", "abacus"]),
    "run-dir": st.sampled_from(["", "run", "a/b", "file", "file/run", ".", "x" * 300, "taken"]),
    "resume": st.sampled_from(["", "saved", "foreign", "file", "nothing", "."]),
    "weighting": st.sampled_from(["step", "trajectory", "steps"]),
    "seed": st.integers(0, 2**70).map(str) | numbers,
}
KINDS = [
    (flags, "anneal-lr no-anneal-lr no-normalize-obs no-normalize-rewards"),
    (sizes, "num-envs num-steps hidden-size minibatch-size num-threads"),
    (counts, "total-steps policy-epochs value-epochs cg-iters backtrack-iters typo"),
    (fractions, "gamma gae-lambda value-lr policy-lr entropy-coef cg-damping backtrack-coef"),
    (positives, "clip-eps target-kl max-kl weight-cap max-grad-norm checkpoint-interval"),
]
VALUES |= {name: values for values, names in KINDS for name in names.split()}
choices = st.lists(
    st.sampled_from(sorted(VALUES)).flatmap(lambda name: st.tuples(st.just(name), VALUES[name])),
    max_size=4,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders with a run of ppo.py and one of trpo.py."""
    folder = tmp_path_factory.mktemp("fuzz")
    for script, name in [(ppo, "saved"), (trpo, "foreign")]:
        known = {key: x for key, x in SIZES.items() if key in script.Args.__annotations__}
        script.main(script.Args(run_dir=str(folder / name), total_steps=30, **known))
    return folder


@contextlib.contextmanager
def at_most(seconds):
    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def said(run, *args):
    """The exit code of a call, and what it prints; no other exception than SystemExit comes."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), at_most(60):
        try:
            code = run(*args)
        except SystemExit as stop:
            code = stop.code
    return code or 0, out.getvalue()


@pytest.mark.slow
@settings(FIXED, max_examples=700)
@given(script=st.sampled_from(SCRIPTS), chosen=choices)
def test_command_lines(saved, script, chosen):
    given = {"total-steps": "20"} | {k.replace("_", "-"): str(x) for k, x in SIZES.items()}
    if script == "trpo":
        del given["policy-epochs"]
    options = importlib.import_module(script).Args.__annotations__
    foreign = {
        name for name, _ in chosen if name.removeprefix("no-").replace("-", "_") not in options
    }
    given |= {name: x for name, x in chosen if name not in foreign or name == "typo"}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        Path(folder, "file").write_text("not a folder", encoding="utf-8")
        Path(folder, "taken").mkdir()
        there = set(Path(folder).rglob("*"))
        contents = {path: path.read_bytes() for path in there if path.is_file()}
        os.chdir(folder)
        try:
            options = [f"--{name}={x}" if x else f"--{name}" for name, x in given.items()]
            code, out = said(command_line, script, *options)
        finally:
            os.chdir(before)
        assert code in (0, 1, 2), out
        assert "Traceback" not in out
        assert there <= set(Path(folder).rglob("*"))
        if code:
            assert out.strip()
            assert all(path.read_bytes() == content for path, content in contents.items())
        if code == 2:
            assert set(Path(folder).rglob("*")) == there  # no part of a run is left behind
        if code == 1:
            assert f"{script}.py: " in out


def resumed(folder, damage=lambda content: content):
    """Exit code, output and checkpoint of a run that goes on with a copy of the saved one."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder / "saved", copy, dirs_exist_ok=True)
        path = Path(copy, "checkpoint.pt")
        damaged = damage(path.read_bytes())
        path.write_bytes(damaged)
        code, out = said(command_line, "ppo", "--resume", copy, "--total-steps", 60)
        if code:
            assert path.read_bytes() == damaged
        return code, out, torch.load(path, weights_only=True) if code == 0 else None


changes = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3
)


@pytest.mark.slow
@settings(FIXED, max_examples=250)
@given(changes=changes, cut=st.none() | st.floats(0, 1, exclude_max=True))
def test_damaged_checkpoints(saved, changes, cut):
    """Bits that are other than they were, or an end that is missing: never another result."""

    def damage(content):
        content = bytearray(content)
        for place, bits in changes:
            content[int(place * len(content))] ^= bits
        return bytes(content[: None if cut is None else int(cut * len(content))])

    code, out, checkpoint = resumed(saved, damage)
    assert "Traceback" not in out
    if code == 0:  # what is damaged is not read
        whole = resumed(saved)[2]
        assert checkpoint.keys() == whole.keys()
        for part in ("policy", "value", "scaler"):
            assert all(torch.equal(x, whole[part][name]) for name, x in checkpoint[part].items())
        assert torch.equal(checkpoint["rng"], whole["rng"])
        assert checkpoint["args"].keys() == whole["args"].keys()
    else:
        assert code == 2
        assert "no checkpoint.pt that can be read" in out


@pytest.mark.slow
@settings(FIXED, max_examples=150)
@given(content=objects.map(json.dumps) | st.text(max_size=20), at_once=st.booleans())
def test_edits_of_config_json(saved, content, at_once):
    """The tools say that it is no run of theirs; the checkpoint does not need the file."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(saved / "saved", Path(folder, "run")))
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        edited = json.dumps(config | {"script": content}) if at_once else content
        (run / "config.json").write_text(edited, encoding="utf-8")
        for tool, args in [
            (evaluate.main, evaluate.Args(str(run), episodes=1)),
            (plot.main, plot.Args([str(run)], str(run / "plot.png"))),
        ]:
            code, out = said(tool, args)
            assert (code, out.strip() != "") in [(0, True), (2, True)]
            assert "Traceback" not in out
        assert said(command_line, "ppo", "--resume", run, "--total-steps", 40)[0] == 0
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        assert config["script"] == "ppo"
