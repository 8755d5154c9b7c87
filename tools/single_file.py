"""One standalone file of a script: what it uses of common/ takes the place of the imports.

Run: python -m tools.single_file ppo.py > my_ppo.py
"""

import ast
import re
import symtable
import sys
import tokenize
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain, dropwhile, groupby, takewhile
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from tools import fail

IMPORTS = ast.Import, ast.ImportFrom
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
PLAIN = re.compile(r"from common\.(\w+) import (\w+, )*\w+")
OTHER = re.compile(r"import (.*, )?common\b|from (common\b|\.)|from .*\*")


@dataclass
class Args:
    script: Annotated[str, tyro.conf.Positional]  # one of the four, or a variant of your own


class Piece(NamedTuple):
    """A statement at the top level of a file; of an import, one of its names."""

    path: Path
    node: ast.stmt
    above: list[str]  # lines since the statement before
    lines: list[str]
    reads: set[str]  # global names, however deep inside
    binds: set[str]
    text: str = ""  # what imports this name alone
    common: str = ""  # the file in common/ that it is from


def global_names(text):
    """Those that a statement reads and those that it binds, by Python's own rules of scope."""
    tables = [symtable.symtable(text, "", "exec")]
    for table in tables:  # it grows
        tables += table.get_children()
    symbols = [x for table in tables for x in table.get_symbols() if x.is_global()]
    binds = {x.get_name() for x in symbols if x.is_assigned() or x.is_imported()}
    return {x.get_name() for x in symbols if x.is_referenced()}, binds


