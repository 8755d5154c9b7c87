"""The scripts in aligned columns, on a page of their own: what differs is marked to the word.

Run: python -m tools.side_by_side
"""

import ast
import html
import io
import itertools
import keyword
import re
import tokenize
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import tyro

from tools import fail, parse

SCRIPTS = "vanilla_pg.py", "is_pg.py", "trpo.py", "ppo.py"
HEADING = "# --- "
ALGORITHM = "# --- algorithm"  # the equations stand above this line
THE_RUN = "# --- the run"  # what is below it is folded away as a whole
DEFINITION = re.compile(r"(?:async )?def |class |@")
TOKEN = re.compile(r"\s*(?:\d[\d_.]*(?:e[-+]?\d+)?|\w+|[^\w\s])|\s+")  # with the space before it
WRAP = re.compile(r"(?<=\w)(?=\.[a-z])|(?<=[(\[=])(?=[a-z])")  # where a long word may be broken


@dataclass
class Args:
    scripts: Annotated[tuple[str, ...], tyro.conf.Positional] = SCRIPTS  # files to compare, 2 to 9
    output: str = ""  # page to write; default: side_by_side.html (of all four, that in docs)


@cache
def words(line):
    """The words of a line, without its trailing comment; a name that begins it counts twice."""
    found = re.findall(r"\w+", re.sub(r"(?<=\S)  #.*", "", line))
    return Counter(found + [word for word in found[:1] if not keyword.iskeyword(word)])


@cache
def shared(one, other):
    """How many words two lines share; 0 if those are less than half of all."""
    count = (words(one) & words(other)).total()
    total = words(one).total() + words(other).total()
    return count if 4 * count >= total else 0


@cache
def likeness(one, other):
    """How much it is worth to have two lines in one row: any pair a little, for a short page."""
    begin_alike = words(one) and [*words(one)][:1] == [*words(other)][:1]
    per_word = 200 if one == other else 100
    return per_word * shared(one, other) + (3 if begin_alike else 1)


def keys(lines):
    """The lines, with a word for the blank ones between functions, unlike those within one."""
    found = []
    between_functions = True  # so is a blank line above one that is not indented
    for line in reversed(lines):
        if line:
            between_functions = not line[0].isspace()
            found.append(line)
        else:
            found.append("blank" if between_functions else "")
    return found[::-1]


def align(files):
    """The rows of greatest likeness: for each file the index of its line, or None for a gap.

    Files are added one by one (Needleman & Wunsch 1970); every line is there once, and in order.
    """
    files = [keys(lines) for lines in files]
    rows = [(i,) for i in range(len(files[0]))]
    for count, lines in enumerate(files[1:], 1):
        rows = joined(rows, files[:count], lines)
    return rows


def joined(rows, files, lines):
    """The rows of some files, and one more file beside them."""
    best = [0] * (len(lines) + 1)  # likeness of the rows so far and the first j lines
    moves = [[(0, 1)] * (len(lines) + 1)]  # (rows, lines) that the best way ends with
    for row in rows:
        texts = [text for text in lines_of(row, files) if text is not None]
        above = best
        best = [0]
        steps = [(1, 0)]
        for j, line in enumerate(lines):
            pair = above[j] + sum(likeness(text, line) for text in texts)
            best.append(max(pair, above[j + 1], best[j]))
            # Of equally good ways a gap: they are walked from the end, so gaps come last
            step = (0, 1) if best[-1] == best[j] else (1, int(best[-1] > above[j + 1]))
            steps.append(step)
        moves.append(steps)
    found = []
    i = len(rows)
    j = len(lines)
    while i or j:
        down, along = moves[i][j]
        i -= down
        j -= along
        row = rows[i] if down else [None] * len(files)
        found.append((*row, j if along else None))
    return found[::-1]


def lines_of(row, files):
    return [None if i is None else file[i] for i, file in zip(row, files)]


def next_part(part, line):
    """The part of a script that a line begins, or the one that goes on."""
    if line.startswith(HEADING):
        return {ALGORITHM: "algorithm", THE_RUN: "run"}.get(line, "shared")
    if part == "" and line.startswith(("@dataclass", "class Args")):
        return "args"
    if part in ("", "shared", "main") and DEFINITION.match(line):
        return "main" if line.startswith("def main(") else part.replace("main", "shared")
    return part


