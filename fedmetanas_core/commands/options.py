"""Reading of the words after a command: plain ones, options with a value, and switches."""

import os
from collections.abc import Sequence
from pathlib import Path

from fedmetanas_core.commands.usage import form
from fedmetanas_core.errors import RefusalError


def read_options(
    command: str, arguments: Sequence[str], with_value: Sequence[str] = (), switches: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """The plain words in their order, and the value of each option that was given (of a switch: nothing).

    ``--name VALUE`` and ``--name=VALUE`` are the same; what follows ``--`` is plain. Raises RefusalError.
    """
    words, plain, given = list(arguments), list[str](), dict[str, str]()
    while words:
        word = words.pop(0)
        if word == "--":
            return [*plain, *words], given
        if not word.startswith("-"):
            plain.append(word)
            continue
        name, has_value, value = word.partition("=")
        if name not in (*with_value, *switches) or (name in switches and has_value):
            raise RefusalError(f"{command}: unknown option: {word!r}", f"write {form(command)}")
        if name in given:
            raise RefusalError(f"{command}: {name} was given twice", "give it once")
        if name in with_value and not has_value:
            value = words.pop(0) if words else ""
        if name in with_value and not value:
            raise RefusalError(f"{command}: {name} without a value", f"write {form(command)}")
        given[name] = value
    return plain, given


def refuse_surplus(command: str, words: Sequence[str]) -> None:
    """RefusalError if words are left that mean nothing to this command."""
    if words:
        raise RefusalError(f"{command}: unknown argument: {words[0]!r}", f"write {form(command)}")


def user_path(command: str, text: str) -> Path:
    """The absolute path that was meant; RefusalError for one that the system cannot even look at."""
    try:
        path = Path(os.path.abspath(Path(text).expanduser()))
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RefusalError(f"{command}: {text[:80]!r} is no path: {reason}", "write another one") from error
    return path


def whole_number(command: str, name: str, text: str, example: int) -> int:
    """The value of an option that counts something; RefusalError unless it is a whole number above 0."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0):
        raise RefusalError(f"{command}: {name} {text[:80]!r} is not a whole number above 0", f"write {name} {example}")
    return int(text)
