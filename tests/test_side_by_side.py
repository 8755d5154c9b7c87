"""tools.side_by_side: its alignment, what it marks, and the page in a browser."""

import difflib
import itertools
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tyro

from tools import side_by_side

pytestmark = pytest.mark.text

ROOT = Path(__file__).parents[1]
NAMES = ["vanilla_pg", "is_pg", "trpo", "ppo"]
TEXTS = [(ROOT / f"{name}.py").read_text(encoding="utf-8") for name in NAMES]
FILES = [text.splitlines() for text in TEXTS]
SETS = [some for size in (2, 3, 4) for some in itertools.combinations(NAMES, size)]
MIDDLE = [f"line_{i} = {i}" for i in range(10)]
SMALL = [
    ["alpha = 1", *MIDDLE, "omega = 1"],
    ["alpha = 2", *MIDDLE, "omega = 1"],
    ["alpha = 1", *MIDDLE, "omega = 3"],
]


ARGS = ["@dataclass", "class Args:"]
ARGS += ["    alpha: int = 1", "    beta: int = 1", "    gamma: int = 1", "", ""]
COLLECT = ["@final", "class Collect:", "    x = 1", "    y = 1", "    z = 1", "", ""]
RUN = [
    "# --- the run",
    "",
    "",
    "def make_envs(args):",
    "    envs = 0",
    "    return envs",
    "",
    "",
    "class Run:",
    "    step = 0",
    "",
    "",
    "main(Args())",
]


def anatomy(last):
    """A small script with all parts of a script, by the last line of its algorithm."""
    lines = ['"""A script."""', "", "import json", "import math", "", "from x import y", "", ""]
    lines += [*ARGS, "# --- algorithm", "", "", "def update_policy(policy):"]
    lines += ["    x = 1", "    y = 1", "    z = 1", f"    {last}", "", ""]
    lines += ["# --- shared by every script", "", "", "def update_value(value):"]
    lines += ["    x = 1", "    y = 1", "    return x", "", "", *COLLECT, "def main(args):"]
    lines += ["    for _ in range(9):", "        update_policy(args)"]
    return [*lines, "        update_value(args)", "    return 0", "", "", *RUN]


ANATOMY = anatomy("return 1")


@pytest.fixture(scope="module")
def rows():
    return side_by_side.align(FILES)


@pytest.fixture(scope="module")
def text():
    return side_by_side.page(NAMES, TEXTS)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["abc", "ac"], [(0, 0), (1, None), (2, 1)]),
        (["ac", "abc"], [(0, 0), (None, 1), (1, 2)]),
        (["abc", "ac", "abcd"], [(0, 0, 0), (1, None, 1), (2, 1, 2), (None, None, 3)]),
        # Nothing alike between a and b: next to each other, the gap last
        (["axyb", "auvwb"], [(0, 0), (1, 1), (2, 2), (None, 3), (3, 4)]),
    ],
)
def test_alignment_by_hand(files, expected):
    assert side_by_side.align([[f"{c} = {c}{c}()" for c in file] for file in files]) == expected


def test_a_changed_line_is_in_the_row_of_the_one_it_changes():
    """Not first with first: of three words, two and the name at the beginning are the same."""
    one = ["begin()", "ratio = exp(logits)", "end()"]
    other = ["begin()", "total = count", "ratio = exp(others)", "end()"]
    assert side_by_side.align([one, other]) == [(0, 0), (None, 1), (1, 2), (2, 3)]


def test_equal_is_more_than_similar():
    """Four words that are the same, of two lines that cross, are more than seven that are alike."""
    one = ["total = f(a)", "run(a, b, c, d, e, h)"]
    other = ["run(a, b, c, d, e, i)", "total = f(a)"]
    assert side_by_side.align([one, other]) == [(None, 0), (0, 1), (1, None)]


def test_lines_that_begin_alike_are_in_one_row():
    other = ["clipped.append(ratio)", "return dict(clip=torch.cat(clipped).mean())"]
    assert side_by_side.align([["return {}"], other]) == [(None, 0), (0, 1)]


def test_an_inserted_function_comes_with_the_blank_lines_below_it():
    one = ["# --- algorithm", "", "", "def update():", "    return {}"]
    other = [*one[:3], "def helper():", "    x = 1", "", "    return x", "", "", *one[3:]]
    inserted = [(None, j) for j in range(3, 9)]
    rows = [(0, 0), (1, 1), (2, 2), *inserted, (3, 9), (4, 10)]
    assert side_by_side.align([one, other]) == rows
    assert side_by_side.align([other, one]) == [row[::-1] for row in rows]


