"""Where compiled code is kept: whole or not at all, made by one process at a time, and by nobody but this user."""

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

CACHE = "FEDMETANAS_CACHE"
ROOT = 0
_WORKSHOP = "compile-"


@dataclass(frozen=True)
class Store:
    """The place of one compiled library."""

    directory: Path
    key: str

    @classmethod
    def open(cls, key: str) -> Self:
        """In ``$FEDMETANAS_CACHE``, else the user's cache, else among the temporary files. OSError if none will do.

        A place that cannot be written will do if the library is there.
        """
        problem: Exception = OSError("there is no cache directory")
        for place in _places():
            try:
                directory = place()
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                _require_safe(directory)
                found = cls(directory, key)
                if os.access(directory, os.W_OK) or found.has_library():
                    return found
                problem = PermissionError(f"{directory} cannot be written")
            except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
                problem = error
        raise OSError(str(problem))

    @property
    def library(self) -> Path:
        """The library."""
        return self.directory / f"native-{self.key}.so"

    @property
    def digest(self) -> Path:
        """SHA-256 of the library: a file cut short by a power failure would end the process that loads it."""
        return self.library.with_suffix(".sha256")

    @property
    def failure(self) -> Path:
        """Why compiling it failed the last time."""
        return self.library.with_suffix(".failed")

    def has_library(self) -> bool:
        """Whether it is there and whole. Raises OSError if somebody else may have made it."""
        try:
            expected = self.digest.read_text()
            content = self.library.read_bytes()
        except FileNotFoundError:
            return False
        _require_safe(self.library)
        return hashlib.sha256(content).hexdigest() == expected

    def put(self, made: Path) -> None:
        """Take in a library from the workshop."""
        made.chmod(0o700)
        with made.open("rb") as file:
            content = file.read()
            os.fsync(file.fileno())
        note = made.with_suffix(".sha256")
        note.write_text(hashlib.sha256(content).hexdigest())
        os.replace(made, self.library)
        os.replace(note, self.digest)
        self.failure.unlink(missing_ok=True)

    def made_at(self) -> int:
        """When the library was put here, in nanoseconds; 0 if it was not."""
        try:
            return self.library.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def note_failure(self, compiler: str, reason: str) -> None:
        """Remember why this compiler cannot make it."""
        self.failure.write_text(f"{compiler}\n{reason}")

    def recent_failure(self, compiler: str, seconds: float) -> str:
        """Why this compiler could not make it within these last seconds, or ""."""
        try:
            age = time.time() - self.failure.stat().st_mtime
            failed, _, reason = self.failure.read_text().partition("\n")
        except FileNotFoundError:
            return ""
        return reason if age < seconds and failed == compiler else ""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold this library's lock; it is released even if the process is killed."""
        with self.library.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def workshop(self) -> Iterator[Path]:
        """A directory to compile in, for the holder of the lock; what a killed holder left is cleared away."""
        prefix = f"{_WORKSHOP}{self.key}-"
        for left in self.directory.glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=self.directory) as folder:
            yield Path(folder)


def _places() -> list[Callable[[], Path]]:
    """What gives the directories that come into question, the best first."""
    given = os.environ.get(CACHE)
    if given:
        return [lambda: Path(given).expanduser().resolve()]
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return [
        lambda: Path(cache).expanduser().resolve() / "fedmetanas",
        lambda: Path(tempfile.gettempdir()) / f"fedmetanas-{os.getuid()}",
    ]


def _require_safe(path: Path) -> None:
    """Code is loaded from here: raise PermissionError if anybody but this user and root could have put some in."""
    facts = path.lstat()
    if stat.S_ISLNK(facts.st_mode) or facts.st_uid not in (os.getuid(), ROOT):
        raise PermissionError(f"{path} is not this user's own")
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} can be written by others; run chmod go-w on it")