def parts_of(rows, files):
    """Which part of the scripts each row is in; above the first one it has no name."""
    parts = []
    part = ""
    for row in rows:
        for line in filter(None, lines_of(row, files)):
            part = next_part(part, line)
        parts.append(part)
    return parts


def compare(lines):
    """For each line of a row: which files have it, which have a related one, and its pieces.

    Sets of files are bits. A piece is a text and the set of files whose related lines have it.
    """
    same = [0 if line is None else 1 << c for c, line in enumerate(lines)]
    related = [*same]
    tokens = [TOKEN.findall(line or "") for line in lines]
    held = [[bit] * len(texts) for bit, texts in zip(same, tokens)]
    present = [c for c, line in enumerate(lines) if line is not None]
    for a, b in itertools.combinations(present, 2):
        if lines[a] == lines[b]:
            same[a] |= 1 << b
            same[b] |= 1 << a
        elif not shared(lines[a], lines[b]):
            continue
        related[a] |= 1 << b
        related[b] |= 1 << a
        for i, j in common_tokens(tokens[a], tokens[b]):
            held[a][i] |= 1 << b
            held[b][j] |= 1 << a
    pieces = [list(zip(*one)) for one in zip(tokens, held)]
    return list(zip(same, related, pieces))


def common_tokens(one, other):
    """The places in two lists of the words that both have, in order."""
    one = [text.strip() for text in one]
    other = [text.strip() for text in other]
    for i, j, size in SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks():
        for k in range(size):
            yield i + k, j + k


def comments(text):
    """{index of a line: where its comment begins}; of what is not Python, nothing."""
    try:
        found = [*tokenize.generate_tokens(io.StringIO(text).readline)]
    except (SyntaxError, tokenize.TokenError):
        return {}
    return {t.start[0] - 1: t.start[1] for t in found if t.type == tokenize.COMMENT}


def headline(text):
    """HTML of a script's name with its paper, and of the equation, from its docstring."""
    try:
        docstring = ast.get_docstring(ast.parse(text), clean=False) or ""
    except (SyntaxError, ValueError):
        docstring = ""
    lines = docstring.split("\n")
    equation = " ".join(line for line in lines if line.startswith("    ")).strip()
    parts = re.split(" {2,}", html.escape(equation))  # a line may end between two
    return html.escape(lines[0]), " ".join(f"<span>{part}</span>" for part in parts if part)


def marked(pieces, related, comment):
    """HTML of a line: the words that some related line lacks, and the comment, in spans."""
    spans = []
    end = 0
    for text, held in pieces:
        end += len(text)
        in_comment = end > comment
        if held != related:
            attributes = f' class="{"w c" if in_comment else "w"}" data-m="{held}"'
        else:
            attributes = ' class="c"' if in_comment else ""
        spans.append((attributes, text))
    out = ""
    for attributes, group in itertools.groupby(spans, lambda span: span[0]):
        text = "".join(text for _, text in group)
        code = html.escape(text.lstrip(), quote=False)
        code = re.sub(r"\S{24,}", lambda match: WRAP.sub("<wbr>", match[0]), code)
        out += text[: len(text) - len(text.lstrip())]
        out += f"<span{attributes}>{code}</span>" if attributes else code
    return out


def table_row(row, part, files, comments):
    """HTML of a row; data-s and data-r are the files that have the line, and a related one."""
    lines = lines_of(row, files)
    compared = compare(lines)
    everyone = (1 << len(files)) - 1
    cells = []
    for i, line, starts, (same, related, pieces) in zip(row, lines, comments, compared):
        if line is None:
            cells.append('<td class="gap" data-s="0"></td>')
            continue
        attributes = f' data-s="{same}"' if same != everyone else ""
        if related != everyone:
            attributes += f' data-r="{related}" class="alone"'
        indent = len(line) - len(line.lstrip())
        code = marked(pieces, related, starts.get(i, len(line)))
        cells.append(f'<td data-n="{i + 1}" style="--i:{indent}"{attributes}>{code}</td>')
    is_heading = any(line and line.startswith(HEADING) for line in lines)
    attributes = f' data-part="{part}"' if part else ""
    attributes += " data-heading" if is_heading else ""
    kind = "same" if compared[0][0] == everyone else "diff"
    return f'<tr class="{kind}"{attributes}>{"".join(cells)}</tr>'