def test_a_blank_line_between_functions_is_none_within_one():
    one, other = ["x = 1", "", "", "class Z:"], ["x = 1", "", "    y()", "", "", "class Z:"]
    expected = [(0, 0), (None, 1), (None, 2), (1, 3), (2, 4), (3, 5)]
    assert side_by_side.align([one, other]) == expected


def test_every_line_is_there_once_and_in_order(rows):
    for c, file in enumerate(FILES):
        assert [row[c] for row in rows if row[c] is not None] == list(range(len(file)))
    assert all(any(i is not None for i in row) for row in rows)


def test_what_all_share_is_in_one_row(rows):
    once = [{line for line in file if file.count(line) == 1} for file in FILES]
    shared = set.intersection(*once)
    assert len(shared) > 250
    for line in shared:
        assert tuple(file.index(line) for file in FILES) in rows


@pytest.mark.parametrize("start", ["# --- algorithm", "def update_policy(", "def update_value("])
def test_slots_begin_in_one_row(rows, start):
    places = [[line.startswith(start) for line in file].index(True) for file in FILES]
    assert tuple(places) in rows


def test_objectives_are_in_one_row():
    """Those of four algorithms, though the lines around them differ as well."""
    objectives = [
        "    objective = (dist.log_prob(batch.actions) * batch.advantages).mean()",
        "    objective = (ratio * batch.advantages).mean()",
        "    return (ratio * batch.advantages).mean(), kl_divergence(old_dist, dist).mean()",
        "    objective = torch.min(ratio * advantages, clipped_ratio * advantages).mean()",
    ]
    ratio = "    ratio = (dist.log_prob(batch.actions) - old_log_probs).exp()"
    clip = "    clipped_ratio = ratio.clamp(1 - args.clip_eps, 1 + args.clip_eps)"
    above = [[], [ratio], [ratio], [ratio, clip]]
    dist = "    dist = policy(batch.obs)"
    files = [["def f():", dist, *lines, x] for lines, x in zip(above, objectives)]
    assert side_by_side.align(files) == [
        (0, 0, 0, 0),
        (1, 1, 1, 1),
        (None, 2, 2, 2),
        (None, None, None, 3),
        (2, 3, 3, 4),
    ]


@pytest.mark.parametrize(
    ("c", "start"), [(0, "objective = (dist.log_prob"), (3, "objective = torch.min(ratio")]
)
def test_objectives_of_the_scripts_are_beside_one_of_is_pg(rows, c, start):
    lines = [side_by_side.lines_of(row, FILES) for row in rows]
    (row,) = (row for row in lines if (row[c] or "").strip().startswith(start))
    assert row[1].strip().startswith("objective = (")


@pytest.mark.parametrize(("a", "b"), [*itertools.combinations(range(4), 2)])
def test_two_columns_are_aligned_as_well_as_difflib_aligns_two_files(rows, a, b):
    """In lines that are alike; blank lines within a function go wherever other lines leave them."""
    files = [side_by_side.keys(file) for file in FILES]
    lines = [side_by_side.lines_of(row, files) for row in rows]
    equal = sum(row[a] == row[b] and bool(row[a]) for row in lines)
    matcher = difflib.SequenceMatcher(None, files[a], files[b], autojunk=False)
    found = [files[a][i : i + size] for i, _, size in matcher.get_matching_blocks()]
    assert equal >= sum(map(bool, itertools.chain(*found)))


def test_parts_by_hand():
    """Each line is in the part that the last heading began, or the definition of Args or main."""
    one = ["import x", "class Args:", "    y = 1", "def check():", "# --- algorithm", "def main():"]
    one += ["# --- shared by every script", "def f():", "def main(args):", "    f()", "@g"]
    one += ["def h():", "# --- the run", "def main(args):", "class Args:", "# --- more", "z()"]
    expected = ["", "args", "args", "args", "algorithm", "algorithm"]
    expected += ["shared", "shared", "main", "main", "shared"]
    expected += ["shared", "run", "run", "run", "shared", "shared"]
    rows = [(i, i) for i in range(len(one))]
    assert side_by_side.parts_of(rows, [one, one]) == expected
    rows = [(i, None) for i in range(len(one))] + [(None, 0)]
    assert side_by_side.parts_of(rows, [one, ["x"]]) == [*expected, "shared"]


