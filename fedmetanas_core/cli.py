"""The ``fedmetanas`` command: finds the module of the command that was asked for, and says what became of it."""

import io
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version

from fedmetanas_core.commands.terminal import COMPLETED, FAILED, INTERRUPTED, REFUSED, say
from fedmetanas_core.commands.usage import COMMANDS, usage
from fedmetanas_core.errors import FedMetaNASError, RefusalError


def entry_point() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that the terminal cannot show are no reason to stop
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    sys.exit(code)


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code. Refusals are one line on stderr."""
    name, *rest = arguments or [""]
    if name in ("-h", "--help", "help"):
        print(usage())
        return COMPLETED
    if name == "--version":
        print(f"fedmetanas {version('fedmetanas')}")
        return COMPLETED
    try:
        if not name:
            raise RefusalError("no command was given", "write fedmetanas search, or fedmetanas --help")
        if name not in COMMANDS:
            near = get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
            raise RefusalError(f"{name}: unknown command", fix)
        if any(word in ("-h", "--help") for word in rest):
            print(f"{usage()}\n\n{_keys()}" if name == "search" else usage())
            return COMPLETED
        # Imported when it is asked for: some take seconds, which the others need not wait for.
        code: int = import_module(f"fedmetanas_core.commands.{name}").run(rest)
        return code
    except RefusalError as refusal:
        say(f"fedmetanas: {refusal}")
        return REFUSED
    except FedMetaNASError as error:
        say(f"fedmetanas: {error}")
        return FAILED
    except KeyboardInterrupt:
        say("fedmetanas: interrupted")
        return INTERRUPTED


def _keys() -> str:
    """A line for every key: name, default and meaning."""
    from fedmetanas_core.config import describe_keys

    lines = [f"  {name:22} {str(default) or '(empty)':12} {about}" for name, default, about in describe_keys()]
    return "\n".join(["keys (default, meaning):", *lines])
