"""What tools.plot prints and draws, against values by hand and by other libraries."""

import json
import math
import os
import sys
import warnings
from itertools import combinations

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from numpy.testing import assert_allclose
from scipy import stats

from tools import plot

COLUMN = "return_last100"
REPS = plot.REPS
KINDS = [("step", float), ("episodes", float), (COLUMN, float)]


def curve(*points):
    """Rows of steps, episodes so far and returns."""
    return np.array([*points], KINDS)


def ending(value, steps=100):
    """A run from 0 to a value, in a straight line."""
    return curve((0, 1, 0), (steps, 200, value))


def write(
    folder, rows, script="ppo", env_id="A", columns="step,episodes,return_last100", **options
):
    """A run on disk. rows: lines of metrics.csv."""
    folder.mkdir(parents=True)
    config = dict(script=script, args=dict(env_id=env_id) | options)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "metrics.csv").write_text("\n".join([columns, *rows]) + "\n", encoding="utf-8")
    return str(folder)


def read(folder, column=COLUMN):
    return plot.read_runs([str(folder)], column)


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr(plot, "REPS", 100)


@pytest.fixture
def axes():
    figure = pyplot.figure()
    yield figure.add_subplot()
    pyplot.close(figure)


def band(axes, number=0):
    """Lower and upper edge of a band, at each of the places of its line."""
    (path,) = axes.collections[number].get_paths()
    edges = {}
    for x, y in path.vertices:
        edges.setdefault(x, []).append(y)
    xs = sorted(edges)
    return xs, [min(edges[x]) for x in xs], [max(edges[x]) for x in xs]


# Reading


def test_rows_without_a_value_are_left_out_but_their_episodes_count(tmp_path):
    write(tmp_path / "run", ["10,0,", "20,2,5", "30,1,", "40,4,7"])
    ((rows,),) = read(tmp_path)["A"].values()
    assert rows["step"].tolist() == [20, 40]
    assert rows[COLUMN].tolist() == [5, 7]
    assert rows["episodes"].tolist() == [2, 7]


def test_runs_without_a_value_are_left_out(tmp_path, capsys):
    """And named, once they have rows: such a run may be the worst of all."""
    write(tmp_path / "none", ["10,0,", "20,0,"])
    write(tmp_path / "header", [])
    write(tmp_path / "empty", []) and (tmp_path / "empty" / "metrics.csv").write_bytes(b"")
    assert read(tmp_path) == {}
    folders = [tmp_path / "header", tmp_path / "none"]
    said = [f"{folder} is left out: it has no value in {COLUMN}" for folder in folders]
    assert capsys.readouterr().out.splitlines() == said


def test_a_run_in_two_of_the_folders_is_one(tmp_path, capsys):
    run = write(tmp_path / "deep" / "deeper" / "run", ["10,1,5"])
    runs = plot.read_runs([str(tmp_path), run], COLUMN)
    assert [len(series) for series in runs["A"].values()] == [1]
    assert capsys.readouterr().out == ""


def test_other_columns(tmp_path):
    write(tmp_path / "run", ["10,1,0.5,3"], columns="step,episodes,kl,return_last100")
    ((rows,),) = read(tmp_path, "kl")["A"].values()
    assert rows["kl"].tolist() == [0.5]


@pytest.mark.parametrize("missing", ["step", "episodes", COLUMN])
def test_a_column_that_is_missing_is_named(missing, tmp_path, capsys):
    columns = [name for name, _ in KINDS if name != missing]
    write(tmp_path / "run", ["10,1"], columns=",".join(columns))
    with pytest.raises(SystemExit) as stop:
        read(tmp_path)
    assert stop.value.code == 2
    said = f"metrics.csv has no column {missing}, only {', '.join(columns)}"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("config", ["{", '{"script": "ppo"}', "[1]", '{"script": 1, "args": 2}'])
