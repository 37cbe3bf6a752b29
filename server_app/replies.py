"""What Flower's error replies say."""

import re

from flwr.app import Message

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def error_line(reply: Message) -> str:
    """The last line of an error reply, where Python puts what went wrong; without colour codes."""
    lines = _ANSI.sub("", str(reply.error.reason or "")).strip().splitlines()
    return lines[-1].strip() if lines else f"error code {reply.error.code}"
