"""What tools.scale makes of its measurements."""

import csv
import os
import signal
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from processes import Job

from tools import scale

ROOT = Path(__file__).parents[1]
TWO = dict(one_number=2e-4, million_numbers=4.2e-3, reduces=10, reduced=1e6)
TWO |= dict(gathers=4, gathered=1e3)


def test_the_model_by_hand():
    """α = 100 µs, 1 ns a byte; 3 workers in a ring: 4 rounds, 4/3 of what is reduced, twice ..."""
    ring = scale.seconds_of_messages(TWO, 3, rounds=4)
    assert ring == pytest.approx(14 * 4 * 1e-4 + 4 / 3 * 1e6 * 1e-9 + 2 * 1e3 * 1e-9)


def test_the_model_gives_back_what_two_workers_take():
    for numbers, seconds in ((1, 2e-4), (10**6, 4.2e-3)):
        one = TWO | dict(reduces=1, reduced=4 * numbers, gathers=0, gathered=0)
        assert scale.seconds_of_messages(one, 2, rounds=2) == pytest.approx(seconds, rel=1e-4)


def test_tables():
    rows = [
        dict(setting="x", workers=workers, steps_per_second=speed, iteration=iteration, **more)
        for workers, speed, iteration, more in [
            (1, 90, 2.0, {}),
            (1, 100, 1.0, {}),
            (1, 110, 0.5, {}),
            (2, 150, 1.2, TWO | dict(waiting=0.1)),
        ]
    ]
    measured, model = scale.tables(rows).split("\n\n")
    assert measured.splitlines()[2:] == [
        "| x | 1 | 100 | 1.00 | 1 | | | | | |",
        "| x | 2 | 150 | 1.50 | 1.2 | 0.1 | 10 | 977 | 4 | 1 |",
    ]
    cells = model.splitlines()[2].strip("| ").split(" | ")
    # 8 workers: 14 rounds or 6, of 14 α each; 7/4 of a megabyte to reduce, 7 kB to gather
    assert [float(cell) for cell in cells[1:3]] == [1.02, 1.01]
    assert float(cells[5]) == pytest.approx(1 + 14 * 2 * 999 * 1e-4 + 2e-3 + 1e-3, rel=2e-3)


def test_what_is_gathered_is_counted_as_it_is_sent(monkeypatch):
    """Whatever it is: the scripts gather numbers, lists of returns, arrays and a folder."""
    sent, counts = [], {}
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda *args: sent.append(args))
    scale.watched("all_gather_object", scale.gathered_bytes, counts)
    objects = [Path("runs", "seed1"), 7, [1.5, -2.0], np.zeros(1000)]
    for x in objects:
        torch.distributed.all_gather_object([], x)
    assert [x for _, x in sent] == objects
    calls, size, seconds = counts["all_gather_object"]
    assert calls == 4
    assert 8000 < size < 8500
    assert 0 <= seconds < 1


def test_what_is_reduced_is_counted():
    assert scale.reduced_bytes((torch.zeros(10),)) == 40


@pytest.mark.slow
def test_two_workers_are_measured(monkeypatch):
    setting = ("ppo", dict(num_envs=2, num_steps=16, policy_epochs=1), 64)
    monkeypatch.setitem(scale.SETTINGS, "short", setting)
    row = scale.measure("short", 2)
    assert row["workers"] == 2
    assert row["reduces"] > row["gathers"] > 1
    assert set(row) == set(scale.COLUMNS)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM kills there")
def test_workers_end_with_the_tool():
    """They are in sessions of their own, and would train on if torchrun were killed."""
    code = "import sys; sys.argv[0] = '-m'; from tools import scale; "
    code += "scale.SETTINGS['long'] = ('ppo', {}, 10**9); scale.measure('long', 2)"
    job = Job(["-c", code], ROOT)
    job.wait_for(lambda: job.alive(RANK="1"))
    workers = job.alive(RANK="0") + job.alive(RANK="1")
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.end() == (-signal.SIGINT, "", "stopped\n")
    _, left = psutil.wait_procs(workers, timeout=60)
    for worker in left:
        worker.kill()
    assert not left


def test_what_is_printed_after_the_runs_is_what_the_file_gives(tmp_path):
    """A worker alone sends nothing and times no messages: 0 in the one place, "" in the other."""
    sent = dict.fromkeys([*scale.SENT, "waiting"], 0.0)
    row = dict(setting="x", workers=1, steps_per_second=90.0, iteration=2.0) | sent
    scale.keep_row(tmp_path / "scale.csv", row, scale.COLUMNS)
    with open(tmp_path / "scale.csv", encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert scale.tables([row]) == scale.tables(read)
    assert "| x | 1 | 90 | 1.00 | 2 | 0 | 0 | 0 | 0 | 0 |" in scale.tables(read)


def test_the_tables_of_the_page_are_those_of_the_measurements():
    with open(ROOT / "docs" / "scale.csv", encoding="utf-8", newline="") as file:
        tables = scale.tables(list(csv.DictReader(file)))
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert tables in page


def test_a_folder_as_the_file_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale, "measure", lambda setting, count: pytest.fail("it has begun"))
    with pytest.raises(SystemExit) as stop:
        scale.main(scale.Args(output=str(tmp_path)))
    assert stop.value.code == 2
    assert f"{tmp_path} is a folder: name a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [dict(repeats=0), dict(workers=(2, 4)), dict(workers=()), dict(workers=(1, 0))]
)
def test_there_is_one_worker_to_compare_with(options, capsys):
    with pytest.raises(SystemExit) as stop:
        scale.main(scale.Args(**options))
    assert stop.value.code == 2
    assert "--workers must have 1 in it" in capsys.readouterr().err