def test_parts_of_a_file_without_headings():
    one = ["x = 1", "def f():", "    y", "def main(args):", "    f()", "if z:", "def g():"]
    expected = ["", "", "", "main", "main", "main", "shared"]
    assert side_by_side.parts_of([(i,) for i in range(len(one))], [one]) == expected


def marks(*lines):
    """The words of each line that not all related lines have."""
    return [
        [text.strip() for text, files in pieces if files != related]
        for _, related, pieces in side_by_side.compare(lines)
    ]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["lr = 3e-3  # size", "lr = 5e-4  # size"], [["3e-3"], ["5e-4"]]),
        (["y = (log_probs * a).mean()", "y = (ratio * a).mean()"], [["log_probs"], ["ratio"]]),
        (["f(a, b)", "f(a, b, 0.5)"], [[], [",", "0.5"]]),
        (["f(a, b)", "f(a, b)"], [[], []]),
        (["f(a, b)", "f(a, b)", "f(a, c)"], [["b"], ["b"], ["c"]]),
        (["f(a, b)", "f(a, b)", None], [[], [], []]),
        (["f(a, b)", "while it:", "f(a, c)"], [["b"], [], ["c"]]),  # one is another line altogether
        (["f(a, b, c)", "f(x, y, z)"], [[], []]),  # 2 of 5 words
        (["f(a, b, c)", "f(a, y, z)"], [["b", "c"], ["y", "z"]]),  # 3 of 5
    ],
)
def test_words_marked_by_hand(lines, expected):
    assert marks(*lines) == expected


def test_files_that_have_a_line_and_a_word():
    one, two, three, gap = side_by_side.compare(["f(a, b)", "f(a, b)", "f(a, c)", None])
    assert [(same, related) for same, related, _ in (one, two, three, gap)] == [
        (0b0011, 0b0111),
        (0b0011, 0b0111),
        (0b0100, 0b0111),
        (0, 0),
    ]
    assert one[2] == [("f", 7), ("(", 7), ("a", 7), (",", 7), (" b", 3), (")", 7)]
    assert three[2][4] == (" c", 4)


def test_pieces_are_the_whole_line():
    for line in ["  ", "\tx = 1 \t", *itertools.chain(*FILES)]:
        assert "".join(side_by_side.TOKEN.findall(line)) == line


def test_the_page_is_that_of_the_scripts(text):
    page = (ROOT / "docs" / "side_by_side.html").read_text(encoding="utf-8")
    assert page == text, "the scripts have changed: run python -m tools.side_by_side"


def test_the_page_loads_nothing(text):
    assert re.findall(r"""\b(?:src|srcset|action|poster)=|url\(|@import|https?:|//\w""", text) == []
    assert all(address.startswith("#") for address in re.findall(r'href="([^"]*)"', text))
    assert len(text.encode()) < 300_000


