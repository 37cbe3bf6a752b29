"""Who works in a run folder: at most one launcher and one writer, so that a run is never resumed twice at a time.

Both are held by file locks that end with their process, however it ends.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from fedmetanas_core.errors import FedMetaNASError

LAUNCHER, WRITER = ".launcher", ".writer"
PREDECESSOR_S = 30.0  # that the processes of a killed run may take to end
_POLL_S = 0.2


class OwnedError(FedMetaNASError):
    """Another process works in the run folder."""


@contextmanager
def owned(run: Path, role: str, patience_s: float = 0.0) -> Iterator[None]:
    """Be the one launcher or writer of this run folder for the time of the block.

    Waits ``patience_s`` seconds for another one to end: processes of a launch that was killed take a moment. Raises
    OwnedError, naming the process, if it does not.
    """
    path, deadline = run / role, time.monotonic() + patience_s
    try:
        file = path.open("a+")
    except OSError as error:
        raise OwnedError(f"{run} cannot be written: {error.strerror or error}") from error
    with file:  # closing it gives the lock up
        while not _locked(file):
            if time.monotonic() >= deadline:
                raise OwnedError(f"{run} is in use by {_read(path) or 'another process'}")
            time.sleep(_POLL_S)
        with suppress(OSError):  # the lock is what counts; a full disk must not keep its holder from working
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def is_owned(run: Path, role: str) -> bool:
    """Whether somebody is this run folder's launcher or writer now."""
    for mode in ("a+", "r"):  # the second on a disk that has become read-only
        try:
            with (run / role).open(mode) as file:
                return not _locked(file)
        except OSError:
            continue
    return False  # no such file yet


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise OwnedError(f"{file.name} cannot be locked: {error.strerror or error}") from error
    return True


def _read(path: Path) -> str:
    return path.read_text(errors="replace")[:200]
