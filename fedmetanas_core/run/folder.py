"""The run folder: where a run's files lie, and how they are written so that a crash never leaves half of one."""

import json
import math
import os
import re
import resource
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from fedmetanas_core.config import Config
from fedmetanas_core.errors import RefusalError, RunFailedError

RUNS_DIR_VARIABLE = "FEDMETANAS_RUNS"
FIGURES = (
    *("rounds", "status", "test_accuracy", "test_accuracy_supernet", "max_logit_difference"),
    *("client_accuracy_mean", "client_accuracy_std", "genotype", "parameters", "macs"),
    *("uplink_bytes", "downlink_bytes", "seconds", "peak_memory_bytes"),
)
LONGEST_RUN_NAME_BYTES = 200  # file systems stop at 255; the rest is left for suffixes of copies and archives
# Control characters, lone surrogates, and the line and paragraph separators: all would break the one-line output.
UNPRINTABLE_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})


def resolve_runs_dir(configured: str, environment: Mapping[str, str], launch_directory: Path) -> Path:
    """The absolute directory that holds all runs; relative settings count from `launch_directory`."""
    chosen = configured or environment.get(RUNS_DIR_VARIABLE, "") or "runs"
    if _unprintable(chosen):
        raise RefusalError(f"runs_dir={_shown(chosen)} contains control characters", "give a plain directory name")
    try:
        directory = Path(chosen).expanduser()
    except RuntimeError as error:  # "~name" of a user this machine does not know
        raise RefusalError(f"runs_dir={_shown(chosen)}: {error}", "write the path out") from error
    return Path(os.path.abspath(launch_directory / directory))


def default_run_name(method: str, dataset: str) -> str:
    """Method, dataset (of a path, the last part without its ending) and time in UTC, to the millisecond.

    The process number keeps runs apart that were launched together.
    """
    now = datetime.now(UTC)
    stamp = f"{now:%Y%m%d-%H%M%S}-{now.microsecond // 1000:03d}"
    plain_stem = re.sub(r"[^\w.-]+|\.{2,}", "-", Path(dataset).stem)
    return f"{method}-{plain_stem.encode()[:100].decode(errors='ignore')}-{stamp}-{os.getpid()}"


def check_run_name(name: str) -> None:
    """Raise RefusalError unless `name` is safe as the name of one directory."""
    problem = ""
    if not name.strip():
        problem = "is empty"
    elif _unprintable(name):
        problem = "contains control characters"
    elif "/" in name or "\\" in name or ".." in name:
        problem = "contains '/', '\\' or '..'"
    elif name.startswith("."):
        problem = "starts with '.'"
    elif name != name.strip():
        problem = "starts or ends with a blank"
    elif len(name.encode()) > LONGEST_RUN_NAME_BYTES:
        problem = f"is longer than {LONGEST_RUN_NAME_BYTES} bytes"
    if problem:
        raise RefusalError(f"run_name={_shown(name)} {problem}", "choose a plain name such as run_name=first-try")


def check_can_create(runs_dir: Path, run_name: str) -> None:
    """Raise RefusalError unless the run `run_name` can be created in `runs_dir`; leaves nothing behind.

    Permission bits say little (root ignores them, read-only mounts and /proc do not show them), so the missing
    directories are really made, in a scratch directory inside the nearest ancestor that exists. Making them there
    rather than in place keeps two runs that start together from removing each other's directories.
    """
    check_run_name(run_name)
    if _unprintable(str(runs_dir)):
        raise RefusalError(
            f"runs_dir={_shown(str(runs_dir))} contains control characters", "give a plain directory name"
        )
    runs_dir = Path(os.path.abspath(runs_dir))
    try:
        if os.path.lexists(runs_dir / run_name):
            raise RefusalError(f"the run {runs_dir / run_name} exists", "choose another run_name")
        ancestor = _nearest_existing(runs_dir)
        if not ancestor.is_dir():
            raise RefusalError(f"runs_dir={runs_dir}: {ancestor} is not a directory", "choose another runs_dir")
        _try_to_create(ancestor, runs_dir.relative_to(ancestor) / run_name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RefusalError(f"runs_dir={runs_dir} cannot be written: {reason}", "choose another runs_dir") from error


def _nearest_existing(path: Path) -> Path:
    # lexists, so that a dangling link counts as being in the way
    return next(candidate for candidate in (path, *path.parents) if os.path.lexists(candidate))


def _try_to_create(ancestor: Path, missing: Path) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=".probe-", dir=ancestor))
    try:
        (scratch / missing).mkdir(parents=True)
        (scratch / missing / "probe").write_bytes(b"probe")  # a full disk lets directories through, not bytes
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unprintable(text: str) -> bool:
    return any(unicodedata.category(character) in UNPRINTABLE_CATEGORIES for character in text)


def _shown(text: str) -> str:
    return ascii(text) if len(text) <= 60 else ascii(text[:57]) + "..."


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