class Nesting(HTMLParser):
    """Every element is closed in its place."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        self.open += [tag] * (tag not in ("meta", "wbr"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_elements_nest(text):
    parser = Nesting()
    parser.feed(text)
    parser.close()
    assert parser.open == []


def test_equations_are_those_of_the_docstrings():
    sources = ['"""A (B 2015, eq. 1).\n\n    maximize  x < y,  z\n\nRun: it\n"""\n', "y = 1\n"]
    assert side_by_side.headline(sources[0]) == (
        "A (B 2015, eq. 1).",
        "<span>maximize</span> <span>x &lt; y,</span> <span>z</span>",
    )
    assert side_by_side.headline(sources[1]) == side_by_side.headline("no Python (") == ("", "")
    page = side_by_side.page(["a", "b"], [sources[0], sources[1]])
    assert page.count("<p>A (B 2015, eq. 1).</p>") == 1
    assert "slot" not in side_by_side.page(["a", "b"], ["x = 1", "y = 1"]).split("<tbody>")[1][:200]


def test_all_text_is_escaped():
    hostile = '<script>alert("&amp;")</script> </td> @ROWS@'
    page = side_by_side.page(["<a>", 'b"c'], [hostile, f'"""{hostile}\n\n    {hostile}\n"""'])
    assert "<script>alert" not in page
    assert page.count("<tbody>") == 1
    assert "@ROWS@</p>" in page
    Nesting().feed(page)


def test_files_of_ones_own(tmp_path, capsys):
    for folder, line in (("one", "x = 1"), ("other", "x = 2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(line + "\n", encoding="utf-8")
    paths = tuple(str(tmp_path / folder / "mine.py") for folder in ("one", "other"))
    output = str(tmp_path / "page.html")
    side_by_side.main(side_by_side.Args(paths, output))
    assert capsys.readouterr().out == f"page: {output}\n"
    page = Path(output).read_text(encoding="utf-8")
    assert all(f'<th scope="col">{path}</th>' for path in paths)
    assert re.findall(r'<td data-n="1".*?</td>', page) == [
        f'<td data-n="1" style="--i:0" data-s="{c}">x = '
        f'<span class="w" data-m="{c}">{c}</span></td>'
        for c in (1, 2)
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["ppo.py"], "give two to nine scripts to compare, not 1"),
        (["ppo.py"] * 10, "give two to nine scripts to compare, not 10"),
        (["ppo.py", "ppo.py"], "a script is given twice: compare different ones"),
        (["ppo.py", "no.py"], "cannot read no.py: No such file or directory"),
        (["ppo.py", "docs"], "cannot read docs: Is a directory"),
        (["ppo.py", "latin1.py"], "cannot read latin1.py: it is not text in UTF-8"),
        (
            ["ppo.py", "is_pg.py", "--output", "no/x.html"],
            "cannot write no/x.html: No such file or directory",
        ),
    ],
)
def test_bad_input(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "latin1.py").write_bytes("x = 'é'".encode("latin1"))
    for name, text in zip(NAMES, TEXTS):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    before = set(tmp_path.rglob("*"))
    options = ["--output", str(tmp_path / "page.html"), *arguments]
    with pytest.raises(SystemExit) as stop:
        side_by_side.main(tyro.cli(side_by_side.Args, args=options))
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("scripts", "output"),
    [(side_by_side.SCRIPTS, "docs/side_by_side.html"), (("ppo.py", "my.py"), "side_by_side.html")],
)
def test_other_files_do_not_replace_the_page_of_the_scripts(scripts, output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for path in (*side_by_side.SCRIPTS, "my.py"):
        (tmp_path / path).write_text("x = 1\n", encoding="utf-8")
    side_by_side.main(side_by_side.Args(scripts))
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.html")] == [Path(output)]


def test_the_command_writes_the_same_each_time(tmp_path, text):
    command = [sys.executable, "-m", "tools.side_by_side", "--output", str(tmp_path / "page.html")]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert (tmp_path / "page.html").read_bytes() == text.encode()


# In a browser


@pytest.fixture(scope="module")
def browser():
    reason = "needs a browser: pip install playwright, and apt-get install chromium"
    api = pytest.importorskip("playwright.sync_api", reason=reason)
    with api.sync_playwright() as playwright:
        path = shutil.which("chromium") or playwright.chromium.executable_path
        if not os.path.exists(path):
            pytest.skip(reason)
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def show(browser, text, tmp_path):
    """Open the page of the scripts, or of small files. At the end nothing may have gone wrong."""
    contexts, trouble = [], []

    def show(address="", files=None, width=1366, height=768, **options):
        page = (
            text
            if files is None
            else side_by_side.page("abc"[: len(files)], ["\n".join(lines) for lines in files])
        )
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        contexts.append(browser.new_context(viewport=dict(width=width, height=height), **options))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: trouble.append(message.text))
        tab.on("pageerror", lambda error: trouble.append(str(error)))
        tab.on("request", lambda r: r.url.startswith("file://") or trouble.append(r.url))
        tab.goto((tmp_path / "page.html").as_uri() + address)
        return tab

    yield show
    for context in contexts:
        context.close()
    assert trouble == []


# Of each row of code that is seen: its kind, and of its cells column, number, text and box
SEEN = """() => [...document.querySelectorAll("tbody tr:not(.label):not(.slot)")].map(tr => ({
  kind: tr.className || "fold",
  cells: [...tr.cells].map((td, c) => ({td, c})).filter(({td}) => td.getClientRects().length)
    .map(({td, c}) => {
      const {left, top, bottom} = td.getBoundingClientRect();
      const gap = td.className === "gap", number = +td.dataset.n;
      return {c, gap, number, text: td.textContent, left, top, bottom};
    }),
})).filter(row => row.cells.length)"""
CUT = """[...document.querySelectorAll("td, p, button")]
  .filter(x => x.scrollWidth > x.clientWidth).map(x => x.textContent)"""
WIDTHS = "[document.scrollingElement.scrollWidth, innerWidth]"


def seen(tab):
    return tab.evaluate(SEEN)


def kinds(tab):
    return "".join(row["kind"][0] for row in seen(tab))


def columns(tab):
    return tab.locator("th:visible").all_inner_texts()


def marked(tab):
    return tab.locator("tbody .w:visible").all_inner_texts()


def test_columns_are_aligned(show):
    tab = show(f"#{','.join(NAMES)}")
    tab.keyboard.press("f")
    for some in SETS:
        tab.evaluate(f"location.hash = '{','.join(some)}'")
        tab.wait_for_function(
            f"document.querySelectorAll('th:not([hidden])').length == {len(some)}"
        )
        check_alignment(tab, some)


def check_alignment(tab, some):
    assert columns(tab) == list(some)
    lefts = tab.evaluate(
        "[...document.querySelectorAll('th')].map(th => th.getBoundingClientRect().left)"
    )
    shown, bottom = {NAMES.index(name): [] for name in some}, -1e9
    for row in seen(tab):
        assert len({(cell["top"], cell["bottom"]) for cell in row["cells"]}) == 1
        assert row["cells"][0]["top"] >= bottom - 0.01
        bottom = row["cells"][0]["bottom"]
        if row["kind"] == "fold":
            continue
        assert [cell["c"] for cell in row["cells"]] == list(shown)
        assert all(cell["left"] == lefts[cell["c"]] for cell in row["cells"])
        texts = [None if cell["gap"] else cell["text"] for cell in row["cells"]]
        assert row["kind"] == ("same" if len(set(texts)) == 1 else "diff")
        assert set(texts) != {None}
        for cell in row["cells"]:
            if not cell["gap"]:
                shown[cell["c"]].append((cell["number"], cell["text"]))
    for c, lines in shown.items():
        assert lines == list(enumerate(FILES[c], 1))
    width, room = tab.evaluate(WIDTHS)
    assert width <= room


def test_equations_stand_above_the_slots(show):
    tab = show("#is_pg,ppo")
    row = tab.locator("tr.slot")
    titles = [text.split("\n")[0].removeprefix('"""') for text in (TEXTS[1], TEXTS[3])]
    assert row.locator("p:first-child:visible").all_inner_texts() == titles
    equations = row.locator("p:last-child:visible").all_inner_texts()
    for equation, source in zip(equations, (FILES[1], FILES[3])):
        assert equation.split() == source[2].split()
    assert "clip(ρ, 1−ε, 1+ε)" in equations[1]
    below = row.bounding_box()["y"] + row.bounding_box()["height"]
    first = min(x["cells"][0]["top"] for x in seen(tab) if x["cells"][0]["top"] >= below - 1)
    (marker,) = (x for x in seen(tab) if x["cells"][0]["text"] == "# --- algorithm")
    assert marker["cells"][0]["top"] == first


