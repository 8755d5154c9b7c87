"""The figures and tables of docs/why_the_ratio.md are of what they say."""

import contextlib
import csv
import importlib
import io
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from recording import make_batch

import is_pg
import ppo
import vanilla_pg
from tools import exact, plot, sweep, why

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "why_the_ratio.md").read_text(encoding="utf-8")
OF_RESULTS = why.TABLES  # in docs/results/README.md
ARGS = why.Args(output=str(ROOT / "docs" / "why"), results=str(ROOT / "docs" / "results"))


def printed(figure):
    """The table that the tool prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        why.MAKERS[figure](pyplot, ARGS)
    pyplot.close("all")
    return [line for line in out.getvalue().splitlines() if line.startswith("|")]


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["reuse", "update", "weights", *OF_RESULTS])
def test_tables_of_the_document(figure, monkeypatch):
    if figure == "reuse":  # medians; the intervals are the picture's
        monkeypatch.setattr(plot, "REPS", 10)
    results = (ROOT / "docs/results/README.md").read_text(encoding="utf-8")
    page = results if figure in OF_RESULTS else DOCUMENT
    table = printed(figure)
    assert len(table) > 3
    assert "\n".join(table) in page, f"python -m tools.why {figure} prints another table"


@pytest.mark.text
def test_what_the_document_names_is_there():
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*.py"))
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("common/*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in scripts)
    names = set(re.findall(r"`(\w+)`", DOCUMENT))
    assert len(names) > 12
    for name in names - {"step", "trajectory"}:
        assert f"def {name}(" in tests + code, name
    lines = [line for line in DOCUMENT.splitlines() if re.match("    .* = .*[(]|    if ", line)]
    quoted = [line.strip() for line in lines if not re.search("[=≈] E|φ", line)]
    assert len(quoted) == 5
    for line in quoted:
        assert line in code, line
    for target in re.findall(r"\]\(([\w/.]+)\)", DOCUMENT):
        assert (ROOT / "docs" / target).exists(), target
    commands = re.findall(r"python -m tools\.why (\w+)", DOCUMENT)
    assert set(commands) == set(why.FIGURES) - set(OF_RESULTS)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_slopes(advantage):
    """∂(log ρ A)/∂ρ = A/ρ, ∂(ρ A)/∂ρ = A, and 0 where the clip cuts a gain off."""
    ratios = torch.tensor([0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 1.9]).double()
    flat = [4, 6] if advantage > 0 else [-1, 1]  # of the places 0 … 6: 5, 6 or 0, 1
    clipped = [0 if flat[0] < i <= flat[1] else advantage for i in range(7)]
    for script, expected in [
        (vanilla_pg, advantage / ratios),
        (is_pg, torch.full_like(ratios, advantage)),
        (ppo, torch.tensor(clipped).double()),
    ]:
        actual = why.slopes(script, ratios, advantage)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_second_moments_by_enumeration():
    rng = np.random.default_rng(3)
    moves, start = rng.dirichlet(np.ones(2), (2, 3)), np.array([0.3, 0.7])
    old, new = rng.dirichlet(np.ones(3), (2, 2))
    expected = np.zeros(3)
    for states in itertools.product(range(2), repeat=3):
        for actions in itertools.product(range(3), repeat=3):
            chance, weight = start[states[0]], 1.0
            for t, (s, a) in enumerate(zip(states, actions)):
                chance *= old[s, a] * (moves[s, a, states[t + 1]] if t < 2 else 1)
                weight *= new[s, a] / old[s, a]
            expected[2] += chance * weight**2
    for s, a in itertools.product(range(2), range(3)):
        expected[0] += start[s] * new[s, a] ** 2 / old[s, a]
        for s2, a2 in itertools.product(range(2), range(3)):
            chance = start[s] * old[s, a] * moves[s, a, s2] * old[s2, a2]
            expected[1] += chance * (new[s, a] / old[s, a] * new[s2, a2] / old[s2, a2]) ** 2
    moments = why.second_moments(start, old, new, moves, 3)
    np.testing.assert_allclose(moments, expected, rtol=1e-12)
    # By hand: one state, φ = (1/2, 1/2), θ = (1/4, 3/4): E[ρ²] = 2 (1/16 + 9/16) = 5/4
    one = np.array([1.0]), np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]]), np.ones((1, 2, 1))
    np.testing.assert_allclose(why.second_moments(*one, 4), 1.25 ** np.arange(1, 5))


def test_the_product_of_one_path_is_exact_on_average(double_precision):
    """E_φ[ W_t | s_t, a_t ] is the ratio of the visits of θ and φ; the end of the sentence."""
    problem = exact.Problem(5, 1.0)
    old, new = problem.old_policy(), problem.old_policy()
    new.logits.data += torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3)))
    batch = problem.batch(np.zeros((exact.HORIZON, exact.STATES + 1)))
    with torch.no_grad():
        log_ratio = new(batch.obs).log_prob(batch.actions) - old(batch.obs).log_prob(batch.actions)
        args = is_pg.Args(weighting="trajectory")
        weights, _ = is_pg.weighted_advantages(log_ratio, batch, args)
        visits = [problem.visits(p.probs())[..., None] * p.probs() for p in (new, old)]
    times = torch.from_numpy(problem.paths().times[problem.paths().valid])
    seen = 0
    for t, s, a in itertools.product(range(exact.HORIZON), range(exact.STATES), range(3)):
        here = (times == t) & (batch.obs == s) & (batch.actions == a)
        if here.any():
            seen += 1
            ratio = visits[0][t, s, a] / visits[1][t, s, a]
            torch.testing.assert_close(weights[here].mean(), ratio, rtol=0, atol=1e-10)
    assert seen >= 20


def test_batches_hold_paths_as_often_as_their_policy_takes_them(double_precision):
    problem, policy = why.plane(4838)
    policy.place.data = torch.tensor([1.0, -0.5])
    batch = why.batch_of(problem, policy)
    first = batch.obs == 0  # the state that all paths begin in; later visits have π too
    counts = torch.bincount(batch.actions[first], minlength=3) / first.sum()
    torch.testing.assert_close(counts, policy.probs()[0].detach(), rtol=0, atol=1e-3)
    score = policy(batch.obs).log_prob(batch.actions) * batch.advantages
    (estimate,) = torch.autograd.grad(score.mean(), policy.place)
    (true,) = torch.autograd.grad(problem.expected_return(policy.probs()), policy.place)
    direction = torch.nn.functional.cosine_similarity(estimate, true, dim=0)
    assert direction > 0.999  # and its length is by how many steps an episode has


def test_landscape(double_precision):
    """J and its promise agree to first order at φ, where the KL is 0."""
    problem, policy = why.plane(4838)
    step = 1e-4
    places = [(0, 0), (step, 0), (-step, 0), (0, step), (0, -step), (2.0, 1.0)]
    returns, promised, kl = why.landscape(problem, policy, places)
    assert returns[0] == pytest.approx(problem.expected_return(problem.old_policy().probs()).item())
    assert (promised[0], kl[0]) == (pytest.approx(returns[0]), pytest.approx(0, abs=1e-12))
    for i in (1, 3):
        slopes = [(x[i] - x[i + 1]) / (2 * step) for x in (returns, promised)]
        assert slopes[0] == pytest.approx(slopes[1], rel=1e-5)
    assert kl[5] > 0.05
    batch, old = why.batch_of(problem, policy), problem.old_policy()
    policy.place.data = torch.tensor(places[5])
    with torch.no_grad():
        each = torch.distributions.kl_divergence(old(batch.obs), policy(batch.obs))
    assert kl[5] == pytest.approx(each.mean().item())
    assert abs(promised[5] - returns[5]) > 0.05


@pytest.mark.slow
def test_what_the_document_says_of_the_plane(double_precision):
    problem, policy = why.plane(4838)
    for script in (vanilla_pg, is_pg):
        returns, promised, _ = why.landscape(
            problem, policy, why.walk(problem, policy, script, 150)
        )
        assert promised[-1] > promised[0] + 1
        assert returns[-1] < returns[0] - 0.5
    returns, _, _ = why.landscape(problem, policy, why.walk_within(problem, policy, 0.01, 4))
    assert returns[-1] > returns[0] + 0.1


class Fixed(torch.nn.Module):
    def __init__(self, probs):
        super().__init__()
        self.probs = torch.tensor(probs)

    def forward(self, obs):
        return torch.distributions.Categorical(self.probs.expand(len(obs), -1))


def test_measures_of_one_update(monkeypatch, double_precision):
    """By hand: π_old = (1/2, 1/2), π = (1/4, 3/4); two steps of one episode, actions 0 and 1."""
    monkeypatch.setattr(why.ppo, "make_envs", lambda *args: None)
    monkeypatch.setattr(why.evaluate, "play", lambda *args: (np.array([3.0, 5.0]), None, None))
    done = torch.tensor([[False], [True]])
    obs, actions = torch.zeros(2, 1), torch.tensor([0, 1])
    advantages, old_dist = torch.tensor([1.0, -1.0]), Fixed([0.5, 0.5])(obs)
    masks = dict(valid=~done | done, done=done)
    batch = make_batch(ppo, old_dist, obs=obs, actions=actions, advantages=advantages, **masks)
    measures = why.look_at(Fixed([0.25, 0.75]), batch, None, 1)
    expected = dict(ratio_mean=1.0, ratio_max=1.5, surrogate=(0.5 - 1.5) / 2)
    expected |= {"return": 4.0, "ess": 1 / ((0.25 + 2.25) / 2)}
    paths = np.array([0.5, 0.5 * 1.5])
    expected |= dict(path_ess=paths.mean() ** 2 / (paths**2).mean())
    expected |= dict(kl=0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75))
    assert {k: float(x) for k, x in measures.items()} == pytest.approx(expected, rel=1e-5)


def test_a_caught_batch_is_that_of_the_iteration(monkeypatch, tmp_path):
    policy, batch, args = why.catch("CartPole-v1", 2, seed=3)
    assert args.seed == 3
    assert len(batch.obs) <= 2048
    with torch.no_grad():  # the policy is the one that acted, and not that of the start
        assert torch.equal(policy(batch.obs).logits, batch.old_dist.logits)
    assert ppo.update_policy.__module__ == "ppo"
    seen, update = [], ppo.update_policy
    spy = lambda *args: seen.append(args[2].obs) or update(*args)  # noqa: E731
    monkeypatch.setattr(ppo, "update_policy", spy)
    options = dict(total_steps=4000, anneal_lr=False, run_dir=str(tmp_path / "run"), seed=3)
    ppo.main(ppo.Args(**options))
    torch.testing.assert_close(seen[0], why.catch("CartPole-v1", 1, seed=3)[1].obs)


def test_scores():
    """0 is the random policy, 1 the best end; by hand."""

    def run(*ends):
        return np.array([*zip((0, 100), ends)], [("step", float), ("return_last100", float)])

    runs = {
        "A": {"ppo": [run(0, 30), run(0, 20)], "trpo": [run(10, 50)]},
        "B": {"ppo": [run(-8, -5)], "trpo": [run(-9, -4)], "extra": [run(0, 0)]},
        "C": {"ppo": [run(0, 1)]},
    }
    random_runs = {"A": {"x": [run(0, 8), run(0, 12)]}, "B": {"x": [run(0, -10)]}}
    envs, scores = plot.scores_of(runs, random_runs, "return_last100", points=2)
    assert envs == ["A", "B"]
    assert list(scores) == ["trpo", "ppo"]  # extra is not in A; in the order of the scripts
    best = 0  # of B: extra counts for it
    expected = [[[-10 / 40, 20 / 40], [(-8 + 10) / (best + 10), (-5 + 10) / (best + 10)]]]
    np.testing.assert_allclose(scores["ppo"], expected)  # one run of each: B has no more
    np.testing.assert_allclose(scores["trpo"][0, 0], [0, 1])


def test_a_run_that_ended_early_is_scored_by_its_last_value():
    """As in the table: leaving it out would count the survivors alone."""

    def run(steps, end):
        return np.array([(0, 0), (steps, end)], [("step", float), ("return_last100", float)])

    runs = {"A": {"ppo": [run(100, 40), run(100, 20), run(30, 8)]}}
    random_runs = {"A": {"x": [run(100, 0)]}}
    _, scores = plot.scores_of(runs, random_runs, "return_last100", points=3)
    np.testing.assert_allclose(scores["ppo"][:, 0, -1], [1, 0.5, 0.2])
    np.testing.assert_allclose(scores["ppo"][2, 0], [0, 0.2, 0.2])


def test_interquartile_mean_and_interval_are_those_of_rliable(monkeypatch):
    monkeypatch.setattr(plot, "REPS", 200)
    from rliable import metrics

    scores = np.random.default_rng(0).normal(size=(10, 3, 4))
    expected = [metrics.aggregate_iqm(scores[..., t]) for t in range(4)]
    np.testing.assert_allclose(plot.interquartile_mean(scores), expected)
    middle, (low, high) = plot.estimate(scores)
    np.testing.assert_allclose(middle, expected)
    assert (low < middle).all()
    assert (middle < high).all()
    again = plot.estimate(scores)[1]
    np.testing.assert_array_equal(again, [low, high])  # the bootstrap has a seed
    one = scores[:1, :1]
    np.testing.assert_allclose(plot.estimate(one)[1], [one[0, 0], one[0, 0]])


def test_commands_that_solve_a_task_are_those_of_the_sweep():
    runs = [run for group in sweep.SUITES["solved"] for run in sweep.expand(*group)]
    assert {run.command.rpartition(" --seed ")[0] for run in runs} == set(why.SOLVED)


def test_commands_that_solve_a_task_do_so_with_each_seed():
    with open(ROOT / "docs/results/solved/runs.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for command, (_, bar, _) in why.SOLVED.items():
        of_this = [row for row in rows if row["command"].startswith(command + " --seed")]
        assert len(of_this) == 3
        for row in of_this:
            assert float(row["return_last100"]) >= float(bar.replace("−", "-")), row["command"]


def test_commands_without_runs_have_empty_cells(tmp_path, capsys):
    """A sweep that is not over yet: one run of one command, and none at the defaults."""
    for suite in ("benchmark", "others", "solved"):
        (tmp_path / suite).mkdir()
    command = "python trpo.py --env-id LunarLander-v3 --total-steps 1000000"
    (tmp_path / "solved" / "runs.csv").write_text(
        f"command,return_last100\n{command} --seed 1,250\n", encoding="utf-8"
    )
    why.solved(pyplot, why.Args(results=str(tmp_path)))
    lines = capsys.readouterr().out.splitlines()[2:]
    cells = {line.split(" | ")[0]: line.split(" | ")[2:4] for line in lines}
    assert len(cells) == len(why.SOLVED)
    assert cells.pop(f"| `{command}`") == ["", "250"]
    assert all(pair == ["", ""] for pair in cells.values())


def write_update(path, returns):
    """Measurements of two batches, from the return after one epoch in each environment."""
    rows = [
        (env, seed, "ppo", epoch, *[seed] * 6, epoch * after)
        for env, after in returns.items()
        for seed in (1, 2)
        for epoch in (0, 1)
    ]
    head = "env,seed,script,epochs,ratio_mean,ratio_max,ess,path_ess,kl,surrogate,return"
    lines = [head, *(",".join(map(str, row)) for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_only_measure_trains(tmp_path, monkeypatch, capsys):
    """The file of the output folder is drawn, or else the committed one; or it is one sentence."""
    monkeypatch.setattr(why, "measure_update", None)
    monkeypatch.chdir(tmp_path)
    args = why.Args(("update",), output="mine")
    with pytest.raises(SystemExit) as stop:
        why.main(args)
    assert stop.value.code == 2
    said = f"error: there is no {Path('mine', 'update.csv')}: --measure makes it\n"
    assert capsys.readouterr().err == said
    for folder, gain in [("docs/why", 7), ("mine", 30)]:
        write_update(Path(folder, "update.csv"), {"A": gain, "B": -gain})
        why.main(args)
        *table, plot_line = capsys.readouterr().out.splitlines()[-3:]
        assert plot_line == f"plot: {Path('mine', 'update.png')}"
        # The median of 1 and 2 of each measure
        assert table[0] == f"| A | ppo | {'1.5 | ' * 5}{gain} |"
        assert table[1] == f"| B | ppo | {'1.5 | ' * 5}-{gain} |"
    assert sorted(path.name for path in Path("mine").iterdir()) == ["update.csv", "update.png"]


def test_the_last_evaluation_of_a_seed_counts(tmp_path):
    """By hand: of seed 1 it is 4 and of seed 2 it is 8. Sampled actions are another column."""
    lines = ["env_id,script,seed,step,episodes,actions,return_mean,return_std,length_mean"]
    for env, script, seed, actions, mean in [
        ("A", "ppo", 1, "mode", 100),
        ("A", "ppo", 2, "mode", 8),
        ("A", "ppo", 1, "mode", 4),
        ("A", "ppo", 2, "sampled", 50),
        ("A", "ppo", 3, "sampled", 60),
        ("A", "trpo", 2, "mode", 70),
        ("B", "ppo", 2, "mode", 80),
    ]:
        lines.append(f"{env},{script},{seed},1000,20,{actions},{mean},1,10")
    path = tmp_path / "evaluated.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert why.evaluated(str(path), "ppo", "A") == "6.0 ± 2.0 (2)"
    assert why.evaluated(str(path), "trpo", "A") == "70 (1)"
    assert why.evaluated(str(path), "trpo", "B") == ""


def test_mean_and_deviation():
    assert why.mean_and_deviation([]) == ""
    assert why.mean_and_deviation([-717.4]) == "−717 (1)"  # one run has no deviation
    assert why.mean_and_deviation([2.0, 4.0]) == "3.0 ± 1.0 (2)"
    assert why.mean_and_deviation([1000.0, 2000.0, 3000.0]) == "2,000 ± 816 (3)"


def test_the_highest_point_is_that_of_the_mean():
    """Its own highest point is 240 in the second run, where the mean is 120."""
    first = dict(step=[50, 90, 110, 200], return_last100=[400.0, 100.0, 100.0, 0.0])
    second = dict(step=[90, 110, 198], return_last100=[200.0, 200.0, 240.0])
    assert why.highest([first, second]) == "150 ± 50 (2)"
    assert why.highest([second]) == "240 (1)"
    assert why.highest([]) == ""


def test_a_run_without_an_episode_has_no_return(tmp_path, monkeypatch, capsys):
    (tmp_path / "solved").mkdir()
    command = "python ppo.py --env-id CliffWalking-v1 --seed 1"
    lines = f"command,return_last100\n{command},\n"
    (tmp_path / "solved" / "runs.csv").write_text(lines, encoding="utf-8")
    solved = {command.removesuffix(" --seed 1"): ("CliffWalking-v1", "−20", "It finds the goal.")}
    monkeypatch.setattr(why, "SOLVED", solved)
    why.solved(pyplot, why.Args(results=str(tmp_path)))
    assert capsys.readouterr().out.splitlines()[-1].split(" | ")[3] == "nan"


def test_figures_are_committed_and_shown():
    for figure in set(why.FIGURES) - set(OF_RESULTS):
        assert f"](why/{figure}.png)" in DOCUMENT
        assert (ROOT / "docs" / "why" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("figure", "words"),
    [
        ("table1", "is_pg: python -m tools.sweep table1"),
        ("reuse", "python -m tools.sweep reuse"),
        ("solved", "solved/runs.csv: docs/results/README.md has the commands"),
        ("published_ppo", "evaluated.csv: docs/results/README.md has the commands"),
    ],
)
def test_runs_that_are_not_there(figure, words, tmp_path, capsys):
    """Some runs of one script alone are there."""
    for suite in ("benchmark", "random", "reuse"):
        run = tmp_path / suite / "run"
        run.mkdir(parents=True)
        (run / "metrics.csv").write_text(
            "step,episodes,return_last100\n10,1,5\n20,1,6\n", encoding="utf-8"
        )
        (run / "config.json").write_text(
            '{"script": "ppo", "args": {"env_id": "CartPole-v1", "policy_lr": 1}}', encoding="utf-8"
        )
    with pytest.raises(SystemExit) as stop:
        why.MAKERS[figure](pyplot, why.Args(results=str(tmp_path)))
    pyplot.close("all")
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["file", "file/folder"])
def test_a_file_in_place_of_the_folder_is_said(name, tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        why.main(why.Args(("clip",), output=str(tmp_path / name)))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot make the folder {tmp_path / name}: ")
    assert said.count("\n") == 1


def test_rliable_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rliable", None)
    monkeypatch.setitem(sys.modules, "rliable.library", None)
    with pytest.raises(SystemExit) as stop:
        why.main(why.Args(("reuse",), output=str(tmp_path), results=ARGS.results))
    assert stop.value.code == 2
    assert "plots need matplotlib and rliable (ModuleNotFoundError)" in capsys.readouterr().err


def test_powers_of_ten_are_formulas(tmp_path, monkeypatch):
    """On a logarithmic axis; in the figures of tools.plot, names are not."""
    monkeypatch.setitem(pyplot.rcParams, "text.parse_math", True)
    figures = []
    with monkeypatch.context() as patch:
        patch.setattr(pyplot, "close", figures.append)
        why.main(why.Args(("weights",), output=str(tmp_path)))
    labels = figures[0].axes[0].get_xticklabels()
    pyplot.close("all")
    powers = [label for label in labels if "10^" in label.get_text()]
    assert len(powers) >= 3
    assert all(label.get_parse_math() for label in powers)


def test_an_interrupted_measurement_changes_nothing(tmp_path, monkeypatch):
    def measure(path):
        path.write_text("the first batch", encoding="utf-8")
        raise KeyboardInterrupt

    (tmp_path / "update.csv").write_text("all batches", encoding="utf-8")
    monkeypatch.setattr(why, "measure_update", measure)
    with pytest.raises(KeyboardInterrupt):
        why.update(None, why.Args(output=str(tmp_path), measure=True))
    assert (tmp_path / "update.csv").read_text(encoding="utf-8") == "all batches"


@pytest.mark.parametrize(("script", "epochs", "steps"), [("vanilla_pg", 3, 3), ("is_pg", 2, 2)])
def test_a_step_of_the_figure_is_so_many_epochs_of_the_script(script, epochs, steps, monkeypatch):
    """Each epoch is one step on the whole batch, with the learning rate of the figure."""
    module, rates = importlib.import_module(script), []

    def minimize(loss, optimizer, num_transitions, args):
        rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(module, "minimize", minimize)
    caught, batch, _ = why.catch("CartPole-v1", 1, 1)
    for count, expected in ((0, 0), (epochs, steps)):
        rates.clear()
        why.step(script, caught, batch, count, dict(policy_lr=0.25))
        assert rates == [0.25] * expected


def test_a_step_of_the_figure_is_one_of_trpo(monkeypatch):
    calls = []
    monkeypatch.setattr(why.trpo, "update_policy", lambda *args: calls.append(args))
    for epochs in (0, 1):
        why.step("trpo", None, None, epochs, {})
        assert len(calls) == epochs
