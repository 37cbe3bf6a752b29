"""What every command has in common towards the terminal: exit codes, and messages on stderr."""

import sys

COMPLETED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def say(text: str) -> None:
    """A message for people; stdout belongs to results."""
    print(text, file=sys.stderr, flush=True)
