"""The trackers of a run's session, each in a process of its own, so that none can fail or hold up the run."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from signal import SIGKILL
from types import TracebackType
from typing import Self

from fedmetanas_core.errors import FedMetaNASError, RefusalError
from fedmetanas_core.output.tracking.sinks import SINKS
from fedmetanas_core.run.folder import RunFolder

PROGRAM = "fedmetanas_core.output.tracking.program"
CLOSES_S = 60.0  # that trackers get at the end of a run to send what is left
INTERRUPTED_S = 3.0  # and where the run was told to end: whoever did it waits
POLL_S = 0.1
_ROOT = Path(__file__).resolve().parents[3]


def tracker_names(track: str) -> list[str]:
    """The trackers that this value of ``track`` names, each once. RefusalError for one that there is not."""
    names = list(dict.fromkeys(name.strip() for name in track.split(","))) if track.strip() else []
    for name in names:
        if name not in SINKS:
            near = get_close_matches(name, SINKS, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}? " if near else ""
            raise RefusalError(f"track: {name[:80]!r} is unknown", f"{hint}choose of {', '.join(SINKS)}")
    return names


def missing_trackers(names: Iterable[str]) -> list[str]:
    """Those that are not installed here."""
    found = {name: find_spec(name) for name in names}
    # Without an origin: a mere folder of that name, as wandb leaves them.
    return [name for name, spec in found.items() if spec is None or spec.origin is None]


def check_trackers(track: str) -> None:
    """RefusalError for trackers that there are not, or that are not installed here."""
    for name in missing_trackers(tracker_names(track)):
        raise RefusalError(f"track: {name} is not installed", how_to_install(name))


def how_to_install(name: str) -> str:
    """The command."""
    return f'pip install -e ".[{name}]"'


class Tracking:
    """The trackers of one session, as a context manager; they run from ``start`` on.

    They read the run folder, so that nothing is sent to them. One that fails is done with: ``failed`` says so once.
    One that is not installed has failed: a run that goes on elsewhere does so without it.
    On leaving, they get a minute to send what is left; then their processes are ended.
    """

    def __init__(self, folder: RunFolder, track: str, directory: Path) -> None:
        """``directory`` is where paths in a tracker's own environment variables count from."""
        self.folder, self.names, self.directory = folder, tracker_names(track), directory
        self.failures: list[str] = []
        self._told = 0
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(CLOSES_S if kind is None or issubclass(kind, Exception) else INTERRUPTED_S)

    def start(self, after: int) -> None:
        """Start them, on a run that has this many rounds behind it."""
        missing = missing_trackers(self.names)
        for name in missing:
            self._note(name, f"it is not installed here ({how_to_install(name)})")
        for name in (name for name in self.names if name not in missing):
            path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
            try:
                self._running[name] = subprocess.Popen(
                    [sys.executable, "-P", "-m", PROGRAM, name, str(self.folder.path), str(after)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    cwd=self.directory,
                    env={**os.environ, "PYTHONPATH": path},
                    start_new_session=True,  # Ctrl-C in the terminal is the server's to answer
                )
            except OSError as error:
                self._note(name, str(error))

    def failed(self) -> list[str]:
        """What is to be noted of trackers that have failed since this was last asked."""
        for name, process in list(self._running.items()):
            if process.poll() is not None:
                self._ended(name, process)
        new, self._told = self.failures[self._told :], len(self.failures)
        return new

    def _ended(self, name: str, process: subprocess.Popen[bytes], late: str = "") -> None:
        """Let go of a process that has ended, or is to be ended because it is ``late``."""
        del self._running[name]
        if late:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, SIGKILL)
            process.wait()
        said = b"" if late or process.stdout is None else process.stdout.read()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        if process.returncode:
            self._note(name, late or said.decode(errors="replace") or f"its process ended with {process.returncode}")

    def _note(self, name: str, reason: str) -> None:
        self.failures.append(f"track: {name}: {reason}; switched off")
        print(self.failures[-1], flush=True)

    def _close(self, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        try:
            for process in self._running.values():
                if process.stdin is not None:
                    process.stdin.close()
            while self._running and time.monotonic() < deadline:
                self.failed()
                time.sleep(POLL_S)
        finally:
            for name, process in list(self._running.items()):
                self._ended(name, process, f"it did not end within {patience_s:g} s of the run")
        if self.failures:
            self._write_down()

    def _write_down(self) -> None:
        """Put the failures into the summary: those after the last round stand nowhere else."""
        try:
            summary = self.folder.read_summary()
            if summary is not None:
                self.folder.write_summary({**summary, "track_failures": self.failures})
        except FedMetaNASError as error:  # the disk is full; the log has them
            print(f"track: {error}", flush=True)
