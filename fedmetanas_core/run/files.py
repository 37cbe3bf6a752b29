"""How files of a run are written, so that a crash never leaves half of one, and what JSON and YAML can hold."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmetanas_core.errors import RunFailedError


def plain(value: object) -> Any:
    """`value` in the types JSON and YAML know: numpy and torch scalars and arrays, paths and tuples are converted.

    Raises TypeError for anything else.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        return plain(value.detach().cpu().tolist())
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(entry) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(entry) for entry in value)
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, (int, float, str)):  # a subclass, which YAML would refuse
        return next(basic(value) for basic in (int, float, str) if isinstance(value, basic))
    raise TypeError(f"a run folder cannot hold a {type(value).__name__}")


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN and no infinity
    if isinstance(value, dict):
        return {key: _without_non_finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_non_finite(entry) for entry in value]
    return value


def to_json(mapping: Mapping[str, object]) -> str:
    """Strict JSON of `mapping`; NaN and infinities become null."""
    return json.dumps(_without_non_finite(plain(mapping)), allow_nan=False)


def spread_json(mapping: Mapping[str, object]) -> str:
    """``to_json`` with one line for each key, and for each item of a list of objects."""

    def item(value: Any) -> str:
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            return "[\n" + ",\n".join(f"    {json.dumps(each)}" for each in value) + "\n  ]"
        return json.dumps(value)

    rows = [f"  {json.dumps(key)}: {item(value)}" for key, value in json.loads(to_json(mapping)).items()]
    return "{\n" + ",\n".join(rows) + "\n}"


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_aside(path: Path, content: bytes) -> Path:
    """Write and sync `content` next to `path` and return that file, ready to be renamed to `path`."""
    aside = path.with_name(f".{path.name}.writing")  # a fixed name: what a crash leaves, the next write replaces
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):  # a read-only disk refuses that as well
            aside.unlink(missing_ok=True)
        raise RunFailedError(f"cannot write {path}: {error.strerror or error}") from error
    return aside


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: a reader sees the old file or the new one. Raises RunFailedError."""
    aside = write_aside(path, content)
    try:
        os.replace(aside, path)
        sync_directory(path.parent)
    except OSError as error:
        raise RunFailedError(f"cannot write {path}: {error.strerror or error}") from error


def as_object(value: object, path: Path) -> dict[str, Any]:
    """What was read from this file, if it is a mapping; RunFailedError."""
    if not isinstance(value, dict):
        raise RunFailedError(f"{path} is damaged: expected key-value pairs, found {type(value).__name__}")
    return value


def one_line(error: Exception) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split())