def link(names):
    """To the page with some of the columns; the script in it writes the same addresses."""
    address = ",".join(quote(name, safe="!~*'()") for name in names)
    return f'<a href="#{html.escape(address)}">{html.escape(" → ".join(names))}</a>'


def page(names, texts):
    """The page. It shows and compares all files; the script in it can show fewer, and fold."""
    files = [text.removesuffix("\n").split("\n") for text in texts]
    rows = align(files)
    starts = [comments(text) for text in texts]
    parts = parts_of(rows, files)
    body = [table_row(row, part, files, starts) for row, part in zip(rows, parts)]
    headlines = [headline(text) for text in texts]
    if any(equation for _, equation in headlines):
        cells = [f"<td><p>{name}</p><p>{equation}</p></td>" for name, equation in headlines]
        slot = f'<tr class="slot" data-part="algorithm">{"".join(cells)}</tr>'
        places = [k for k, row in enumerate(rows) if ALGORITHM in lines_of(row, files)]
        body.insert(min(places, default=0), slot)
    steps = [*itertools.pairwise(names), names] if len(names) > 2 else [names]
    toggle = '<button type="button" aria-pressed="true"><kbd>{}</kbd> {}</button>'
    labels = [html.escape(name) for name in names]
    fields = {
        "TITLE": ", ".join(labels),
        "STEPS": " ".join(link(some) for some in steps),
        "TOGGLES": "\n".join(toggle.format(c, label) for c, label in enumerate(labels, 1)),
        "HEADS": "".join(f'<th scope="col">{label}</th>' for label in labels),
        "COUNT": str(len(names)),
        "ROWS": "\n".join(body),
    }
    return re.sub(r"@([A-Z]+)@", lambda match: fields[match[1]], PAGE)


