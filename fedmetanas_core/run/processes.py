"""End everything that a launch started, whatever became of the process that launched it.

Flower starts children in sessions of their own and Ray leaves some to init, so neither a process group nor a parent
holds the whole family. A warden does: this file, run as a script, is the parent of the SuperLink. On Linux it adopts
what loses its parent (child subreaper), so the family is simply its descendants; elsewhere it also remembers process
groups. It waits for its standard input to close, which happens when the launching process ends in any way, SIGKILL
included; then it ends the family and removes the private folder.

The script runs with `-I -S`, so this file imports the standard library only.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

MARKER = "FEDMETANAS_LAUNCH"  # environment variable that every process of a launch inherits
ENDED = "ended"  # file in the private folder once the family has ended
_SET_CHILD_SUBREAPER = 36  # from <sys/prctl.h>
_HAS_PROC = Path("/proc/self/stat").exists()


def available_cores() -> int:
    """The processors that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Process:
    """A running process; `session` is its process group where the system has no /proc."""

    pid: int
    parent: int
    session: int
    is_zombie: bool


def processes() -> list[Process]:
    """Every process of this machine that this user may see."""
    return _from_proc() if _HAS_PROC else _from_ps()


def _from_proc() -> list[Process]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and (text := _read_bytes(f"/proc/{name}/stat")):
            # The command's name stands in brackets and may itself hold spaces and brackets.
            state, parent, _, session = text.rpartition(b")")[2].split()[:4]
            found.append(Process(int(name), int(parent), int(session), state in (b"Z", b"X")))
    return found


def _from_ps() -> list[Process]:
    listing = subprocess.run(
        ["ps", "-axo", "pid=,ppid=,pgid=,stat="], capture_output=True, text=True, check=True, timeout=20
    ).stdout
    rows = (line.split() for line in listing.splitlines())
    return [Process(int(row[0]), int(row[1]), int(row[2]), row[3].startswith("Z")) for row in rows if len(row) > 3]


