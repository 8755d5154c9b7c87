"""tools.mutate: its faults fit the scripts as they are, and its table says what happened."""

import pytest

from tools import mutate
from tools.mutate import Mutant

TEXT = (mutate.ROOT / "tools" / "mutants.txt").read_text(encoding="utf-8")
MUTANTS = mutate.read_mutants(TEXT)


def test_there_are_enough_faults_and_each_fits_where_it_should():
    assert len(MUTANTS) == len(set(MUTANTS)) >= 400
    for mutant in MUTANTS:
        for path, source in mutate.apply(mutant, mutate.ROOT).items():
            before = path.read_text(encoding="utf-8").split("\n")
            after = source.split("\n")
            changed = [i for i, (one, other) in enumerate(zip(before, after)) if one != other]
            assert len(before) == len(after)
            assert len(changed) == 1


def test_read_mutants():
    text = "[a.py]\nx + 1 ==> x - 1\n[y] ==> [z]\n    it is the same\n\n[common/b.py]\nf ==> g\n"
    first, second = (
        Mutant("a.py", "x + 1", "x - 1", ""),
        Mutant("a.py", "[y]", "[z]", "it is the same"),
    )
    assert mutate.read_mutants(text) == [first, second, Mutant("common/b.py", "f", "g", "")]


def test_apply(tmp_path):
    parts = ["x = 1\n", "# --- algorithm\nx = 1\n", "# --- shared\nx = 1\nx = 22\n"]
    parts += ["# --- the run\nx = 1\n"]
    for name in mutate.SCRIPTS:
        (tmp_path / name).write_text("".join(parts), encoding="utf-8")
    places = ["options", "trpo.py", "shared", "run"]  # in their order in a script
    for i, place in enumerate(places):
        files = mutate.apply(Mutant(place, "x = 1", "x = 3", ""), tmp_path)
        names = ["trpo.py"] if place == "trpo.py" else mutate.SCRIPTS
        assert [path.name for path in files] == names
        changed = [*parts[:i], parts[i].replace("x = 1", "x = 3"), *parts[i + 1 :]]
        assert set(files.values()) == {"".join(changed)}
    (tmp_path / "common.py").write_text("y = 1\n", encoding="utf-8")
    (whole,) = mutate.apply(Mutant("common.py", "y", "z", ""), tmp_path).values()
    assert whole == "z = 1\n"
    for old, new in [("y", "z"), ("x = ", "y = "), ("x = 22", "x =")]:  # absent, twice, no Python
        with pytest.raises((ValueError, SyntaxError)):
            mutate.apply(Mutant("shared", old, new, ""), tmp_path)


def test_report():
    results = [
        (Mutant("ppo.py", "a | b", "a", ""), "exact: clipping"),
        (Mutant("ppo.py", "c", "d", ""), ""),
        (Mutant("shared", "e", "f", "it is the same"), ""),
        (Mutant("shared", "g", "h", ""), "runs: resume"),
    ]
    text = mutate.report(results, "in no time.")
    assert "2 of 3 faults are noticed (66.7%); 1 more" in text
    assert "| `a \\| b` | `a` | exact: clipping |" in text
    assert "| `c` | `d` | **nothing** |" in text
    assert "| `e` | `f` | it is the same |" in text
    assert text.index("## ppo.py") < text.index("`c`") < text.index("## shared") < text.index("`e`")


def test_a_typo_in_only_is_said(capsys):
    with pytest.raises(SystemExit) as stop:
        mutate.main(mutate.Args(only="no such line"))
    assert stop.value.code == 2
    assert "no fault has no such line in it" in capsys.readouterr().err
