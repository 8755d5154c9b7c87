"""What one does with runs."""

import os
import sys
from pathlib import Path

import tyro


def parse(args_class):
    """What the command line says, as an instance of the dataclass.

    From here on, a question mark is printed for a character that the encoding of stdout lacks,
    as most encodings of Windows lack λ.
    """
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")
    return tyro.cli(args_class)


def printing_utf_8():
    """The environment of a process that prints UTF-8, whatever is usual on the system."""
    return os.environ | {"PYTHONIOENCODING": "utf-8"}


def refuse_missing_folder(path):
    """Exit if there is no folder for a file that is written at the end."""
    folder = Path(path).parent
    if not folder.is_dir():
        fail(f"there is no folder {folder} to write {path} in")


def fail(message, code=2):
    """One sentence, and the exit code: 2 for bad input, 1 for trouble on the way."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
