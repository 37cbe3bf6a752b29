"""The warden ends what it guards, whatever tricks that uses to get away."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmetanas_core.run import processes

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="orphans are adopted on Linux only")

# A child that ignores SIGTERM, in a session of its own, without the marker, whose parent ends at once.
ESCAPING = """
import os, signal, subprocess, sys, time
if sys.argv[1] == "child":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("pid", os.getpid(), flush=True)
    time.sleep(600)
elif sys.argv[1] == "middle":
    subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True, env={})
else:
    subprocess.run([sys.executable, __file__, "middle"])
    time.sleep(600)
"""


def wait(until: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def living(pid: int) -> bool:
    return any(each.pid == pid and not each.is_zombie for each in processes.processes())


def test_an_escaping_grandchild_is_ended_and_the_log_is_kept(tmp_path: Path) -> None:
    script, home, kept = tmp_path / "escaping.py", tmp_path / "home", tmp_path / "kept" / "log"
    script.write_text(ESCAPING)
    home.mkdir()
    logs = [home / "none.log", home / "output.log"]
    marker = uuid.uuid4().hex
    command = processes.warden_command(marker, home, logs, [sys.executable, str(script), "top"])
    command[command.index("--marker") : command.index("--marker")] = ["--grace-s", "0.5"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as warden:
        assert warden.stdin is not None
        wait(lambda: logs[1].exists() and logs[1].read_text().endswith("\n"))
        child = int(logs[1].read_text().split()[1])
        assert living(child)
        assert len(processes.marked(marker)) == 1
        warden.stdin.write(os.fsencode(kept) + b"\0")
        warden.stdin.close()
        warden.wait(120)
    assert not living(child)
    assert processes.marked(marker) == set()
    assert not home.exists()
    assert kept.read_text().startswith("pid ")


def test_a_command_that_ends_by_itself_is_reported_and_its_folder_waits(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    command = processes.warden_command("m" * 8, home, [home / "log"], [sys.executable, "-c", "print('done')"])
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as warden:
        wait((home / processes.ENDED).exists)
        assert (home / "log").read_text() == "done\n"
        assert warden.poll() is None
    assert not home.exists()


def test_end_kills_what_does_not_listen() -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert processes.end(lambda: {child.pid} if child.poll() is None else set(), grace_s=0.3) == set()
        assert child.returncode == -9
