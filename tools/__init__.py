"""What one does with runs."""

import csv
import io
import os
import signal
import sys
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path


def say_stopped(kind, error, trace):
    """Print an error that nothing has caught; for Ctrl-C, a word.

    Python then ends by the signal, so that a shell ends its loop too (with code 130).
    """
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # python -m looks for a tool, and what it imports takes seconds
    sys.excepthook = say_stopped
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends what has started


@contextmanager
def ctrl_c_blocked():
    """Processes that start meanwhile never see Ctrl-C, which a terminal sends to them as well.

    This process sees it as soon as they have started.
    """
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    resource_tracker.ensure_running()  # which unblocks it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def parse(args_class):
    """What the command line says, as an instance of the dataclass.

    From here on, a question mark is printed for a character that the encoding of stdout lacks,
    as most encodings of Windows lack λ.
    """
    import tyro  # only now, since it takes a while, in which Ctrl-C would be an error

    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")
    return tyro.cli(args_class)


def printing_utf_8():
    """The environment of a process that prints UTF-8, whatever is usual on the system."""
    return os.environ | {"PYTHONIOENCODING": "utf-8"}


def refuse_missing_folder(path):
    """Exit if a file that is written at the end would have no folder, or is one."""
    if Path(path).is_dir() or str(path).endswith(("/", os.sep)):
        fail(f"{path or '.'} is a folder: name a file to write")
    folder = Path(path).parent
    if not folder.is_dir():
        fail(f"there is no folder {folder} to write {path} in")


def add_row(path, row, columns):
    """Add a line to a CSV file, or nothing at all. An empty or new file gets a header first.

    Raises OSError if it cannot be written, as on a full disk.
    """
    before = Path(path).read_bytes() if Path(path).is_file() else b""  # a pipe would never end
    header = before.split(b"\n")[0].decode(errors="replace").strip().replace('"', "")
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, columns)
    if not before:
        writer.writeheader()
    elif header.split(",") != list(columns):
        fail(f"{path} has other columns: give another file, or remove it")
    elif not before.endswith(b"\n"):  # an editor may have removed it
        lines.write("\r\n")
    writer.writerow(row)
    try:
        with open(path, "ab") as file:
            file.write(lines.getvalue().encode())
    except BaseException:  # Ctrl-C too: a part of a row would count as a row
        if Path(path).is_file():
            os.truncate(path, len(before))
        raise


def keep_row(path, row, columns, anew=False):
    """Add a line to a CSV file, or begin the file anew with it. Exits if it cannot be written."""
    try:
        if anew:
            Path(path).write_bytes(b"")  # and not unlink: it may be a link or a device
        add_row(path, row, columns)
    except OSError as error:
        fail(f"cannot write {path}: {error}", 1)


def fail(message, code=2):
    """One sentence, and the exit code: 2 for bad input, 1 for trouble on the way."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