class RunFolder:
    """The files of one run; `path` is absolute."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self.name = self.path.name
        self.config_file = self.path / "config.yaml"
        self.rounds_file = self.path / "rounds.jsonl"
        self.summary_file = self.path / "summary.json"
        self.partition_file = self.path / "partition.npz"
        self.genotype_drawing = self.path / "genotype.svg"
        self.model_directory = self.path / "model"
        self.checkpoint_directory = self.path / "checkpoint"
        self.clients_directory = self.checkpoint_directory / "clients"  # what virtual clients keep for themselves

    @classmethod
    def create(cls, runs_dir: Path, run_name: str) -> "RunFolder":
        """Make the folder with its empty model/ and checkpoint/. Raises RefusalError if it exists or cannot be made."""
        check_run_name(run_name)
        folder = cls(runs_dir / run_name)
        try:
            folder.path.parent.mkdir(parents=True, exist_ok=True)
            folder.path.mkdir()
            folder.model_directory.mkdir()
            folder.checkpoint_directory.mkdir()
            sync_directory(folder.path)
            sync_directory(folder.path.parent)
        except OSError as error:
            if isinstance(error, FileExistsError) and folder.path.is_dir():
                raise RefusalError(f"the run {folder.path} exists", "choose another run_name") from error
            reason = error.strerror or str(error)
            raise RefusalError(f"cannot create the run {folder.path}: {reason}", "choose another runs_dir") from error
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The run folder at `path`. Raises RefusalError if there is none."""
        folder = cls(path)
        if not folder.config_file.is_file():
            missing = "has no config.yaml" if folder.path.is_dir() else "is not a directory"
            raise RefusalError(f"{folder.path} is not a run folder: it {missing}", "give the path that a run printed")
        return folder

    def write_config(self, config: Mapping[str, object]) -> None:
        """Write config.yaml, keys in the order given."""
        text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
        write_atomically(self.config_file, text.encode())

    def read_config(self) -> dict[str, Any]:
        """What config.yaml holds. Raises RunFailedError if it cannot be read."""
        try:
            config = yaml.safe_load(self.config_file.read_bytes())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise RunFailedError(f"cannot read {self.config_file}: {_one_line(error)}") from error
        return _as_object(config, self.config_file)

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Write summary.json; NaN and infinities become null."""
        write_atomically(self.summary_file, (spread_json(summary) + "\n").encode())

    def read_summary(self) -> dict[str, Any] | None:
        """What summary.json holds, None before it is written. Raises RunFailedError if it cannot be read."""
        if not self.summary_file.exists():
            return None
        try:
            summary = json.loads(self.summary_file.read_bytes())
        except (OSError, ValueError) as error:
            raise RunFailedError(f"cannot read {self.summary_file}: {_one_line(error)}") from error
        return _as_object(summary, self.summary_file)

    def append_round(self, row: Mapping[str, object]) -> None:
        """Add one line to rounds.jsonl, on disk when this returns. Raises RunFailedError.

        A line is whole once its newline is there; what a crash left without one is cut off first, so that the new
        line does not grow out of half an old one.
        """
        line = (to_json(row) + "\n").encode()
        try:
            is_new = not self.rounds_file.exists()
            with self.rounds_file.open("a+b", buffering=0) as file:
                end = _end_of_whole_lines(file.fileno())
                file.truncate(end)
                try:
                    _write_all(file.fileno(), line)
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(end)
                    raise
            if is_new:
                sync_directory(self.path)
        except OSError as error:
            raise RunFailedError(f"cannot write {self.rounds_file}: {error.strerror or error}") from error

    def rewind(self, round_number: int) -> None:
        """Forget what came after this round: later rows, and how an earlier session ended. Raises RunFailedError."""
        kept = [row for row in self.read_rounds() if row["round"] <= round_number]
        try:
            if self.rounds_file.exists():
                write_atomically(self.rounds_file, "".join(to_json(row) + "\n" for row in kept).encode())
            self.summary_file.unlink(missing_ok=True)
        except OSError as error:
            raise RunFailedError(f"cannot write {self.path}: {error.strerror or error}") from error

    def read_rounds(self) -> list[dict[str, Any]]:
        """All whole lines of rounds.jsonl, a last one without its newline left out. Raises RunFailedError."""
        return self.rounds_after(0)[0]

    def rounds_after(self, place: int) -> tuple[list[dict[str, Any]], int]:
        """The whole lines of rounds.jsonl from this byte on, and the byte after them, to go on from."""
        if not self.rounds_file.exists():
            return [], place
        try:
            with self.rounds_file.open("rb") as file:
                file.seek(place)
                found = file.read()
        except OSError as error:
            raise RunFailedError(f"cannot read {self.rounds_file}: {error.strerror or error}") from error
        whole = found[: found.rfind(b"\n") + 1]
        rows = []
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                where = f"line {number}" if not place else f"line {number} from byte {place} on"
                raise RunFailedError(f"{self.rounds_file}, {where} is damaged: {_one_line(error)}") from error
            rows.append(_as_object(row, self.rounds_file))
        return rows, place + len(whole)


def blank_summary(config: Config) -> dict[str, Any]:
    """A summary of a run that has measured nothing yet: what it is, and every figure to come as None."""
    identity = ("method", "dataset", "partition", "dir_alpha", "seed", "num_clients")
    return {key: getattr(config, key) for key in identity} | dict.fromkeys(FIGURES)


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _end_of_whole_lines(descriptor: int) -> int:
    """The offset after the last newline of an open file, in bytes."""
    end, block = os.fstat(descriptor).st_size, 4096
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:  # one call may take less than all, for example on a disk that is almost full
        rest = rest[os.write(descriptor, rest) :]


def _as_object(value: object, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RunFailedError(f"{path} is damaged: expected key-value pairs, found {type(value).__name__}")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