def test_a_run_that_is_not_whole_is_named(config, tmp_path, capsys):
    write(tmp_path / "run", ["10,1,5"])
    (tmp_path / "run" / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(SystemExit):
        read(tmp_path)
    assert f"{tmp_path / 'run'} is not a whole run" in capsys.readouterr().err


def test_a_label_names_the_options_in_which_runs_differ(tmp_path):
    write(tmp_path / "a", ["1,1,1"], gamma=0.9, clip_eps=0.1, seed=1)
    write(tmp_path / "b", ["1,1,2"], gamma=0.9, clip_eps=0.2, seed=1)
    write(tmp_path / "c", ["1,1,3"], gamma=0.9, clip_eps=0.2, seed=2)
    write(tmp_path / "d", ["1,1,4"], gamma=0.9, clip_eps=0.2, seed=1, env_id="B")
    write(tmp_path / "e", ["1,1,5"], gamma=0.9, clip_eps=0.2, seed=1, script="trpo")
    runs = read(tmp_path)
    ends = {
        env: {label: [rows[COLUMN][-1] for rows in group] for label, group in series.items()}
        for env, series in runs.items()
    }
    one = {"ppo --clip-eps 0.1": [1], "ppo --clip-eps 0.2": [2, 3], "trpo": [5]}
    assert ends == {"A": one, "B": {"ppo": [4]}}


@pytest.mark.parametrize("first", ["old", "new"])
def test_an_option_that_older_runs_lack_sets_no_run_apart(first, tmp_path):
    """Whichever is read first; but newer runs that differ in it are apart."""
    names = ("a", "b") if first == "old" else ("b", "a")
    write(tmp_path / names[0], ["1,1,1"], seed=1)
    write(tmp_path / names[1], ["1,1,2"], seed=2, weight_cap=1)
    assert {label: len(group) for label, group in read(tmp_path)["A"].items()} == {"ppo": 2}
    write(tmp_path / "c", ["1,1,3"], seed=3, weight_cap=2)
    labels = {"ppo", "ppo --weight-cap 1", "ppo --weight-cap 2"}
    assert set(read(tmp_path)["A"]) == labels


@pytest.mark.parametrize("names", ["ab", "ba"])
@pytest.mark.parametrize("longer", ["old", "new"])
def test_an_older_and_a_newer_run_of_a_seed_are_one(names, longer, tmp_path, capsys):
    """By hand: the longer one ends with 8, and a run of another seed with 5."""
    folders = {"old": tmp_path / names[0], "new": tmp_path / names[1]}
    for age, options in [("old", {}), ("new", dict(weight_cap=1))]:
        rows = ["1,1,3", "2,1,8"] if age == longer else ["1,1,3"]
        write(folders[age], rows, seed=1, gamma=0.9, **options)
    write(tmp_path / "c", ["1,1,5"], seed=2, gamma=0.9, weight_cap=1)
    (series,) = read(tmp_path)["A"].values()
    assert sorted(rows[COLUMN][-1] for rows in series) == [5, 8]
    shorter = folders["new" if longer == "old" else "old"]
    assert capsys.readouterr().out.startswith(f"{shorter} is left out: {folders[longer]} has")


def test_a_metrics_csv_stands_for_its_run(tmp_path):
    write(tmp_path / "a", ["10,1,5"], seed=1)
    write(tmp_path / "b", ["10,1,7"], seed=2)
    ((rows,),) = read(tmp_path / "a" / "metrics.csv")["A"].values()
    assert rows[COLUMN].tolist() == [5]


@pytest.mark.parametrize("name", ["config.json", os.devnull])
def test_another_file_is_refused(name, tmp_path, capsys):
    write(tmp_path / "a", ["10,1,5"])
    path = tmp_path / "a" / name
    with pytest.raises(SystemExit) as stop:
        plot.main(plot.Args([str(path)], output=""))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert (
        said == f"error: {path} is neither a folder nor a metrics.csv: give the folder of a run\n"
    )


@pytest.mark.parametrize("content", ["\n", " \n\n"])
def test_blank_lines_are_no_run_and_give_no_warning(content, tmp_path, capsys):
    write(tmp_path / "run", [])
    (tmp_path / "run" / "metrics.csv").write_text(content, encoding="utf-8")
    with warnings.catch_warnings(record=True) as caught, pytest.raises(SystemExit):
        read(tmp_path)
    assert caught == []
    assert f"{tmp_path / 'run'} is not a whole run" in capsys.readouterr().err


def test_runs_of_several_workers_are_apart(tmp_path):
    """Older runs do not say how many they were: one."""
    for seed, workers in enumerate([None, 1, 4]):
        run = tmp_path / str(seed)
        write(run, ["1,1,1"], seed=seed)
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        config |= {} if workers is None else dict(workers=workers)
        (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = {label: len(group) for label, group in read(tmp_path)["A"].items()}
    assert found == {"ppo --workers 1": 2, "ppo --workers 4": 1}


FREE = dict(seed=1, run_dir="x", resume="x", checkpoint_interval=1, device="x", num_threads=2)


@pytest.mark.parametrize("option", [*FREE, "tensorboard"])
def test_runs_that_differ_in_what_does_not_matter_share_a_line(option, tmp_path):
    write(tmp_path / "a", ["1,1,1"], **({"seed": 7} | {option: 3}))
    write(tmp_path / "b", ["1,1,2"], **({"seed": 8} | {option: 4}))
    assert [len(group) for group in read(tmp_path)["A"].values()] == [2]


def test_options_of_the_environment_are_in_its_name(tmp_path):
    write(tmp_path / "a", ["1,1,1"], env_kwargs="{}")
    write(tmp_path / "b", ["1,1,2"], env_kwargs='{"g": 1}')
    assert set(read(tmp_path)) == {"A", 'A {"g": 1}'}


@pytest.mark.parametrize("longer", ["a", "b"])
def test_of_two_runs_of_a_seed_the_longer_one_counts(longer, tmp_path, capsys):
    """Longer in steps, though its value may be the worse; the order of options is no difference."""
    rows = dict(a=["1,1,9"], b=["1,1,9"]) | {longer: ["1,1,9", "2,1,3"]}
    write(tmp_path / "a", rows["a"], seed=1, gamma=1, lam=2)
    write(tmp_path / "b", rows["b"], lam=2, gamma=1, seed=1)
    write(tmp_path / "c", rows["a"], seed=2, gamma=1, lam=2)
    first, _ = read(tmp_path)["A"]["ppo"]
    assert first[COLUMN].tolist() == [9, 3]
    shorter = "ab".replace(longer, "")
    said = f"{tmp_path / shorter} is left out: {tmp_path / longer} has the same options and seed\n"
    assert capsys.readouterr().out == said


# In words


def test_median_and_range():
    assert plot.spread([3, 1, 2, 10]) == "2.5 (1 to 10)"
    assert plot.spread([7]) == "7"
    assert plot.spread([]) == ""
    assert plot.spread([1234.5, 99.96, -150.4]) == "100 (-150 to 1,234)"
    assert plot.spread([-0.0, 0.012345, 99.94]) == "0.0123 (0 to 99.9)"
    assert plot.spread([-1e6, -99.94, 5]) == "-99.9 (-1,000,000 to 5)"


def test_what_runs_end_with_is_their_last_value_and_not_their_best():
    dead = [curve((10, 1, 500), (20, 2, 9)), curve((10, 1, 400), (30, 2, 11))]
    assert plot.last(dead, COLUMN) == "ends with 10 (9 to 11) at step 30 (runs: 2)"


def test_a_bar_counts_from_the_hundredth_episode_on():
    at_once = curve((10, 99, 480), (20, 100, 470), (30, 150, 475), (40, 160, 480))
    late = curve((10, 100, 474), (20, 120, 474.9), (50, 140, 500), (60, 150, 3))
    never = curve((10, 150, 20))
    runs = [at_once, late, never]
    assert plot.steps_to_reach(runs, COLUMN, 475) == "2 of 3 runs reach 475, at step 40 (30 to 50)"
    assert plot.steps_to_reach(runs, COLUMN, 470) == "2 of 3 runs reach 470, at step 15 (10 to 20)"
    assert plot.steps_to_reach([never], COLUMN, 475) == "0 of 1 runs reach 475"


def test_the_bar_is_only_spoken_of_where_there_is_one():
    runs, without = [ending(7)], plot.Args([])
    assert plot.summary(runs, without) == "ends with 7 at step 100 (runs: 1)"
    words = "; 1 of 1 runs reach 5, at step 100"
    assert plot.summary(runs, plot.Args([], bar=5)) == plot.summary(runs, without) + words


def test_table():
    """A run that has died counts with what it ends with, not with its best."""
    dead = curve((0, 1, 0), (100, 2, 90), (640, 3, 1))
    runs = {
        "A": {"ppo": [dead, ending(3, 630)], "trpo --max-kl 1": [ending(2, 320)]},
        "B": {"is_pg": [ending(2000, 1_003_520)], "ppo": [ending(4, 200_704)]},
    }
    assert plot.table(runs, COLUMN).splitlines() == [
        "| environment | steps | `is_pg` | `trpo --max-kl 1` | `ppo` |",
        "| --- | --- | --- | --- | --- |",
        "| A | 640 |  | 2 | 2 (1 to 3) |",
        "| B | 1,000,000 | 2,000 |  | 4 |",
    ]


def test_few_steps_are_given_exactly_and_many_to_ten_thousand():
    given = [1, 640, 50_176, 99_999, 100_352, 204_999, 205_001, 1_000_448]
    said = [1, 640, 50_176, 99_999, 100_000, 200_000, 210_000, 1_000_000]
    assert [plot.about(steps) for steps in given] == said


def test_labels_are_in_the_order_of_the_scripts():
    labels = ["trpo", "a_script", "ppo", "vanilla_pg", "ppo --x 2", "is_pg", "ppo --x 1"]
    assert sorted(labels, key=plot.order) == [
        *("vanilla_pg", "is_pg", "trpo", "ppo", "ppo --x 1", "ppo --x 2", "a_script")
    ]
    assert [plot.place(label) for label in ("vanilla_pg", "ppo --x 1", "a_script")] == [0, 3, 4]


# Estimates


def test_values_between_those_that_are_known():
    runs = [curve((20, 1, 2), (100, 2, 10)), curve((50, 1, 0), (99, 2, 98))]
    grid, curves = plot.interpolate(runs, COLUMN, points=6)
    assert grid.tolist() == [0, 20, 40, 60, 80, 100]
    nan = math.nan
    assert_allclose(curves, [[nan, nan, nan, 6, 8, 10], [nan, nan, nan, 20, 60, 98]])


def test_a_run_that_ended_early_counts_up_to_there():
    runs = [ending(10, 100), ending(40, 98), ending(39, 98.1)]
    _, curves = plot.interpolate(runs, COLUMN, points=101)
    assert_allclose(curves[:, 98], [9.8, 40, 39 * 98 / 98.1])
    assert_allclose(curves[:, 99], [9.9, math.nan, 39])
    _, held = plot.interpolate(runs, COLUMN, points=101, hold=True)
    assert_allclose(held[:, -1], [10, 40, 39])
    assert len(plot.interpolate(runs, COLUMN)[0]) == 200


def test_interquartile_mean_by_hand_and_by_another_library():
    """Of eight numbers the middle four."""
    scores = np.array([[0, 1], [2, 3], [4, 7], [100, -50.0]])  # (R, tasks)
    assert plot.interquartile_mean(scores[..., None]).tolist() == [2.5]
    scores = np.random.default_rng(1).normal(size=(7, 3, 5))
    expected = stats.trim_mean(scores.reshape(21, 5), 0.25)
    assert_allclose(plot.interquartile_mean(scores), expected)


def test_mean():
    scores = np.array([[[1, 10], [3, 30]], [[5, 50], [7.5, 70]]])  # (R, tasks, T)
    assert plot.mean(scores).tolist() == [4.125, 40]


@pytest.mark.parametrize("ones", [20, 30])
def test_intervals_are_those_of_95_percent(ones, monkeypatch):
    """A bootstrap mean of 40 zeros and ones is binomial, whose quantiles are known."""
    monkeypatch.setattr(plot, "REPS", REPS)
    scores = np.repeat([1.0, 0.0], [ones, 40 - ones])[:, None, None]
    (middle,), ((low,), (high,)) = plot.estimate(scores, plot.mean)
    assert middle == ones / 40
    expected = stats.binom.ppf([0.025, 0.975], 40, ones / 40) / 40
    assert_allclose([low, high], expected)
    for level in (0.68, 0.9, 0.99):  # which is not what another level gives
        tails = [(1 - level) / 2, (1 + level) / 2]
        assert np.abs(stats.binom.ppf(tails, 40, ones / 40) / 40 - expected).max() > 0.02


def test_runs_are_drawn_for_each_task_by_itself():
    """Two runs that are 0 and 1 in one task, 1 and 0 in the other: the mean is not always 1/2."""
    scores = np.array([[0.0, 1], [1, 0]])[..., None]
    (middle,), ((low,), (high,)) = plot.estimate(scores, plot.mean)
    assert (middle, low, high) == (0.5, 0, 1)


def test_tasks_are_not_drawn():
    """They are not a sample of all tasks: two runs that end alike in each have no spread."""
    scores = np.array([[0.0, 1], [0, 1]])[..., None]
    (middle,), ((low,), (high,)) = plot.estimate(scores, plot.mean)
    assert (middle, low, high) == (0.5, 0.5, 0.5)


def test_the_statistic_is_the_interquartile_mean_unless_another_is_given():
    scores = np.array([0.0, 1, 2, 3, 100, 4, 5, 6])[:, None, None]
    assert plot.estimate(scores)[0] == [3.5]  # of 2, 3, 4, 5
    assert plot.estimate(scores, plot.mean)[0] == [121 / 8]


def test_an_interval_is_repeatable():
    scores = np.random.default_rng(2).normal(size=(5, 2, 3))
    first = plot.estimate(scores)[1]
    np.random.random(7)  # noqa: NPY002, rliable draws from this generator
    np.testing.assert_array_equal(plot.estimate(scores)[1], first)


def test_one_run_alone_has_no_interval():
    scores = np.array([[[3.0, 4], [5, 8]]])
    middle, interval = plot.estimate(scores)
    assert middle.tolist() == [4, 6]
    assert interval.tolist() == [[4, 6], [4, 6]]


# Curves


def test_a_line_and_its_band(axes):
    runs = [ending(value) for value in (0, 10, 20, 90)]
    plot.draw(axes, runs, COLUMN, "is_pg", linestyle="--")
    (line,) = axes.lines
    x, y = line.get_data()
    assert (x[0], x[-1], len(x)) == (0, 100, 200)
    assert_allclose(y, x * 15 / 100)  # the mean of the middle two, 10 and 20
    assert (line.get_color(), line.get_linestyle(), line.get_label()) == ("C1", "--", "is_pg (4)")
    xs, lows, highs = band(axes)
    _, (low, high) = plot.estimate(np.array([0.0, 10, 20, 90])[:, None, None])
    assert_allclose(xs, x)
    assert_allclose([lows[-1], highs[-1]], [low[0], high[0]])
    assert_allclose([lows[100], highs[100]], np.array([low[0], high[0]]) * x[100] / 100)


def test_a_line_goes_on_with_the_runs_that_got_so_far(axes):
    plot.draw(axes, [ending(100, 100), ending(0, 50)], COLUMN, "ppo")
    x, y = axes.lines[0].get_data()
    assert_allclose(y[x <= 50], x[x <= 50] / 2)
    assert_allclose(y[x > 50], x[x > 50])


def test_a_line_begins_where_all_runs_have_a_value(axes):
    plot.draw(axes, [curve((40, 1, 1), (100, 2, 1)), curve((0, 1, 3), (100, 2, 3))], COLUMN, "ppo")
    x, y = axes.lines[0].get_data()
    assert np.isnan(y[x < 40]).all()
    assert (y[x > 40] == 2).all()


def test_a_style_of_ones_own_comes_first(axes):
    plot.draw(axes, [ending(1)], COLUMN, "ppo", color="C7", label="mine")
    assert (axes.lines[0].get_color(), axes.lines[0].get_label()) == ("C7", "mine")
    assert axes.collections[0].get_facecolor()[0, 3] == pytest.approx(0.2)


def test_lines_of_one_script_differ_in_their_dashes(axes):
    labels = ["ppo --x 1", "trpo", "ppo --x 2", "ppo --x 3", "ppo --x 4", "ppo --x 5"]
    plot.draw_panel(axes, {label: [ending(1)] for label in labels}, COLUMN)
    drawn = [(line.get_label()[:-4], line.get_linestyle(), line.get_color()) for line in axes.lines]
    assert drawn[0] == ("trpo", "-", "C2")
    assert [name for name, *_ in drawn[1:]] == [f"ppo --x {i}" for i in range(1, 6)]
    assert [dash for _, dash, _ in drawn[1:]] == ["-", "--", ":", "-.", "-"]
    assert {color for *_, color in drawn[1:5]} == {"C3"}
    c3 = np.array([0xD6, 0x27, 0x28]) / 255
    assert_allclose(drawn[5][2], 0.6 * c3)
    assert axes.get_ylabel() == "return, mean of the last 100 episodes"
    assert axes.get_xlabel() == "environment steps"
    assert axes.get_legend().get_title().get_text() == "interquartile mean, 95 %"
    assert axes.xaxis.get_major_formatter()(200_000) == "200k"


VARIANTS = [f"{script} --x {i}" for script in ("is_pg", "ppo", "a_script") for i in range(8)]


def looks(axes):
    """{label: color and dashes}, as they are drawn."""
    return {
        line.get_label().rpartition(" ")[0]: (to_rgb(line.get_color()), line.get_linestyle())
        for line in axes.lines
    }


def assert_distinct(looks, count):
    """No two have the same dashes and colors that are hard to tell apart."""
    assert len(looks) == count
    for (color, dash), (other_color, other_dash) in combinations(looks.values(), 2):
        assert dash != other_dash or math.dist(color, other_color) > 0.2


def test_eight_variants_of_each_script_look_different_in_both_figures(axes, monkeypatch):
    monkeypatch.setattr(plot, "REPS", 2)
    plot.draw_panel(axes, {label: [ending(1)] for label in VARIANTS}, COLUMN)
    assert_distinct(looks(axes), 24)
    figure = pyplot.figure()
    plot.draw_profiles(figure, {label: np.array([[[0, 0.5]]]) for label in VARIANTS})
    for panel in figure.axes:
        assert looks(panel) == looks(axes)
        assert [x.get_facecolor()[0, :3] for x in panel.collections] == [
            pytest.approx(color) for color, _ in looks(panel).values()
        ]
    pyplot.close(figure)


@pytest.mark.parametrize("count", [1, 4, 5, 9])
def test_a_panel_for_each_environment(count):
    kinds = [("step", float), ("kl", float)]
    rows = np.array([(0, 1), (10, 2)], kinds)
    runs = {f"env{i}": {"ppo": [rows] * (i + 1)} for i in range(count)}
    figure = plot.draw_curves(pyplot, runs, "kl")
    assert [panel.get_title() for panel in figure.axes] == list(runs)
    labels = [panel.lines[0].get_label() for panel in figure.axes]
    assert labels == [f"ppo ({i + 1})" for i in range(count)]
    assert {panel.get_ylabel() for panel in figure.axes} == {"kl"}
    assert [panel.get_subplotspec().num1 for panel in figure.axes] == list(range(count))
    sizes = {1: (5.5, 4), 4: (22, 4), 5: (22, 8), 9: (22, 12)}
    assert tuple(figure.get_size_inches()) == sizes[count]
    pyplot.close(figure)


# Scores


def test_scores_are_between_the_random_policy_and_the_best_end(capsys):
    runs = {
        "A": {"ppo": [ending(30), ending(20)], "trpo": [curve((0, 1, 90), (100, 2, 50))]},
        "B": {"trpo": [ending(-4)], "is_pg": [ending(-1)]}
        | {"ppo": [ending(-5), ending(-9), ending(0)]},
        "C": {"ppo": [ending(1)]},
    }
    random_runs = {
        "A": {"x": [ending(6), ending(12)], "y": [curve((0, 1, 99), (100, 2, 12))]},
        "B": {"x": [ending(-10)]},
    }
    envs, scores = plot.scores_of(runs, random_runs, COLUMN, points=3)
    assert envs == ["A", "B"]
    assert list(scores) == ["trpo", "ppo"]
    assert capsys.readouterr().out.splitlines() == [
        "is_pg is not in the profiles: it has no run of A",
        "ppo: the profiles have its first 2 runs of each environment",
    ]
    # A: random policies end with 10, the best run with 50; B: with −10, and 0
    assert_allclose(scores["trpo"], [[[2, 1.5, 1], [1, 0.8, 0.6]]])
    assert scores["ppo"].shape == (2, 2, 3)
    assert_allclose(scores["ppo"][..., -1], [[0.5, 0.5], [0.25, 0.1]])
    assert plot.scores_of(runs, random_runs, COLUMN)[1]["ppo"].shape == (2, 2, 101)


def test_a_dead_run_is_scored_by_its_end():
    dead = curve((0, 1, 0), (50, 2, 90), (100, 3, 5))
    gone = curve((0, 1, 0), (20, 2, 80), (30, 3, 10))
    runs = {"A": {"ppo": [dead, gone, ending(20)]}}
    _, scores = plot.scores_of(runs, {"A": {"x": [ending(0)]}}, COLUMN, points=11)
    assert_allclose(scores["ppo"][:, 0, -1], [0.25, 0.5, 1])
    assert_allclose(scores["ppo"][1, 0, 2:], [4] + [0.5] * 8)


@pytest.mark.parametrize("end", [10, 9.5])
def test_an_environment_that_no_run_learns_has_no_scores(end, capsys):
    """As good as the random policy, or worse: the scale has no length, or is upside down."""
    runs = {"A": {"ppo": [ending(end)], "trpo": [ending(5)]}, "B": {"ppo": [ending(4)]}}
    random_runs = {"A": {"x": [ending(10)]}, "B": {"x": [ending(2)]}}
    envs, scores = plot.scores_of(runs, random_runs, COLUMN, points=2)
    assert envs == ["B"]
    assert {label: x.tolist() for label, x in scores.items()} == {"ppo": [[[-1, 1]]]}
    said = "A is left out: no run ends better than the random policy\n"
    assert capsys.readouterr().out == said
    del runs["B"]
    assert plot.scores_of(runs, random_runs, COLUMN) == ([], {})


def test_scores_of_which_there_are_none_are_said(tmp_path, capsys):
    runs = write(tmp_path / "runs" / "a", ["10,1,5"])
    for random, words in [
        ("10,1,5", "no run ends better than the random policy"),
        ("", "has no run of these"),
    ]:
        folder = tmp_path / f"random{len(random)}"
        write(folder / "a", [random], env_id="A" if random else "B")
        args = plot.Args([runs], output="", profiles="x.png", random=str(folder))
        with pytest.raises(SystemExit) as stop:
            plot.main(args)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err


def test_sample_efficiency(axes):
    """Over the fraction of the training, from where all runs have a score."""
    nan = math.nan
    scores = np.array([[[nan, nan, 1, 2, 3]], [[nan, 0, 3, 6, 90]]])
    plot.draw_sample_efficiency(axes, scores, dict(color="C0"))
    x, y = axes.lines[0].get_data()
    assert x.tolist() == [0.5, 0.75, 1]
    assert_allclose(y, [2, 4, 46.5])
    xs, lows, highs = band(axes)
    assert xs == [0.5, 0.75, 1]
    assert (lows, highs) == ([1, 2, 3], [3, 6, 90])


def test_performance_profile(axes):
    """At τ, the fraction of the runs that end with more than τ."""
    ends = np.array([[0.1, 0.5], [0.5, 0.9]])
    levels = np.array([0, 0.1, 0.4, 0.5, 0.8, 0.9, 1])
    plot.draw_performance_profile(axes, ends, levels, dict(color="C0"))
    x, y = axes.lines[0].get_data()
    assert x.tolist() == levels.tolist()
    assert y.tolist() == [1, 0.75, 0.75, 0.25, 0.25, 0, 0]
    xs, lows, highs = band(axes)
    assert xs == levels.tolist()
    assert (lows[0], highs[0]) == (1, 1)
    assert (lows[2], highs[2]) == (0.5, 1)  # the first task's runs are drawn: 0, 1 or 2 above


def test_the_band_of_a_performance_profile_is_that_of_95_percent(axes, monkeypatch):
    """As of a mean: the fraction of 40 runs that is above is binomial."""
    monkeypatch.setattr(plot, "REPS", REPS)
    ends = np.repeat([1.0, 0.0], [20, 20])[:, None]
    plot.draw_performance_profile(axes, ends, np.array([0.25, 0.5]), dict(color="C0"))
    _, lows, highs = band(axes)
    expected = stats.binom.ppf([0.025, 0.975], 40, 0.5) / 40
    assert_allclose([lows[0], highs[0]], expected)


def test_profiles(capsys):
    scores = {
        "trpo": np.array([[[0, 1.0], [0, 0.5]], [[0, 0.5], [0, 0.5]]]),
        "ppo": np.array([[[0, -0.5], [0, 0.25]]]),
    }
    figure = pyplot.figure()
    plot.draw_profiles(figure, scores)
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["trpo (2)", "ppo (1)"]
    assert [line.get_color() for line in left.lines] == ["C2", "C3"]
    assert left.lines[0].get_ydata().tolist() == [0, 0.5]  # of 1/2, 1/2, 1/2, 1 the middle two
    assert left.lines[1].get_ydata().tolist() == [0, -0.125]
    x, y = right.lines[0].get_data()
    assert (x[0], x[-1], len(x)) == (-0.5, 1, 201)
    assert y[np.searchsorted(x, 0.6)] == 0.25
    assert y[np.searchsorted(x, 0.4)] == 1
    assert (right.lines[1].get_ydata()[0], right.get_ylim()) == (0.5, (0, 1))
    assert left.get_legend().get_title().get_text() == "runs of each environment"
    words = [left.get_xlabel(), left.get_ylabel(), right.get_xlabel(), right.get_ylabel()]
    assert words[:3] == ["fraction of the training", "score, interquartile mean", "score τ"]
    assert words[3] == "fraction of runs that end with more than τ"
    pyplot.close(figure)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("trpo: interquartile mean 0.50 (0.50 to ")
    assert second == "ppo: interquartile mean -0.12 (-0.12 to -0.12) at the end"


def test_levels_begin_with_0_where_all_runs_beat_the_random_policy():
    figure = pyplot.figure()
    plot.draw_profiles(figure, {"ppo": np.array([[[0, 0.5]], [[0, 1]]])})
    assert figure.axes[1].lines[0].get_xdata()[0] == 0
    pyplot.close(figure)


def test_nothing_is_minus_0(capsys):
    figure = pyplot.figure()
    plot.draw_profiles(figure, {"ppo": np.array([[[0, -0.001]]])})
    pyplot.close(figure)
    assert capsys.readouterr().out == "ppo: interquartile mean 0.00 (0.00 to 0.00) at the end\n"
    assert plot.spread([-0.0, -0.0, -0.0]) == "0 (0 to 0)"


# All of it


def test_main(tmp_path, capsys):
    folder = tmp_path / "runs"
    write(folder / "a", ["10,150,0", "640,1,4"], seed=1)
    write(folder / "b", ["10,150,0", "640,1,6"], seed=2)
    write(folder / "c", ["10,150,0", "640,1,2"], script="is_pg")
    write(folder / "d", ["10,150,0", "320,1,2"], env_id="B")
    write(tmp_path / "random" / "a", ["10,1,1"])
    pictures = dict(output=str(tmp_path / "a.png"), profiles=str(tmp_path / "b.png"))
    random = str(tmp_path / "random")
    plot.main(plot.Args([str(folder)], bar=5, table=True, random=random, **pictures))
    assert capsys.readouterr().out.splitlines() == [
        "A is_pg: ends with 2 at step 640 (runs: 1); 0 of 1 runs reach 5",
        "A ppo: ends with 5 (4 to 6) at step 640 (runs: 2); 1 of 2 runs reach 5, at step 640",
        "B ppo: ends with 2 at step 320 (runs: 1); 0 of 1 runs reach 5",
        f"plot: {tmp_path / 'a.png'}",
        "| environment | steps | `is_pg` | `ppo` |",
        "| --- | --- | --- | --- |",
        "| A | 640 | 2 | 5 (4 to 6) |",
        "| B | 320 |  | 2 |",
        "scores of A",
        "is_pg: interquartile mean 0.20 (0.20 to 0.20) at the end",
        "ppo: interquartile mean 0.80 (0.60 to 1.00) at the end",
        f"plot: {tmp_path / 'b.png'}",
    ]
    for picture in pictures.values():
        assert open(picture, "rb").read(4) == b"\x89PNG"


def test_runs_of_the_random_policy_of_other_environments_are_of_no_use(tmp_path, capsys):
    runs = write(tmp_path / "runs" / "a", ["10,1,5"])
    write(tmp_path / "random" / "a", ["10,1,1"], env_id="B")
    args = plot.Args([runs], output="", profiles="x.png", random=str(tmp_path / "random"))
    with pytest.raises(SystemExit):
        plot.main(args)
    assert "has no run of these environments" in capsys.readouterr().err


def test_main_draws_the_column_it_is_asked_for(tmp_path, capsys):
    write(tmp_path / "a", ["10,1,5,0.5"], columns="step,episodes,return_last100,kl")
    plot.main(plot.Args([str(tmp_path)], output="", column="kl", table=True))
    out = capsys.readouterr().out
    assert "A ppo: ends with 0.5 at step 10" in out
    assert "| A | 10 | 0.5 |" in out
    assert "plot:" not in out


def test_rliable_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rliable.library", None)
    with pytest.raises(SystemExit):
        plot.main(plot.Args(["nothing"]))
    assert "plots need matplotlib and rliable (ModuleNotFoundError)" in capsys.readouterr().err


def test_a_folder_that_does_not_exist_is_said(tmp_path, capsys):
    """One of several that is misspelled."""
    good = write(tmp_path / "runs" / "a", ["10,1,5"])
    with pytest.raises(SystemExit) as stop:
        plot.main(plot.Args([good, str(tmp_path / "tpyo")], output=""))
    assert stop.value.code == 2
    assert f"there is no file or folder {tmp_path / 'tpyo'}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nowhere/x.png", "x.foo"])