def test_folding(show):
    """Of two files one line differs, the first: two lines below it stay, nine are folded."""
    tab = show("#a,b", SMALL)
    assert kinds(tab) == "dssf"
    button = tab.get_by_role("button", name="9 lines, the same in both")
    assert button.get_attribute("aria-expanded") == "false"
    button.click()
    assert kinds(tab) == "dss" + "f" + 9 * "s"
    assert button.get_attribute("aria-expanded") == "true"
    button.press("Enter")
    assert kinds(tab) == "dssf"
    tab.get_by_role("button", name="Unfold all").click()
    assert kinds(tab) == "dssf" + 9 * "s"
    tab.keyboard.press("f")
    assert kinds(tab) == "dssf"


def bars(tab):
    return tab.locator(".fold button").all_inner_texts()


def code(tab):
    """The code that is seen in the first column, without blank lines."""
    cells = [row["cells"][0] for row in seen(tab) if row["kind"] != "fold"]
    return [cell["text"] for cell in cells if cell["text"]]


def test_functions_are_folded_one_by_one_under_their_names(show):
    tab = show("#a,b", [ANATOMY, anatomy("return 2")])
    assert bars(tab)[:-1] == [
        "imports: 6 lines, the same in both",
        "update_value: 4 lines, the same in both",
        "Collect: 5 lines, the same in both",
    ]
    tab.locator(".fold button").nth(2).click()
    first = code(tab).index("# --- shared by every script") + 1
    last = code(tab).index("def main(args):")
    assert code(tab)[first:last] == [line for line in COLLECT if line]


