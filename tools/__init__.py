"""What one does with runs."""

import sys


def fail(message, code=2):
    """One sentence, and the exit code: 2 for bad input, 1 for trouble on the way."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
