"""The run folder: where a run's files lie, and how they are written so that a crash never leaves half of one."""

import json
import os
import re
import resource
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from fedmetanas_core.config import Config
from fedmetanas_core.errors import RefusalError, RunFailedError
from fedmetanas_core.run.files import as_object, one_line, plain, spread_json, sync_directory, write_atomically
from fedmetanas_core.run.ledger import Ledger

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


class RunFolder:
    """The files of one run; `path` is absolute."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self.name = self.path.name
        self.config_file = self.path / "config.yaml"
        self.rounds = Ledger(self.path / "rounds.jsonl")
        self.architecture = Ledger(self.path / "architecture.jsonl")
        self.summary_file = self.path / "summary.json"
        self.partition_file = self.path / "partition.npz"
        self.report_file = self.path / "report.html"
        self.pictures_directory = self.path / "pictures"
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
            raise RunFailedError(f"cannot read {self.config_file}: {one_line(error)}") from error
        return as_object(config, self.config_file)

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
            raise RunFailedError(f"cannot read {self.summary_file}: {one_line(error)}") from error
        return as_object(summary, self.summary_file)

    def rewind(self, round_number: int) -> None:
        """Forget what came after this round: later rows, and how an earlier session ended. Raises RunFailedError."""
        self.rounds.rewind(round_number)
        self.architecture.rewind(round_number)
        try:
            self.summary_file.unlink(missing_ok=True)
            self.report_file.unlink(missing_ok=True)
            shutil.rmtree(self.pictures_directory, ignore_errors=True)
        except OSError as error:
            raise RunFailedError(f"cannot write {self.path}: {error.strerror or error}") from error


def blank_summary(config: Config) -> dict[str, Any]:
    """A summary of a run that has measured nothing yet: what it is, and every figure to come as None."""
    identity = ("method", "dataset", "partition", "dir_alpha", "seed", "num_clients")
    return {key: getattr(config, key) for key in identity} | dict.fromkeys(FIGURES)


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