def test_a_picture_that_cannot_be_written_is_said(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        plot.save(pyplot.figure(), str(tmp_path / name))
    assert stop.value.code == 2
    assert f"cannot write {tmp_path / name}: " in capsys.readouterr().err


@pytest.mark.parametrize("option", ["output", "profiles"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.foo", "cannot write {}: Format 'foo' is not supported"),
        ("x.pgf", "cannot write {}: "),  # without LaTeX
        ("", "{} is a folder: name a file to write"),
        ("new/", "{}/ is a folder: name a file to write"),
        ("nowhere/x.png", "there is no folder"),
    ],
)
def test_bad_pictures_are_said_before_the_work(option, name, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(plot, "read_runs", None)
    path = f"{tmp_path / name}/" if name.endswith("/") else str(tmp_path / name)
    with pytest.raises(SystemExit) as stop:
        plot.main(plot.Args([str(tmp_path)], **{"output": "", option: path}))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert words.format(tmp_path / name) in said
    assert said.count("\n") == 1


def test_two_pictures_have_two_names(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot, "read_runs", None)
    path = str(tmp_path / "x.png")
    with pytest.raises(SystemExit) as stop:
        plot.main(plot.Args([str(tmp_path)], output=path, profiles=path))
    assert stop.value.code == 2
    assert "--output and --profiles name one picture: give two" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "start"), [("x", b"\x89PNG"), ("x.PNG", b"\x89PNG"), ("x.pdf", b"%PDF")]
)
def test_a_picture_is_in_the_file_that_is_said(name, start, tmp_path, capsys):
    path = tmp_path / name
    plot.refuse_picture(str(path))
    plot.save(pyplot.figure(), str(path))
    pyplot.close("all")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes().startswith(start)
    assert capsys.readouterr().out == f"plot: {path}\n"


def test_only_this_tool_takes_names_for_no_formulas(monkeypatch, tmp_path, capsys):
    """In the figures of others, 10² on a logarithmic axis is a formula."""
    monkeypatch.setitem(pyplot.rcParams, "text.parse_math", True)
    assert plot.import_pyplot() is pyplot
    assert pyplot.rcParams["text.parse_math"]
    run = write(tmp_path / "a", ["10,1,5"], script="$x$")
    plot.main(plot.Args([run], output=""))
    assert not pyplot.rcParams["text.parse_math"]