def test_args_the_algorithm_and_main_are_open(show):
    tab = show("#a,b", [ANATOMY, anatomy("return 2")])
    assert code(tab) == [
        "@dataclass",
        "class Args:",
        "    alpha: int = 1",
        "    beta: int = 1",
        "    gamma: int = 1",
        "# --- algorithm",
        "def update_policy(policy):",
        "    x = 1",
        "    y = 1",
        "    z = 1",
        "    return 1",
        "# --- shared by every script",
        "def main(args):",
        "    for _ in range(9):",
        "        update_policy(args)",
        "        update_value(args)",
        "    return 0",
    ]


def test_the_run_is_folded_as_a_whole(show):
    tab = show("#a,b", [ANATOMY, anatomy("return 2")])
    hidden = [line for line in RUN if line]
    assert not set(hidden) & set(code(tab))
    bar = tab.locator(".fold button").last
    assert bar.inner_text() == "the run: 13 lines, the same in both (make_envs, Run)"
    assert bar.get_attribute("aria-expanded") == "false"
    bar.click()
    assert bar.get_attribute("aria-expanded") == "true"
    assert code(tab)[-len(hidden) :] == hidden
    assert len(bars(tab)) == 4  # no more folds within it
    bar.click()
    assert not set(hidden) & set(code(tab))
    tab.keyboard.press("f")
    assert code(tab) == [line for line in ANATOMY if line]


def test_a_difference_in_the_run_is_told_and_counted_once_it_is_open(show):
    one = ["x = 1", *RUN]
    for line, count in (("    envs = 1", "1 of them differs"), ("    run = 1\n    y", "2 of them")):
        other = "\n".join(RUN).replace("    envs = 0", line).split("\n")
        tab = show("#a,b", [one, ["x = 2", *other]])
        assert count in tab.locator(".fold button").last.inner_text()
        assert tab.locator("#status").inner_text() == "1 difference"
        tab.keyboard.press("n")
        tab.keyboard.press("n")  # there is no other to go to
        assert tab.locator("#status").inner_text() == "1 of 1 difference"
        tab.locator(".fold button").last.click()
        assert tab.locator("#status").inner_text() == "1 of 2 differences"
        tab.keyboard.press("n")
        assert tab.locator("#status").inner_text() == "2 of 2 differences"


def test_a_file_without_a_run_has_no_such_fold(show):
    above = ANATOMY[: ANATOMY.index("# --- the run")]
    tab = show("#a,b", [above, above])
    assert not any("the run" in bar for bar in bars(tab))
    assert code(tab)[-1] == "    return 0"


def test_choosing_columns(show):
    tab = show("", SMALL)
    assert columns(tab) == ["a", "b"]
    assert (kinds(tab), marked(tab)) == ("dssf", ["1", "2"])
    tab.keyboard.press("3")
    assert columns(tab) == ["a", "b", "c"]
    assert tab.url.endswith("#a,b,c")
    assert (kinds(tab), marked(tab)) == ("dssfssd", ["1", "2", "1", "1", "1", "3"])
    assert tab.locator(".fold button").inner_text() == "6 lines, the same in all 3"
    assert tab.locator("#status").inner_text() == "2 differences"
    toggle = tab.locator("#bar [aria-pressed]").nth(1)
    toggle.click()
    assert columns(tab) == ["a", "c"]
    assert toggle.get_attribute("aria-pressed") == "false"
    assert (kinds(tab), marked(tab)) == ("fssd", ["1", "3"])
    tab.keyboard.press("1")
    assert columns(tab) == ["a", "c"]
    assert tab.locator("#status").inner_text() == "at least two"


def test_lines_that_not_all_columns_have(show):
    tab = show("#a,b", [["x = 1", "y = f(2)"], ["x = 1", "y = f(3)"], ["x = 1"]])
    for key, alone, words in (("", [], ["2", "3"]), ("3", ["y = f(2)", "y = f(3)"], ["2", "3"])):
        tab.keyboard.press(key or "x")
        assert tab.locator("td.alone:visible").all_inner_texts() == alone
        assert marked(tab) == words
    tab.keyboard.press("1")
    assert tab.locator("td.alone:visible").all_inner_texts() == ["y = f(3)"]
    assert marked(tab) == []