def read(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except UnicodeDecodeError:
        fail(f"cannot read {path}: it is not text in UTF-8")


def main(args):
    if not 2 <= len(args.scripts) <= 9:
        fail(f"give two to nine scripts to compare, not {len(args.scripts)}")
    if len(set(args.scripts)) < len(args.scripts):
        fail("a script is given twice: compare different ones")
    names = [Path(path).stem for path in args.scripts]
    names = names if len(set(names)) == len(names) else args.scripts
    text = page(names, [read(path) for path in args.scripts])
    default = "docs/side_by_side.html" if args.scripts == SCRIPTS else "side_by_side.html"
    output = args.output or default
    try:
        Path(output).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        fail(f"cannot write {output}: {error.strerror}")
    print(f"page: {output}")


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Side by side: @TITLE@</title>
<style>
:root {
  --page: #ffffff; --text: #1d2127; --dim: #68707c; --comment: #4a5563; --rule: #dfe3e8;
  --raised: #f5f6f8; --tint: #fff8e4; --word: #ffe296; --accent: #8f5300; --gap: #eef0f3;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --bar: 0px; --columns: 4; --gutter: 2.75rem;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171b; --text: #e6e8ec; --dim: #8d95a2; --comment: #b3bbc7; --rule: #30353d;
    --raised: #1d2026; --tint: #282314; --word: #5b470f; --accent: #f0bd57; --gap: #202329;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.5; }
body, .slot td { font-family: system-ui, sans-serif; }
header { padding: 1.5rem 1rem 0.75rem; max-width: 75rem; }
h1 { margin: 0; font-size: 1.375rem; line-height: 1.3; font-weight: 650; }
header p { margin: 0.375rem 0 0; max-width: 54rem; }
header .w, header .alone { padding: 0 0.25em; }
nav { margin-top: 0.5rem; display: flex; flex-wrap: wrap; gap: 0.125rem 1.25rem; }
a { color: inherit; text-underline-offset: 0.2em; text-decoration-color: var(--dim); }
a[aria-current] { color: var(--accent); text-decoration: none; font-weight: 600; }
#bar {
  position: sticky; top: 0; z-index: 2; padding: 0.5rem 1rem; background: var(--page);
  display: none; flex-wrap: wrap; gap: 0.5rem 1.5rem; font-size: 0.875rem;
}
.js #bar { display: flex; }
#bar > div { display: flex; align-items: center; gap: 0.375rem; }
button {
  font: inherit; color: inherit; background: none; border: 1px solid var(--rule);
  border-radius: 0.375rem; padding: 0.1875rem 0.625rem; cursor: pointer;
}
button:hover { border-color: var(--dim); }
button[aria-pressed=true] { background: var(--text); color: var(--page); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
kbd { font: 0.8125em var(--mono); }
output { min-width: 7.5em; text-align: center; font-variant-numeric: tabular-nums; }
table {
  width: 100%; table-layout: fixed; border-collapse: separate; border-spacing: 0;
  padding: 0 0.5rem; font: 0.75rem/1.55 var(--mono); tab-size: 4;
  font-size: clamp(0.75rem, 1.65vw / var(--columns), 0.875rem);
}
th {
  position: sticky; top: var(--bar); z-index: 1; padding: 0.25rem 0.5rem 0.375rem var(--gutter);
  background: var(--page); border-bottom: 1px solid var(--rule);
  text-align: left; font-size: 0.8125rem;
}
td {
  position: relative; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere;
  height: 1.55em; padding: 0 0.5rem 0 calc(var(--gutter) + (var(--i, 0) + 4) * 1ch);
  text-indent: calc((var(--i, 0) + 4) * -1ch);
}
td:not([hidden]) ~ td { border-left: 1px solid var(--rule); }
td[data-n]::before {
  content: attr(data-n); position: absolute; left: 0; width: calc(var(--gutter) - 0.75rem);
  text-align: right; text-indent: 0; color: var(--dim);
}
.c { color: var(--comment); font-style: italic; }
.same, .same .c { color: var(--dim); }
[data-heading] td { padding-top: 0.5rem; font-weight: 700; }
[data-heading] td, [data-heading] .c { color: var(--text); font-style: normal; }
.diff td { background: var(--tint); }
.diff .gap { background: repeating-linear-gradient(135deg, var(--gap) 0 1px, var(--page) 1px 6px); }
.alone { background: var(--tint); box-shadow: inset 3px 0 var(--accent); }
.w {
  background: var(--word); border-radius: 2px;
  text-decoration: underline; text-decoration-color: var(--accent); text-underline-offset: 0.2em;
}
tbody { scroll-margin-top: calc(var(--bar) + 5rem); }
tbody:focus { outline: none; }
tbody.at { outline: 2px solid var(--accent); outline-offset: -1px; }
[hidden] { display: none !important; }
.slot td {
  padding: 1.25rem 1rem 1.125rem var(--gutter); text-indent: 0; border-top: 1px solid var(--rule);
  border-bottom: 1px solid var(--rule); background: var(--raised);
}
.slot p { margin: 0; font-size: 0.8125rem; }
.slot p + p {
  margin-top: 0.375rem;
  font: 1.0625rem/1.45 "STIX Two Text", Cambria, Georgia, "DejaVu Serif", serif;
}
.slot span { display: inline-block; margin-right: 0.75em; }
.fold td { padding: 0.25rem 0; text-indent: 0; }
.fold button {
  width: 100%; padding: 0.3125rem 0.75rem 0.3125rem var(--gutter); text-align: left;
  border-color: transparent; background: var(--raised); color: var(--dim); position: relative;
}
.fold button::before { content: "▸"; position: absolute; left: 1.25rem; }
.fold button[aria-expanded=true]::before { content: "▾"; }
.label { display: none; }
footer { padding: 2rem 1rem 4rem; color: var(--dim); font-size: 0.875rem; }
dialog { border: 1px solid var(--rule); border-radius: 0.5rem; padding: 1.25rem 1.5rem; }
dialog { background: var(--page); color: var(--text); max-width: calc(100vw - 2rem); }
dialog::backdrop { background: rgb(0 0 0 / 45%); }
h2 { margin: 0 0 0.75rem; font-size: 1.125rem; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0.375rem 1.25rem; margin: 0 0 1rem; }
dt, dd { margin: 0; }
/* Narrow: of each difference one version below the other, with its name; what is shared, once */
.stacked thead { display: none; }
.stacked table, .stacked tbody { display: block; }
.stacked #bar { gap: 0.5rem; padding: 0.5rem 0.75rem; font-size: 0.8125rem; }
.stacked header { padding: 1rem 0.75rem 0.5rem; }
.stacked table { padding: 0; --gutter: 2.25rem; }
.stacked tr { display: contents; }
.stacked td {
  display: block; height: auto; min-height: 1.55em; border-left: 0 !important;
  padding: 0 0.5rem 0 calc(var(--gutter) + (var(--i, 0) + 2) * 1ch);
  text-indent: calc((var(--i, 0) + 2) * -1ch);
}
.stacked .same td:not([hidden]) ~ td, .stacked tr .gap { display: none; }
.stacked tbody.diff, .stacked tbody.slot { display: flex; flex-direction: column; }
.stacked .label td {
  padding: 0.375rem 0.5rem 0.125rem 0.75rem; text-indent: 0; font-weight: 700; color: var(--accent);
  border-top: 1px solid var(--rule); background: var(--page);
}
.stacked .slot td:not(.label td) { padding: 0.375rem 0.75rem 0.75rem; border: 0; text-indent: 0; }
.stacked .slot .label td { background: var(--raised); }
.stacked .fold td { padding: 0.25rem 0; text-indent: 0; }
.stacked .fold button { border-radius: 0; }
.stacked .fold button::before { left: 0.875rem; }
.stacked tbody { scroll-margin-top: calc(var(--bar) + 2rem); }
</style>
</head>
<body>
<header>
<h1>Side by side: @TITLE@</h1>
<p>The scripts stand next to each other, line by line. <span class="alone">Lines</span> that only
some of them have are highlighted, and so are <span class="w">words</span> that differ; what is the
same in all of them is gray. Imports, functions that do not differ, and the code around the training
(files, signals, several processes) are folded: click a bar to open it.</p>
<noscript><p>Without JavaScript all columns are shown and nothing is folded.</p></noscript>
<nav aria-label="Steps">@STEPS@</nav>
</header>
<div id="bar">
<div role="group" aria-label="Columns">
@TOGGLES@
</div>
<div>
<button type="button" id="previous" aria-label="Previous difference">↑</button>
<output id="status"></output>
<button type="button" id="next" aria-label="Next difference">↓</button>
</div>
<div>
<button type="button" id="fold">Unfold all</button>
<button type="button" id="keys" aria-haspopup="dialog">Keys <kbd>?</kbd></button>
</div>
</div>
<main>
<table>
<thead><tr>@HEADS@</tr></thead>
<tbody>
@ROWS@
</tbody>
</table>
</main>
<footer>Written by <code>python -m tools.side_by_side</code>.</footer>
<dialog id="help" aria-labelledby="help-title">
<h2 id="help-title">Keys</h2>
<dl>
<dt><kbd>n</kbd> or <kbd>j</kbd></dt><dd>next difference</dd>
<dt><kbd>p</kbd> or <kbd>k</kbd></dt><dd>previous difference</dd>
<dt><kbd>1</kbd> to <kbd>@COUNT@</kbd></dt><dd>show or hide a column</dd>
<dt><kbd>f</kbd></dt><dd>fold or unfold everything</dd>
<dt><kbd>?</kbd></dt><dd>these keys</dd>
</dl>
<form method="dialog"><button>Close</button></form>
</dialog>
<script>
"use strict";
const CONTEXT = 2, FEW = 4, WIDE = 1800, COLUMN = 300;  // rows, rows, pixels, pixels
const OPEN = ["args", "algorithm", "main"];  // parts in which nothing is folded
const root = document.documentElement, table = document.querySelector("table");
const $ = id => document.getElementById(id), bar = $("bar"), help = $("help");
const heads = [...table.tHead.rows[0].cells];
const toggles = [...bar.querySelectorAll("[aria-pressed]")];
const links = [...document.querySelectorAll("nav a")];
const keys = heads.map(th => encodeURIComponent(th.textContent));
const all = (1 << heads.length) - 1;
const files = (element, name) => +(element.dataset[name] ?? all);
const rows = [...table.tBodies[0].rows].map(tr => ({
  tr, slot: tr.className === "slot", part: tr.dataset.part ?? "",
  cells: [...tr.cells].map((td, c) => {
    td.style.order = c;
    const words = [...td.querySelectorAll(".w")].map(span => ({span, files: files(span, "m")}));
    const blank = !td.textContent.trim();
    return {td, blank, same: files(td, "s"), related: files(td, "r"), words};
  }),
}));
let shown = 0, open = false;

const on = c => shown >> c & 1;
const blank = row => row.cells.every(cell => cell.blank);
const count = set => keys.filter((_, c) => set >> c & 1).length;

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// What a row is among the columns shown: same, diff, slot, or nothing
function mark({tr, cells, slot}) {
  cells.forEach(({td, same, related, words}, c) => {
    td.hidden = !on(c);
    td.classList.toggle("alone", related > 0 && (related & shown) !== shown);
    for (const {span, files} of words) {
      span.classList.toggle("w", (files & shown) !== (related & shown));
    }
  });
  const visible = cells.filter((_, c) => on(c));
  const same = visible.every(cell => (cell.same & shown) === shown);
  const kind = slot ? "slot" : same ? "same" : visible.some(cell => cell.same) ? "diff" : "";
  return tr.className = kind;
}

// Neighbors that have the same key, together
function group(list, key) {
  const groups = [];
  for (const one of list) {
    if (groups.at(-1)?.key === key(one)) groups.at(-1).some.push(one);
    else groups.push({key: key(one), some: [one]});
  }
  return groups;
}

function body(kind, some) {
  const made = element("tbody", {className: kind, tabIndex: -1}, ...some.map(row => row.tr));
  if (kind === "same") made.removeAttribute("tabindex");
  else made.prepend(element("tr", {className: "label"}, ...heads.map((th, c) => {
    const absent = some.every(row => !row.cells[c].same);
    const td = element("td", {textContent: th.textContent, hidden: !on(c) || absent});
    td.style.order = c;
    return td;
  })));
  return made;
}

const first = row => row.cells.find((_, c) => on(c) && row.cells[c].same).td.textContent;

function names(some) {
  return some.map(row => /^(?:async )?(?:def|class) (\\w+)/.exec(first(row))?.[1]).filter(Boolean);
}

// How many lines there are, up to the last that is not blank, and in how many the columns differ
function extent(some) {
  const many = some.findLastIndex(row => !blank(row)) + 1;
  const differ = some.filter(row => row.kind !== "same").length;
  const who = count(shown) === 2 ? "both" : `all ${count(shown)}`;
  const what = differ === 1 ? "1 of them differs" : `${differ} of them differ`;
  return `${many} lines, ${differ ? what : "the same in " + who}`;
}

// A bar that hides bodies below it, and these bodies
function fold(textContent, bodies) {
  const button = element("button", {type: "button", textContent});
  const set = unfolded => {
    for (const one of bodies) one.hidden = !unfolded;
    button.setAttribute("aria-expanded", unfolded);
  };
  set(open);
  button.onclick = () => { set(bodies[0].hidden); say(); };
  const td = element("td", {colSpan: count(shown)}, button);
  return [element("tbody", {className: "fold"}, element("tr", {}, td)), ...bodies];
}

// The rows of a script from one definition to the next, and each heading
function definitions(some) {
  let number = 0, decorated = false;
  return group(some, row => {
    const begins = /^(?:def |async def |class |@|# --- )/.test(first(row));
    if (begins && !decorated) number++;
    decorated = first(row).startsWith("@");
    return number;
  }).map(({some}) => some);
}

// Rows that are the same: those of each definition under a bar, but for some next to differences
function foldSame(some, after, before) {
  let from = after ? CONTEXT : 0, to = some.length - (before ? CONTEXT : 0);
  if (to - from < FEW) return [body("same", some)];
  while (from > 0 && blank(some[from - 1])) from--;
  while (to < some.length && blank(some[to])) to++;
  const folds = definitions(some.slice(from, to)).flatMap(middle => {
    if (middle.length < FEW) return [body("same", middle)];
    const imports = middle.some(row => /^(?:import|from) /.test(first(row))) ? "imports" : "";
    const name = names(middle)[0] ?? imports;
    return fold((name && name + ": ") + extent(middle), [body("same", middle)]);
  });
  return [body("same", some.slice(0, from)), ...folds, body("same", some.slice(to))];
}

function bodiesOf({key: part, some}) {
  const runs = group(some, row => row.kind);
  const whole = () => runs.map(({key, some}) => body(key, some));
  if (OPEN.includes(part)) return whole();
  if (part === "run") return fold(`the run: ${extent(some)} (${names(some).join(", ")})`, whole());
  return runs.flatMap(({key, some}, i) =>
    key === "same" ? foldSame(some, i > 0, i < runs.length - 1) : [body(key, some)]);
}

function show() {
  for (const row of rows) row.kind = mark(row);
  for (const row of rows.filter(row => !row.kind)) row.tr.remove();
  const bodies = group(rows.filter(row => row.kind), row => row.part).flatMap(bodiesOf);
  [...table.tBodies].forEach(old => old.remove());
  table.append(...bodies);
  heads.forEach((th, c) => th.hidden = !on(c));
  toggles.forEach((button, c) => button.setAttribute("aria-pressed", on(c) === 1));
  $("fold").textContent = open ? "Fold all" : "Unfold all";
  say();
  fit();
}

function say(text) {
  const found = differences(), at = found.findIndex(one => one.classList.contains("at"));
  const many = `${found.length} difference${found.length === 1 ? "" : "s"}`;
  $("status").value = text ?? (at < 0 ? many : `${at + 1} of ${many}`);
}

function fit() {
  root.classList.toggle("stacked", innerWidth < COLUMN * count(shown));
  root.style.setProperty("--columns", count(shown));
  root.style.setProperty("--bar", bar.offsetHeight + "px");
}

const edge = () => bar.getBoundingClientRect().bottom + table.tHead.offsetHeight;

// Change what is shown, and leave what is being read where it is
function keeping(change) {
  const top = ({cells}) => cells.map(({td}) => td.getClientRects()[0]?.top).find(y => y < Infinity);
  const tops = rows.map(top), least = edge();
  change();
  const kept = rows.findIndex((row, k) => tops[k] >= least && top(row) < Infinity);
  if (scrollY > 0 && kept >= 0) scrollBy(0, top(rows[kept]) - tops[kept]);
}

function choose(set) {
  if (count(set) < 2) return say("at least two");
  history.replaceState(null, "", "#" + keys.filter((_, c) => set >> c & 1).join(","));
  follow();
}

function follow() {
  const wanted = location.hash.slice(1).split(",");
  const set = keys.reduce((sum, key, c) => wanted.includes(key) ? sum | 1 << c : sum, 0);
  const next = count(set) > 1 ? set : innerWidth < WIDE ? 3 : all;
  if (next !== shown) keeping(() => { shown = next; show(); });
  for (const link of links) {
    const parts = link.hash.slice(1).split(",");
    const current = parts.length === count(shown) && parts.every(key => on(keys.indexOf(key)));
    if (current) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

const differences = () => [...table.querySelectorAll("tbody.diff:not([hidden])")];

function go(step, focus) {
  const found = differences(), last = found.length - 1, top = edge();
  if (last < 0) return;
  const box = one => one.getBoundingClientRect();
  let at = found.findIndex(one => one.classList.contains("at"));
  if (at >= 0 && box(found[at]).bottom > top && box(found[at]).top < innerHeight) at += step;
  else if (step < 0) at = found.findLastIndex(one => box(one).top < top);
  else if ((at = found.findIndex(one => box(one).top >= top)) < 0) at = last;
  at = Math.max(0, Math.min(at, last));
  found.forEach((one, k) => one.classList.toggle("at", k === at));
  found[at].scrollIntoView();
  if (focus) found[at].focus({preventScroll: true});
  say();
}

const flip = () => keeping(() => { open = !open; show(); });
const toggleHelp = () => help.open ? help.close() : help.showModal();
const acts = {
  n: () => go(1, true), j: () => go(1, true), p: () => go(-1, true), k: () => go(-1, true),
  f: flip, "?": toggleHelp,
};
toggles.forEach((button, c) => button.onclick = acts[c + 1] = () => choose(shown ^ 1 << c));
$("next").onclick = () => go(1);
$("previous").onclick = () => go(-1);
$("fold").onclick = flip;
$("keys").onclick = toggleHelp;

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.target.closest("input, textarea, select, [contenteditable]")) return;
  if (!Object.hasOwn(acts, event.key) || help.open && event.key !== "?") return;
  event.preventDefault();
  acts[event.key]();
});
addEventListener("hashchange", follow);
addEventListener("resize", fit);
root.classList.add("js");
follow();
</script>
</body>
</html>
"""


if __name__ == "__main__":
    main(parse(Args))
