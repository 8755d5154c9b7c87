"""What one does with runs."""

import sys


def fail(message):
    """One sentence, and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