def test_addresses(show):
    assert columns(show("#ppo,is_pg")) == ["is_pg", "ppo"]
    for address in ("#c,b", "#b,%zz,c"):
        assert columns(show(address, SMALL)) == ["b", "c"]
    for address in ("#c,c", "#c,%zz"):
        assert columns(show(address, SMALL)) == ["a", "b"]


def test_links_and_the_way_back(show):
    tab = show()
    tab.get_by_role("link", name="trpo → ppo", exact=True).click()
    assert columns(tab) == ["trpo", "ppo"]
    assert tab.locator("[aria-current]").all_inner_texts() == ["trpo → ppo"]
    tab.go_back()
    tab.wait_for_function("document.querySelector('th').hidden === false")
    assert columns(tab) == ["vanilla_pg", "is_pg"]


def test_a_wide_screen_shows_all(show):
    assert columns(show(width=1920, height=1080)) == NAMES


@pytest.mark.parametrize("width", [1366, 390])
def test_from_one_difference_to_the_next(show, width):
    tab = show("#is_pg,ppo", width=width)
    there = """() => {
      const all = [...document.querySelectorAll("tbody.diff")], {activeElement: at} = document;
      return [all.indexOf(at), all.length, at.getBoundingClientRect().top];
    }"""
    places = []
    for key, place in zip("njnnkpp", [0, 1, 2, 3, 2, 1, 0]):
        tab.keyboard.press(key)
        at, count, top = tab.evaluate(there)
        assert at == place
        assert 0 < top < 768
        assert tab.locator("#status").inner_text() == f"{place + 1} of {count} differences"
        places.append(tab.evaluate("scrollY"))
    assert places[3] > places[0] == places[6]
    for _ in range(count):
        tab.get_by_role("button", name="Next difference").click()
    assert tab.locator("#status").inner_text() == f"{count} of {count} differences"
    tab.evaluate("scrollTo(0, 0)")  # then it goes on from what is seen
    tab.keyboard.press("n")
    assert tab.evaluate(there)[0] == 0


def test_what_is_read_stays_where_it_is(show):
    tab = show("#vanilla_pg,is_pg")
    for _ in range(7):
        tab.keyboard.press("n")
    tab.evaluate("""() => {
      const edge = document.querySelector("th").getBoundingClientRect().bottom;
      read = [...document.querySelectorAll("td[data-n]")]
        .find(td => td.getBoundingClientRect().top >= edge);
    }""")
    top, height = "read.getBoundingClientRect().top", "document.body.scrollHeight"
    before = tab.evaluate(top)
    for key in "f3f3":
        was = tab.evaluate(height)
        tab.keyboard.press(key)
        assert tab.evaluate(height) != was
        assert tab.evaluate(top) == pytest.approx(before, abs=1)


def test_shortcuts_of_the_browser_are_left_alone(show):
    tab = show("", SMALL)
    press = """(options) => document.body.dispatchEvent(
      new KeyboardEvent("keydown", {bubbles: true, cancelable: true, ...options}))"""
    for modifier in ("ctrlKey", "metaKey", "altKey"):
        for key in "fnp13":
            assert tab.evaluate(press, {"key": key, modifier: True})
    assert (columns(tab), kinds(tab)) == (["a", "b"], "dssf")
    assert tab.evaluate(press, {"key": "x"})
    assert not tab.evaluate(press, {"key": "3"})
    assert columns(tab) == ["a", "b", "c"]


def test_help(show):
    tab = show("", SMALL)
    tab.keyboard.press("?")
    assert "next difference" in tab.get_by_role("dialog").inner_text()
    tab.keyboard.press("3")  # not while it is open
    assert columns(tab) == ["a", "b"]
    tab.keyboard.press("Escape")
    assert not tab.locator("dialog").is_visible()


def test_every_button_is_reached_by_tab_and_seen_there(show):
    tab = show()
    buttons, reached = tab.locator("button:visible, a:visible").count(), set()
    for _ in range(buttons):
        tab.keyboard.press("Tab")
        text, style = tab.evaluate(
            "[document.activeElement.innerText, getComputedStyle(document.activeElement).outline]"
        )
        reached.add(text)
        assert "solid" in style
    assert len(reached) == buttons


