"""Write the tables of the pages anew, with the commands in the comments above them.

Some of these commands also draw the figures of docs/why anew.

Run: python -m tools.pages
"""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tools import fail, parse, printing_utf_8

PAGES = ["README.md", "docs/results/README.md", "docs/speed.md", "docs/why_the_ratio.md"]
TABLE = re.compile(r"<!-- python (-m tools\.[^>]*?) -->\n\n(\|.*\n)*\n*")


@dataclass
class Args:
    pages: Annotated[list[str], tyro.conf.Positional]  # pages to go through; all if none is named


def table(match):
    """The comment, and those lines that its command prints that belong to a table."""
    command = [sys.executable, *shlex.split(match[1])]
    utf_8 = dict(encoding="utf-8", env=printing_utf_8())
    done = subprocess.run(command, capture_output=True, **utf_8)
    if done.returncode:
        fail(f"python {match[1]} failed: {done.stderr.strip()}", 1)
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    separators = [line for line in lines if re.fullmatch(r"[|\s:-]+", line)]
    if len(separators) != 1:
        count = f"{len(separators)} tables, not one" if separators else "no table"
        fail(f"python {match[1]} prints {count}", 1)
    return f"<!-- python {match[1]} -->\n\n" + "".join(f"{line}\n" for line in lines) + "\n"


def read(page):
    if not Path(page).is_file():
        fail(f"there is no page {page}: run it in the project's folder")
    try:
        return Path(page).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        fail(f"{page} is not a text in UTF-8")


def main(args):
    for page in args.pages or PAGES:
        text, count = TABLE.subn(table, read(page))
        Path(page).write_text(text, encoding="utf-8", newline="\n")
        print(f"{page}: {count} tables")


if __name__ == "__main__":
    main(parse(Args))
