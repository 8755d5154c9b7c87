"""One standalone file of a script: what it uses of common/ takes the place of the imports.

Run: python -m tools.single_file ppo.py > my_ppo.py
"""

import ast
import re
import symtable
import sys
import tokenize
import tomllib
from collections import defaultdict
from dataclasses import dataclass
from itertools import dropwhile, groupby, takewhile
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from tools import fail, parse

ROOT = Path(__file__).parents[1]
IMPORTS = ast.Import, ast.ImportFrom
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
THE_RUN = "# --- the run"  # the parts of common/ go above this line
POSTPONED = "from __future__ import annotations"  # then none has to be quoted
METADATA = "# /// script"  # the first line of the comment from which uv installs (PEP 723)
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


# --- reading


def global_names(text):
    """What a statement reads and what it binds, by Python's own rules of scope."""
    tables = [symtable.symtable(text, "", "exec")]
    for table in tables:  # it grows
        tables += table.get_children()
    symbols = [x for table in tables for x in table.get_symbols() if x.is_global()]
    reads = {x.get_name() for x in symbols if x.is_referenced()}
    binds = {x.get_name() for x in symbols if x.is_assigned() or x.is_imported()}
    return reads, binds


def is_text(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def refuse(path, node, why):
    fail(f"{path}, line {node.lineno}: {why}")


def check_imports(path, statement):
    """Refuse imports of common/ that the definitions of the names could not replace."""
    for node in ast.walk(statement):
        text = ast.unparse(node) if isinstance(node, IMPORTS) else ""
        is_plain = node is statement and PLAIN.fullmatch(text)
        if OTHER.match(text) and not is_plain:
            form = "`from common.FILE import NAME` at the top level"
            refuse(path, node, f"`{text}` cannot be replaced, only {form}")


def imported_names(piece):
    """A piece for each name of an import; the first one has its lines and those above."""
    node = piece.node
    start = f"from {node.module} import" if isinstance(node, ast.ImportFrom) else "import"
    for alias in node.names:
        text = f"{start} {ast.unparse(alias)}"
        common = PLAIN.sub(r"\1", text) if PLAIN.match(text) else ""
        binds = {(alias.asname or alias.name).split(".")[0]}
        yield piece._replace(reads=set(), binds=binds, text=text, common=common)
        piece = piece._replace(above=[], lines=[])


def read(path):
    """The pieces of a file; the last is what comes after all statements."""
    with tokenize.open(path) as file:
        lines = file.read().split("\n")
    pieces = []
    end = 0
    for node in ast.parse("\n".join(lines), path).body:
        check_imports(path, node)
        first = min([node, *getattr(node, "decorator_list", [])], key=lambda x: x.lineno)
        if first.lineno <= end:
            refuse(path, node, "there are two statements on one line")
        above = lines[end : first.lineno - 1]
        own = lines[first.lineno - 1 : node.end_lineno]
        end = node.end_lineno
        piece = Piece(path, node, above, own, *global_names("\n".join(own)))
        pieces += imported_names(piece) if isinstance(node, IMPORTS) else [piece]
    return [*pieces, Piece(path, ast.Pass(), lines[end:], [], set(), set())]


def load(path, folder, files):
    """Put the pieces of a file into files, after those of the files of common/ that it needs."""
    files[path] = []  # of files that import each other in a circle, the first has no names yet
    try:
        pieces = read(path)
    except (OSError, SyntaxError, ValueError) as error:
        fail(f"cannot read {path}: {error}")
    for piece in pieces:
        moves = path.parent == folder and piece.lines and not is_text(piece.node)
        if moves and not piece.binds:
            refuse(path, piece.node, "only definitions and imports can be moved")
        if not piece.common:
            continue
        source = folder / f"{piece.common}.py"
        if source not in files:
            load(source, folder, files)
        if not any(piece.binds <= x.binds for x in files[source]):
            refuse(path, piece.node, f"there is no {min(piece.binds)} in {source}")
    del files[path]
    files[path] = pieces  # now the last


# --- choosing


def reachable(names, pieces):
    """The names, and all that their definitions read, directly or through other definitions."""
    found = set()
    waiting = [*names]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [x for piece in pieces if name in piece.binds for x in piece.reads]
    return found


def with_registered(used, library):
    """The names, and those of functions that are registered for them and read by no one.

    As `@register_kl(Mine, Mine)` does, a decorator's arguments say what a function is for.
    """
    defined = set().union(*(x.binds for x in library if not x.text))
    for piece in library:
        decorators = getattr(piece.node, "decorator_list", [])
        given = [x for call in decorators if isinstance(call, ast.Call) for x in call.args]
        names = {x.id for node in given for x in ast.walk(node) if isinstance(x, ast.Name)}
        subjects = names & defined
        if subjects and subjects <= used and not piece.binds <= used:
            return with_registered(reachable(used | piece.binds, library), library)
    return used


def used_parts(files):
    """What the last of the files uses of the others, in their order."""
    *others, script = files.values()
    library = [x for pieces in others for x in pieces if not x.common]
    own = [x for x in script if not x.common]
    imported = set().union(*(x.binds for x in script if x.common))
    wanted = [name for x in own for name in x.reads & imported]
    used = with_registered(reachable(wanted, library), library)
    parts = [x for x in library if x.binds & used]
    check_meanings(own + parts, files)
    return parts


def check_meanings(pieces, files):
    """Refuse a name that would mean two things in one file."""
    meanings = defaultdict(set)
    for piece in pieces:
        for name in piece.binds:
            is_package = piece.text.startswith(f"import {name}.")  # import a.b binds a
            text = f"import {name}" if is_package else piece.text
            meanings[name].add(f"by `{text}`" if text else f"in {piece.path}")
        for name in piece.reads.difference(*(x.binds for x in files[piece.path])):
            meanings[name].add("in Python")
    for name, found in sorted(meanings.items()):
        if len(found) > 1:
            fail(f"{name} is defined {' and '.join(sorted(found))}: rename one of them")


def names_at_once(node):
    """Names that Python looks up when it executes a statement, not only in a later call.

    Annotations of functions are left out: with_quotes lets them wait.
    """
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield node.id
    children = ast.iter_child_nodes(node)
    if isinstance(node, FUNCTIONS):
        defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
        children = node.decorator_list + defaults
    for child in children:
        yield from names_at_once(child)


def place_of_parts(names, body):
    """The index of the statement of a script that the definitions of these names come before.

    It is the first one of the run, or the first function where there is no such heading. But no
    statement that uses the names at once may stand above them.
    """
    has_run = any(THE_RUN in x.above for x in body)
    for i, piece in enumerate(body):
        is_usual = THE_RUN in piece.above if has_run else isinstance(piece.node, FUNCTIONS)
        if is_usual or names & reachable(names_at_once(piece.node), body):
            return i
    return len(body) - 1


# --- writing


def cut(line, column):
    """The two parts of a line; ast counts columns in bytes."""
    text = line.encode()
    return text[:column].decode(), text[column:].decode()


def row_of(piece):
    """How the line of an import begins; names from one module share a line."""
    return piece.text if " as " in piece.text else piece.text.split(" import ")[0]


def section(row):
    package = row.split()[1].split(".")[0]
    return package != "__future__", package not in sys.stdlib_module_names


def row_order(row):
    """As ruff sorts them: by section, form and module."""
    word, module = row.split()[:2]
    return section(row), word == "from", module.lower(), row


def name_order(name):
    """CONSTANT, Class, function."""
    is_constant = name.isupper() and len(name) > 1
    return not is_constant, not name[:1].isupper(), name.lower()


def import_line(row, pieces):
    """The names in one line if they fit, and the comments that stood behind them."""
    names = {x.text.removeprefix(f"{row} import ") for x in pieces if x.text != row}
    names = sorted(names, key=name_order)
    line = f"{row} import {', '.join(names)}" if names else row
    if len(line) > 100 and names:
        line = f"{row} import (\n    " + ",\n    ".join(names) + ",\n)"
    behind = [cut(x.lines[-1], x.node.end_col_offset)[1] for x in pieces if x.lines]
    return line + "".join(behind)


def import_lines(pieces):
    """Imports in one block, with the comments above them."""
    rows = defaultdict(list)
    for piece in pieces:
        rows[row_of(piece)].append(piece)
    lines = []
    for _, group in groupby(sorted(rows, key=row_order), section):
        lines.append("")
        for row in group:
            above = [line for piece in rows[row] for line in piece.above if line]
            if above and lines[-1]:
                lines.append("")
            lines += [*above, import_line(row, rows[row])]
    return lines


def moved_lines(parts):
    """Definitions of common/, those of each file under its name."""
    lines = []
    path = None
    end = 0
    for piece in parts:
        if piece.path != path:
            lines += ["", "", f"# --- {piece.path.stem}"]
        if piece.path != path or piece.node.lineno > end + 1:
            lines += ["", ""]
        comments = [*takewhile(len, reversed(piece.above))]
        lines += [*reversed(comments), *piece.lines]
        path = piece.path
        end = piece.node.end_lineno
    return lines


def with_quotes(piece, names):
    """The lines of a statement that stands above these names, which its annotations quote."""
    nodes = [*ast.walk(piece.node)]
    annotations = [x.annotation for x in nodes if isinstance(x, ast.arg)]
    annotations += [x.returns for x in nodes if isinstance(x, FUNCTIONS)]
    waiting = [x for x in annotations if x and names & {*names_at_once(x)}]
    lines = [*piece.lines]
    top = piece.node.end_lineno - len(lines) + 1
    for x in sorted(waiting, key=lambda x: (x.lineno, x.col_offset), reverse=True):
        first, last = x.lineno - top, x.end_lineno - top
        before, _ = cut(lines[first], x.col_offset)
        _, after = cut(lines[last], x.end_col_offset)
        lines[first : last + 1] = [f'{before}"{ast.unparse(x)}"{after}']
    return lines


def body_lines(body, moved, is_postponed):
    """The statements of the script and, among them, those that are moved."""
    names = set().union(*(x.binds for x in moved))
    place = place_of_parts(names, body)
    lines = []
    for piece in body[:place]:
        lines += piece.above
        lines += piece.lines if is_postponed else with_quotes(piece, names)
    if moved:
        lines += moved_lines(moved)[place == 0 :]  # ruff wants one blank line below imports
        above = dropwhile(lambda line: not line, body[place].above)
        body[place] = body[place]._replace(above=["", "", *above])
    for piece in body[place:]:
        lines += [*piece.above, *piece.lines]
    return lines


def packages(text):
    """The top-level modules that a text imports, without those of Python itself."""
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    return sorted(modules - sys.stdlib_module_names)


def metadata_lines(text):
    """What `uv run` installs: the packages of a text, pinned as in pyproject.toml (PEP 723)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = [project["project"]["dependencies"], *project["dependency-groups"].values()]
    pins = {pin.split("==")[0].replace("-", "_"): pin for group in groups for pin in group}
    wanted = []
    for package in packages(text):
        if package.lower() in pins:
            wanted.append(f'#     "{pins[package.lower()]}",')
        else:
            why = "unless it is a file of your own, add it to the dependencies in the first lines"
            print(f"note: pyproject.toml has no version of {package}, {why}", file=sys.stderr)
    python = f'# requires-python = "{project["project"]["requires-python"]}"'
    dependencies = ["# dependencies = [", *wanted, "# ]"] if wanted else ["# dependencies = []"]
    return [METADATA, python, *dependencies, "# ///"]


def single_file(path):
    """The text of the one file."""
    folders = [path.parent / "common", ROOT / "common"]
    files = {}
    load(path, next(filter(Path.is_dir, folders)), files)
    parts = used_parts(files)
    first, *rest = files[path]
    head = first.above
    docstring = first.lines if is_text(first.node) else []
    pieces = rest if docstring else [first._replace(above=[]), *rest]
    header = [*takewhile(lambda x: x.text, pieces)]
    body = [x for x in pieces[len(header) :] if not x.common]
    imports = [x for x in header if not x.common]
    imports += [x._replace(above=[], lines=[]) for x in parts if x.text]
    moved = [x for x in parts if not x.text]
    is_postponed = any(x.text == POSTPONED for x in header)
    code = import_lines(imports) + body_lines(body, moved, is_postponed)
    metadata = [] if METADATA in head else metadata_lines("\n".join(code))
    return "\n".join([*head, *metadata, *docstring, *code]).strip("\n") + "\n"


def main(args):
    text = single_file(Path(args.script))
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main(parse(Args))