@pytest.mark.parametrize("some", [("is_pg", "ppo"), tuple(NAMES)], ids=",".join)
def test_a_phone_shows_the_versions_below_one_another(show, some):
    tab = show("#" + ",".join(some), width=390, height=844)
    tab.keyboard.press("f")
    width, room = tab.evaluate(WIDTHS)
    assert width <= room
    assert tab.evaluate(CUT) == []
    lines = {NAMES.index(name): [] for name in some}
    for row in seen(tab):
        assert row["kind"] == "diff" or len(row["cells"]) == 1  # what all share, once
        for c in lines if row["kind"] == "same" else ():
            lines[c].append(row["cells"][0]["text"])
        for cell in row["cells"] if row["kind"] == "diff" else ():
            lines[cell["c"]].append(cell["text"])
    assert all(text == FILES[c] for c, text in lines.items())
    blocks = tab.evaluate("""() => [...document.querySelectorAll("tbody.diff")].map(body =>
      [...body.querySelectorAll("td")].filter(td => td.getClientRects().length)
      .map(td => [td.getBoundingClientRect().top, +td.style.order, td.dataset.n ?? td.textContent])
      .sort(([one], [other]) => one - other))""")
    for block in blocks:
        orders = [c for _, c, _ in block]
        assert orders == sorted(orders)
        for c, cells in itertools.groupby(block, lambda cell: cell[1]):
            (_, _, label), *numbers = cells
            assert label == NAMES[c]
            assert len(numbers) > 0
            assert [int(n) for _, _, n in numbers] == sorted(int(n) for _, _, n in numbers)


@pytest.mark.parametrize("width", [1366, 390])
def test_a_long_word_is_not_cut(show, width):
    tab = show("", [["x" * 400, f"y = {'z' * 400}"], ["x" * 400, "y = 1"]], width=width)
    assert tab.evaluate(CUT) == []
    assert len(set(tab.evaluate(WIDTHS))) == 1


# Of every element with text of its own, and of line numbers: contrast and what it is
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const light = color => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    const color = getComputedStyle(element).backgroundColor;
    return color === "rgba(0, 0, 0, 0)" ? behind(element.parentElement) : color;
  };
  const found = {};
  for (const element of document.querySelectorAll("body *:not(script)")) {
    if (!element.getClientRects().length) continue;
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    for (const part of [own && "", element.dataset.n && "::before"].filter(x => x?.length >= 0)) {
      const color = getComputedStyle(element, part || undefined).color;
      const pair = [light(color), light(behind(element))].sort((one, other) => one - other);
      const row = element.closest("tr")?.className ?? "";
      found[[element.tagName, element.className, row, part]] = (pair[1] + .05) / (pair[0] + .05);
    }
  }
  return found;
}"""


def test_contrast_in_light_and_dark(show):
    backgrounds = set()
    for scheme in ("light", "dark"):
        tab = show("#vanilla_pg,is_pg,ppo", color_scheme=scheme)
        tab.keyboard.press("f")
        contrasts = tab.evaluate(CONTRASTS)
        assert {"TD,,same,", "TD,,same,::before", "SPAN,c,same,", "SPAN,w,diff,"} <= set(contrasts)
        assert {name: x for name, x in contrasts.items() if x < 4.5} == {}
        backgrounds.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        # Not by color alone
        word, alone = tab.locator("tbody .w:visible").first, tab.locator("td.alone:visible").first
        assert "underline" in word.evaluate("x => getComputedStyle(x).textDecorationLine")
        assert "inset" in alone.evaluate("x => getComputedStyle(x).boxShadow")
        small = show("#a,b", [["x = 1  # one"], ["x = 1  # two"]], color_scheme=scheme)
        assert small.evaluate(CONTRASTS)["SPAN,w c,diff,"] >= 4.5
    assert len(backgrounds) == 2


@pytest.mark.parametrize("width", [1366, 390])
def test_without_its_script_the_page_shows_all(show, width):
    tab = show(width=width, java_script_enabled=False)
    assert columns(tab) == NAMES
    assert not tab.locator("#bar").is_visible()
    assert "Without JavaScript" in tab.locator("header").inner_text()
    assert tab.locator("td[data-n]:visible").count() == sum(map(len, FILES))
    assert tab.locator("tr.same td:visible").count() > 4 * 300
    assert tab.locator("tbody .w:visible").count() > 40
