"""Reading of ``[--config FILE.toml] KEY=VALUE ...``."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmetanas_core.config import defaults, text_keys
from fedmetanas_core.data.datasets import DATASETS
from fedmetanas_core.errors import RefusalError


def parse_pairs(arguments: Sequence[str]) -> dict[str, Any]:
    """[--config FILE.toml] KEY=VALUE ...: a value is TOML where it parses, otherwise the bare text."""
    words, values = list(arguments), {}
    if words and words[0].partition("=")[0] == "--config":
        flag = words.pop(0)
        name = flag.partition("=")[2] if "=" in flag else (words.pop(0) if words else "")
        values = _read_config_file(name)
    given: set[str] = set()
    text_only = text_keys()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip() or key != key.strip() or key.startswith("-"):
            raise RefusalError(f"{word!r} is not KEY=VALUE", _pair_hint(key))
        if key in given:
            raise RefusalError(f"{key}: given twice", "give it once")
        given.add(key)
        values[key] = text if key in text_only and not _toml_text(text) else _toml_or_text(text)
    return values


def _pair_hint(key: str) -> str:
    """What whoever wrote this instead of KEY=VALUE may have meant."""
    if key.startswith("--config"):
        return "put --config FILE.toml before the pairs"
    name = key.strip().lstrip("-")
    if name in defaults():
        return f"write {name}=VALUE, without dashes and spaces"
    if name in DATASETS or name.endswith(".npz") or Path(name).is_dir():
        return f"did you mean dataset={name}?"
    return "write KEY=VALUE, without spaces"


def _toml_text(text: str) -> bool:
    """Whether this is a TOML string in its quotes; run_name=12 and run_name=2026-01-01 are text all the same."""
    return isinstance(_toml_or_text(text), str)


def _read_config_file(name: str) -> dict[str, Any]:
    if not name:
        raise RefusalError("--config: no file was given", "write --config FILE.toml")
    try:
        content = tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise RefusalError(f"--config {name!r}: {error.strerror}", "give a TOML file that exists") from error
    except ValueError as error:
        raise RefusalError(f"--config {name}: not TOML: {error}", "mend it") from error
    if "methods" in content:
        raise RefusalError(f"--config {name}: it is a table", f"write fedmetanas compare {name}")
    return content


def _toml_or_text(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError:  # no TOML, or an integer of more digits than Python converts
        return text
    return parsed["value"] if len(parsed) == 1 else text
