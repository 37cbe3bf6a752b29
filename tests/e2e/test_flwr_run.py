"""The literal `flwr run . --run-config dir_alpha=0.1` after `fedmetanas setup`, on a SuperLink that Flower starts."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedmetanas_core.run.control import ControlApi
from fedmetanas_core.run.folder import RunFolder
from fedmetanas_core.run.processes import end, family

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent
QUICK = "num_rounds=1 local_epochs=1 init_channels=2 num_nodes=2"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Flower:
    """A Flower installation of this test's own: its home, its ports."""

    home: Path
    environment: dict[str, str]
    log: str = ""

    def command(self, *words: str, cwd: Path, timeout: float = 300) -> str:
        done = subprocess.run(
            [str(SCRIPTS / words[0]), *words[1:]],
            cwd=cwd,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(self, project: Path, run_config: str, timeout: float = 400) -> tuple[str, str]:
        """Submit, wait for the end; (status, details)."""
        answer = json.loads(
            self.command("flwr", "run", ".", "--run-config", run_config, "--format", "json", cwd=project)
        )
        assert answer["success"], answer
        control = ControlApi(int(self.environment["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"]))
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            status, details = control.run_status(int(answer["run-id"]))
            if status.startswith("finished"):
                self.log = self.command("flwr", "log", str(answer["run-id"]), "--show", cwd=project)
                return status, details
            time.sleep(1)
        raise AssertionError("the run did not end")


@pytest.fixture(scope="module")
def ray_directory() -> Iterator[str]:
    """Of this test's own: Ray joins whatever cluster the usual one names, and goes down with it. Short, for sockets."""
    with tempfile.TemporaryDirectory(prefix="fmn-", ignore_cleanup_errors=True) as place:
        yield place


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory, ray_directory: str) -> Iterator[Flower]:
    home = tmp_path_factory.mktemp("flower")
    environment = {
        **os.environ,
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "RAY_TMPDIR": ray_directory,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Flower calls uv for every run: there must be nothing left for it to look up or to install.
        "UV_OFFLINE": "1",
        "UV_CACHE_DIR": str(home / "uv"),
    }
    environment.pop("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", None)
    yield Flower(home, environment)
    mark = f"FLWR_HOME={home}".encode()

    def mine() -> set[int]:
        roots = set()
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    roots.add(int(entry.name))
            except OSError:
                continue  # it ended meanwhile
        return roots | family(roots, set())

    assert mine(), "the SuperLink outlives the runs, so there is one to end"
    assert not end(mine, 5.0)


def copy_project(directory: Path, name: str) -> Path:
    project = directory / name
    project.mkdir()
    for part in ("server_app", "client_app", "fedmetanas_core"):
        shutil.copytree(ROOT / part, project / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "flwr.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, project / part)
    return project


def test_setup_then_the_literal_command_and_another_project_beside_it(flower: Flower, tmp_path: Path) -> None:
    """One SuperLink, started in project A, serves both; neither may run the other's code."""
    first, second = copy_project(tmp_path, "first"), copy_project(tmp_path, "second")
    marker = tmp_path / "second-clients-ran"
    handler = second / "client_app" / "app.py"
    # The second project's clients leave a trace of their own; the first project's do not know how.
    handler.write_text(handler.read_text() + f'\n\nPath("{marker}").write_text("yes")\n')
    flower.command("fedmetanas", "setup", cwd=first)
    status, details = flower.run(first, f"dir_alpha=0.1 run_name='first' {QUICK}")
    assert status == "finished:completed", details
    assert not marker.exists()
    folder = RunFolder.open(first / "runs" / "first")
    assert str(folder.path) in flower.log
    assert "round 1/1, one-hot, loss" in flower.log or "round 1/1, warm-up, loss" in flower.log
    summary = folder.read_summary()
    assert summary is not None
    assert (summary["status"], summary["num_clients"], summary["dir_alpha"]) == ("completed", 100, 0.1)
    assert len(folder.rounds.read()[0]["clients"]) == 5
    # Flower would have made an environment of its own for the run, with another torch: trap 1 is closed.
    assert not list(flower.home.rglob("site-packages"))

    status, details = flower.run(second, f"dir_alpha=0.1 run_name='second' {QUICK}")
    assert status == "finished:completed", details
    assert marker.exists()
    # The SuperLink was started in the first project, so that is the directory of launch.
    folders = {name: RunFolder.open(first / "runs" / name).read_config() for name in ("first", "second")}
    assert folders["first"]["code_fingerprint"] != folders["second"]["code_fingerprint"]

    status, details = flower.run(first, f"num_clients=101 {QUICK}")
    assert status == "finished:failed"
    assert "fedmetanas setup --nodes 101" in details
    assert "\nfedmetanas: num_clients=101, but Flower has 100 nodes" in flower.log