def _read_bytes(path: str) -> bytes:
    """A file of /proc; empty if the process is gone or another user's."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def marked(marker: str) -> set[int]:
    """Pids of living processes that were started with MARKER=marker in their environment.

    A process that renames itself (Ray's workers do) may overwrite what the system shows of its environment, so this
    finds survivors, and `family` finds everything else.
    """
    entry = f"{MARKER}={marker}".encode()
    if _HAS_PROC:
        living = (each.pid for each in _from_proc() if not each.is_zombie)
        return {pid for pid in living if entry in _read_bytes(f"/proc/{pid}/environ").split(b"\0")}
    listing = subprocess.run(["ps", "-axwwEo", "pid=,command="], capture_output=True, check=True, timeout=20).stdout
    return {int(line.split()[0]) for line in listing.splitlines() if entry in line.split()}


def family(roots: Iterable[int], sessions: set[int]) -> set[int]:
    """Living descendants of `roots`, and the members of `sessions`, to which the sessions met on the way are added.

    The roots themselves are not part of it, nor is anything in the session of the process that asks.
    """
    table, own = processes(), os.getsid(0) if _HAS_PROC else os.getpgrp()
    roots = set(roots)
    sessions.update(each.session for each in table if each.pid in roots and each.session != own)
    members, ancestors = set[int](), roots.copy()
    grown = True
    while grown:
        new = [
            each
            for each in table
            if each.pid not in members and each.pid not in roots and each.pid != os.getpid()
            if each.parent in ancestors or each.session in sessions
        ]
        members.update(each.pid for each in new)
        ancestors.update(each.pid for each in new)
        sessions.update(each.session for each in new if each.session != own)
        grown = bool(new)
    zombies = {each.pid for each in table if each.is_zombie}
    return members - zombies


def launched(marker: str, sessions: set[int], roots: Iterable[int] = ()) -> set[int]:
    """All living processes of a launch, by environment, by descent and by session; `sessions` is extended."""
    by_marker = marked(marker)
    return by_marker | family({*roots, *by_marker}, sessions)


def end(find: Callable[[], set[int]], grace_s: float) -> set[int]:
    """TERM what `find` finds, KILL what is left after `grace_s` seconds; return the pids that even that did not end.

    `find` is asked again and again, so a process started meanwhile is ended as well.
    """
    asked = set[int]()
    deadline = time.monotonic() + grace_s
    while (left := find()) and time.monotonic() < deadline:
        send(left - asked, signal.SIGTERM)
        asked |= left
        time.sleep(0.1)
    deadline = time.monotonic() + 10
    while (left := find()) and time.monotonic() < deadline:
        send(left, signal.SIGKILL)
        time.sleep(0.05)
    return left


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to each; one that has just ended, or has changed its user, is passed over."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


# --- the warden -------------------------------------------------------------------------------------------------


def warden_command(marker: str, home: Path, logs: list[Path], command: list[str]) -> list[str]:
    """The command line of a warden that runs `command` and removes `home` at the end.

    The output of `command` goes to the last of `logs`. The first of them that holds anything is the one that is kept
    if the launcher writes a path, ended by a zero byte, to the warden's standard input.
    """
    own = ["--marker", marker, "--home", str(home), *(word for log in logs for word in ("--log", str(log))), "--"]
    return [sys.executable, "-I", "-S", str(Path(__file__).resolve()), *own, *command]


def _adopt_orphans() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap() -> set[int]:
    """Collect ended children, adopted ones included, so that none stays as a zombie; return their pids."""
    ended = set[int]()
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.add(pid)


def _guard(child: int, sessions: set[int], received: bytearray) -> None:
    """Wait until the launcher's pipe closes or `child` ends; `received` is what the launcher wrote into the pipe."""
    looked = 0.0
    while True:
        if select.select([0], [], [], 0.5)[0]:
            chunk = os.read(0, 65536)
            received += chunk
            if not chunk:
                return
        # Without /proc an orphan is known only by its group, so groups are noted while parents live.
        if not _HAS_PROC and time.monotonic() - looked > 2:
            family([os.getpid()], sessions)
            looked = time.monotonic()
        if child in _reap():
            return


def _await_dismissal(received: bytearray) -> None:
    """The launcher reads the log of a SuperLink that ended by itself, so the folder stays until the pipe closes."""
    while chunk := os.read(0, 65536):
        received += chunk


def _keep(logs: list[Path], received: bytes) -> None:
    """Copy the first log with content to the path that the launcher asked for last, if it asked."""
    asked = [part for part in received.split(b"\0") if part]
    filled = [log for log in logs if log.exists() and log.stat().st_size]
    if asked and filled:
        target = Path(os.fsdecode(asked[-1]))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(filled[0], target)


def _warden(marker: str, home: Path, logs: list[Path], command: list[str], grace_s: float) -> None:
    _adopt_orphans()
    stopped = False

    def on_term(number: int, frame: object) -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            raise KeyboardInterrupt

    received, sessions = bytearray(), set[int]()
    try:
        signal.signal(signal.SIGTERM, on_term)
        with logs[-1].open("ab") as output:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, MARKER: marker},
            )
        sessions.add(child.pid)
        _guard(child.pid, sessions, received)
    except KeyboardInterrupt:
        stopped = True  # asked to end: what follows is the answer
    finally:

        def left() -> set[int]:
            _reap()
            return launched(marker, sessions, [os.getpid()]) - {os.getpid()}

        try:
            end(left, grace_s)
            (home / ENDED).touch()
            _await_dismissal(received)
            _keep(logs, bytes(received))
        finally:
            shutil.rmtree(home, ignore_errors=True)


def main() -> None:
    """Entry point of the warden script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--marker", required=True)
    parser.add_argument("--home", required=True, type=Path)
    parser.add_argument("--log", required=True, action="append", type=Path)
    parser.add_argument("--grace-s", type=float, default=5.0)
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    _warden(given.marker, given.home, given.log, given.command, given.grace_s)


if __name__ == "__main__":
    main()
