"""`fedmetanas` as a user types it, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

FEDMETANAS = str(Path(sys.executable).with_name("fedmetanas"))
QUICK = ["local_epochs=1", "init_channels=2", "num_nodes=2", "evaluate_every=2"]


def environment(tmp_path: Path) -> dict[str, str]:
    """This process's, with a home of Flower's own and a mark by which processes are known."""
    return {**os.environ, "FLWR_HOME": str(tmp_path / "flower"), "FEDMETANAS_TEST": str(tmp_path)}


def processes_of(tmp_path: Path) -> list[str]:
    """Command lines of processes that inherited this test's environment, this one's aside."""
    mark, found = f"FEDMETANAS_TEST={tmp_path}".encode(), []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it ended meanwhile
    return found


def search(tmp_path: Path, *pairs: str, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """A small search, with these pairs behind it."""
    return command(tmp_path, "search", *QUICK, *pairs, timeout=timeout)


def command(tmp_path: Path, *words: str, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """`fedmetanas` with these words, in this folder."""
    return subprocess.run(
        [FEDMETANAS, *words],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