def is_text(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def refuse(path, node, why):
    fail(f"{path}, line {node.lineno}: {why}")


def read(path):
    """The pieces of a file; the last is what comes after all statements."""
    end = 0
    with tokenize.open(path) as file:
        lines = file.read().split("\n")
    for node in ast.parse("\n".join(lines), path).body:
        for x in ast.walk(node):
            text = ast.unparse(x) if isinstance(x, IMPORTS) else ""
            if OTHER.match(text) and not (x is node and PLAIN.fullmatch(text)):
                form = "`from common.FILE import NAME` at the top level"
                refuse(path, x, f"`{text}` cannot be replaced, only {form}")
        start = min(x.lineno for x in [node, *getattr(node, "decorator_list", [])]) - 1
        if start < end:
            refuse(path, node, "there are two statements on one line")
        above, own, end = lines[end:start], lines[start : node.end_lineno], node.end_lineno
        if not isinstance(node, IMPORTS):
            yield Piece(path, node, above, own, *global_names("\n".join(own)))
            continue
        for alias in node.names:
            bound = (alias.asname or alias.name).split(".")[0]
            word = f"from {node.module} import" if isinstance(node, ast.ImportFrom) else "import"
            text = f"{word} {ast.unparse(alias)}"
            common = PLAIN.sub(r"\1", text) if PLAIN.match(text) else ""
            yield Piece(path, node, above, own, set(), {bound}, text, common)
            above, own = [], []  # the first name has them
    yield Piece(path, ast.Pass(), lines[end:], [], set(), set())


def load(path, folder, files):
    """Put the pieces of a file into files, after those of the files of common/ that it needs."""
    try:
        pieces, files[path] = list(read(path)), []
    except (OSError, SyntaxError, ValueError) as error:
        fail(f"cannot read {path}: {error}")
    for piece in pieces:
        if path.parent == folder and piece.lines and not (piece.binds or is_text(piece.node)):
            refuse(path, piece.node, "only definitions and imports can be moved")
        source = folder / f"{piece.common}.py"
        if piece.common and source not in files:
            load(source, folder, files)
        if piece.common and not any(piece.binds <= x.binds for x in files[source]):
            refuse(path, piece.node, f"there is no {min(piece.binds)} in {source}")
    files[path] = files.pop(path) + pieces  # now the last


def used_parts(files):
    """What the last of the files uses of the others, down to the bottom, in their order."""
    *others, script = files.values()
    library = [x for x in chain(*others) if not x.common]
    own = [x for x in script if not x.common]
    imported = set().union(*(x.binds for x in script if x.common))
    parts, wanted = [], [name for x in own for name in x.reads & imported]
    for name in wanted:  # it grows
        new = [x for x in library if name in x.binds and x not in parts]
        parts += new
        wanted += chain(*(x.reads for x in new))
    meanings = defaultdict(set)
    for piece in own + parts:
        for name in piece.binds:
            text = f"import {name}" if piece.text.startswith(f"import {name}.") else piece.text
            meanings[name].add(f"by `{text}`" if text else f"in {piece.path}")
        for name in piece.reads.difference(*(x.binds for x in files[piece.path])):
            meanings[name].add("in Python")
    for name, found in sorted(meanings.items()):
        if len(found) > 1:
            fail(f"{name} is defined {' and '.join(sorted(found))}: rename one of them")
    return [x for x in library if x in parts]


def import_lines(pieces):
    """Imports in one block, sorted as ruff does it, with the comments above and behind them."""
    rows = defaultdict(lambda: (set(), [], []))
    for piece in pieces:
        head, _, name = piece.text.partition(" import ")
        if " as " in name:
            head, name = piece.text, ""
        names, above, behind = rows[head]
        names.add(name)
        above += filter(None, piece.above)
        behind += [x.encode()[piece.node.end_col_offset :].decode() for x in piece.lines[-1:]]

    def place(row):
        word, module = row.split()[:2]
        top = module.split(".")[0]
        section = top != "__future__", top not in sys.stdlib_module_names
        return section, word == "from", module.lower(), row

    def rank(name):  # CONSTANT, Class, function
        return not (name.isupper() and len(name) > 1), not name[:1].isupper(), name.lower()

    lines = []
    for _, section in groupby(sorted(rows, key=place), lambda row: place(row)[0]):
        lines.append("")
        for row in section:
            names, above, behind = rows[row]
            text = f"{row} import {', '.join(sorted(names, key=rank))}".removesuffix(" import ")
            if len(text) > 100 and "" not in names:
                text = text.replace(", ", ",\n    ").replace("import ", "import (\n    ") + ",\n)"
            lines += [""] if above and lines[-1] else []
            lines += [*above, text + "".join(behind)]
    return lines


def single_file(path):
    """The text of the one file."""
    folders, files = [path.parent / "common", Path(__file__).parents[1] / "common"], {}
    load(path, next(filter(Path.is_dir, folders)), files)
    parts, (first, *rest) = used_parts(files), files[path]
    head, rest = first.above, [first._replace(above=[]), *rest]
    if is_text(first.node):
        head += rest.pop(0).lines
    header = [*takewhile(lambda x: x.text, rest)]
    body = [x for x in rest[len(header) :] if not x.common]
    header = [x for x in header if not x.common]
    header += [x._replace(above=[], lines=[]) for x in parts if x.text]
    moved = [x for x in parts if not x.text]
    names = set().union(*(x.binds for x in moved))
    needy = [i for i, x in enumerate(body) if isinstance(x.node, FUNCTIONS) or x.reads & names]
    lines = head + import_lines(header)
    for i, piece in enumerate(body):
        if moved and i == needy[0]:
            title = " and ".join(dict.fromkeys(x.path.stem for x in moved))
            lines += [*([""] if i == 0 else ["", ""]), f"# --- {title}"]  # as ruff has it
            for last, x in zip([piece, *moved], moved):
                close = x.path == last.path and x.node.lineno == last.node.end_lineno + 1
                comments = [*takewhile(len, reversed(x.above))][::-1]
                lines += [*([] if close else ["", ""]), *comments, *x.lines]
            lines += ["", "", *dropwhile(lambda x: not x, piece.above), *piece.lines]
        else:
            lines += piece.above + piece.lines
    return "\n".join(lines).strip("\n") + "\n"


def main(args):
    text = single_file(Path(args.script))
    sys.stdout.reconfigure(encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main(tyro.cli(Args))
