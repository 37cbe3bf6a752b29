"""A federation of real Flower processes, as docker/compose.yaml has them, natively on this machine.

Every program gets the command line of its service there; names, addresses and paths alone are others. Each SuperNode
lives in a network namespace of its own where such can be made (Linux, root, iproute2), else on this machine's network.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from http.client import HTTPSConnection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import yaml
from PIL import Image

from fedmetanas_core.data.datasets import load_dataset
from fedmetanas_core.run import processes
from fedmetanas_core.run.control import ControlApi
from fedmetanas_core.run.folder import RunFolder
from fedmetanas_core.space.native.store import CACHE

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(sys.executable).parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
_PORTS = ("8000", "9100", "9101")  # of the containers


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _ip(*words: str, check: bool = True) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=check).returncode == 0


@cache
def can_make_namespaces() -> bool:
    """Whether this machine lets us make networks of our own."""
    if sys.platform != "linux" or shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"fm{uuid.uuid4().hex[:6]}"
    if not _ip("netns", "add", name, check=False):
        return False
    paired = _ip("link", "add", f"{name}a", "type", "veth", "peer", f"{name}b", "netns", name, check=False)
    _ip("netns", "delete", name)  # and the pair with it
    return paired


def wait(until: Callable[[], object], seconds: float, what: str) -> None:
    """Until it is true, or the test has failed."""
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain: {what}"
        time.sleep(0.2)


def _each_of(services: Iterable[str]) -> list[str]:
    """With node:SITE in its two parts."""
    kinds = {"node": ("supernode", "clientapp")}
    return [
        f"{part}:{site}" if site else part
        for kind, _, site in (service.partition(":") for service in services)
        for part in kinds.get(kind, (kind,))
    ]


class SecureControlApi(ControlApi):
    """Of a SuperLink on this machine, with TLS."""

    def __init__(self, port: int, authority: Path) -> None:
        super().__init__(port)
        self._trusted = ssl.create_default_context(cafile=authority)

    def _connection(self) -> HTTPSConnection:
        return HTTPSConnection("127.0.0.1", self._port, timeout=self._timeout_s, context=self._trusted)


class Federation:
    """A SuperLink, a SuperExec for its ServerApps, and SuperNodes with a SuperExec each, as a context manager.

    ``sites`` are the nodes and what the configuration of each says beside its state-path: {"a": "data-path='...'"}.
    Nothing runs on entry; leaving ends everything. What ends by itself is started again, as compose.yaml has it.
    ``folder`` holds certificates, keys, states, logs and runs.
    """

    def __init__(self, folder: Path, sites: Mapping[str, str]) -> None:
        self.folder, self.sites, self.marker = folder, dict(sites), uuid.uuid4().hex
        self.runs, self.logs = folder / "runs", folder / "logs"
        self._authority = folder / "certificates" / "ca.crt"
        self.authority_of: dict[str, Path] = {}  # where a site trusts another one
        self.port, self._ports = free_port(), dict[str, int]()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._over, self._lock = threading.Event(), threading.RLock()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self.in_namespaces = can_make_namespaces()
        self._network = random.SystemRandom().randrange(64, 250)
        for place in (self.runs, self.logs):
            place.mkdir(parents=True)
        self._certificates()

    def __enter__(self) -> Self:
        if self.in_namespaces:
            for number, site in enumerate(self.sites):
                name, near, far = self._namespace(site), *self._ends(site)
                _ip("netns", "add", name)
                _ip("link", "add", near, "type", "veth", "peer", far, "netns", name)
                _ip("address", "add", f"{self._near_address(number)}/24", "dev", near)
                _ip("link", "set", near, "up")
                for words in (
                    ("address", "add", f"10.{self._network}.{number}.2/24", "dev", far),
                    ("link", "set", far, "up"),
                    ("link", "set", "lo", "up"),
                ):
                    _ip("-netns", name, *words)
        self._supervisor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._supervisor.join()
        sessions = set[int]()
        left = processes.end(lambda: processes.launched(self.marker, sessions), grace_s=2.0)
        for process in self._running.values():
            process.wait()
        if self.in_namespaces:
            for site in self.sites:
                _ip("netns", "delete", self._namespace(site), check=False)
        assert not left

    def _supervise(self) -> None:
        """What `restart: unless-stopped` does."""
        while not self._over.wait(1.0):
            with self._lock:
                for service in [name for name, process in self._running.items() if process.poll() is not None]:
                    self.start(service)

    # --- the network ----------------------------------------------------------------------------------------------

    def _namespace(self, site: str) -> str:
        return f"fm{self.marker[:6]}{list(self.sites).index(site)}"

    def _ends(self, site: str) -> tuple[str, str]:
        return f"{self._namespace(site)}n", f"{self._namespace(site)}f"

    def _near_address(self, number: int) -> str:
        return f"10.{self._network}.{number}.1"

    def cut(self, site: str) -> None:
        """Take this site's network down."""
        _ip("link", "set", self._ends(site)[0], "down")

    def mend(self, site: str) -> None:
        """Take it up again."""
        _ip("link", "set", self._ends(site)[0], "up")

    # --- the programs ---------------------------------------------------------------------------------------------

    def _certificates(self) -> None:
        names = ["superlink", "localhost", "127.0.0.1", *(self._near_address(each) for each in range(len(self.sites)))]
        docker = ROOT / "docker"
        quiet: dict[str, Any] = {"check": True, "capture_output": True}
        subprocess.run([docker / "certificates.sh", self.folder / "certificates", *names], **quiet)
        subprocess.run([docker / "node-key.sh", self.folder / "keys", *self.sites], **quiet)

    def start(self, *services: str) -> None:
        """Start services of compose.yaml: superlink, serverapp, supernode:SITE, clientapp:SITE; or node:SITE for both
        of these."""
        for service in _each_of(services):
            with self._lock:
                self._start(service)

    def _start(self, service: str) -> None:
        kind, _, site = service.partition(":")
        template = COMPOSE["services"][f"{kind}-1" if site else kind]
        command = [self._translated(word, kind, site) for word in template["command"]]
        if site and self.in_namespaces:
            command = ["ip", "netns", "exec", self._namespace(site), str(SCRIPTS / command[0]), *command[1:]]
        else:
            command[0] = str(SCRIPTS / command[0])
        home = self.folder / "homes" / service.replace(":", "-")
        home.mkdir(parents=True, exist_ok=True)
        given = {
            key: self._translated(str(value), kind, site)
            for key, value in template.get("environment", {}).items()
            if key != CACHE  # the kernels of this machine serve all federations on it
        }
        with (self.logs / f"{service.replace(':', '-')}.log").open("ab") as log:
            self._running[service] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=home,
                env=self._environment(home) | given,
                start_new_session=True,
            )

    def _translated(self, word: str, kind: str, site: str) -> str:
        """A word of a container's command line as it is here."""
        word = word.replace("site-1", site) if site else word
        secrets = {
            **COMPOSE["secrets"],
            site: {"file": f"keys/{site}"},
            f"{site}.secret": {"file": f"keys/{site}.secret"},
        }
        if site in self.authority_of:
            word = word.replace("/run/secrets/ca.crt", str(self.authority_of[site]))
        word = re.sub(r"/run/secrets/([\w.-]+)", lambda found: str(self.folder / secrets[found[1]]["file"]), word)
        if word.startswith("--node-config"):
            state = self.folder / "state" / site
            return f"--node-config={self.sites[site]} state-path='{state}'"
        if word.startswith("/runs"):
            return str(self.runs)
        if "/state" in word:
            (self.folder / "state").mkdir(exist_ok=True)
            word = word.replace("/state", str(self.folder / "state"))
        host = self._near_address(list(self.sites).index(site)) if site and self.in_namespaces else "127.0.0.1"
        word = word.replace("superlink:8000", f"{host}:{self.port}").replace("supernode-1:9100", "127.0.0.1:9100")
        for port in _PORTS:
            if word.endswith(port) and (word.startswith("--port") or ":" in word):
                mine = (
                    self.port
                    if port == "8000"
                    else self._ports.setdefault(f"{site if port == '9100' else kind + site}:{port}", free_port())
                )
                word = word.removesuffix(port) + str(mine)
        return word

    def _environment(self, home: Path) -> dict[str, str]:
        return os.environ | {
            "PATH": os.pathsep.join([str(SCRIPTS), os.environ["PATH"]]),
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            processes.MARKER: self.marker,
        }

    def kill(self, *services: str) -> None:
        """SIGKILL a service with all that it started."""
        for service in _each_of(services):
            with self._lock:
                process = self._running.pop(service)
                processes.send({process.pid} | processes.family([process.pid], set()), signal.SIGKILL)
                process.wait()

    def descendants(self, service: str) -> dict[int, str]:
        """Command lines of what a service has started, by pid."""
        found = {}
        for pid in processes.family([self._running[service].pid], set()):
            try:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found

    def is_healthy(self, service: str) -> bool:
        """What the container's health check would find."""
        kind, _, site = service.partition(":")
        template = COMPOSE["services"][f"{kind}-1" if site else kind]
        address = self._translated(template["healthcheck"]["test"][2], kind, site)
        command = [sys.executable, str(ROOT / "docker" / "healthy.py"), address]
        if site and self.in_namespaces:
            command = ["ip", "netns", "exec", self._namespace(site), *command]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    # --- the command line of Flower -------------------------------------------------------------------------------

    def flwr(self, *words: str, project: Path = ROOT) -> dict[str, Any]:
        """A `flwr` command at this SuperLink; its JSON."""
        home = self.folder / "homes" / "cli"
        if not home.exists():
            home.mkdir(parents=True)
            lines = ["[superlink]", 'default = "lab"', "[superlink.lab]", f'address = "127.0.0.1:{self.port}"']
            (home / "config.toml").write_text("\n".join([*lines, f'root-certificates = "{self._authority}"', ""]))
        done = subprocess.run(
            [str(SCRIPTS / "flwr"), *words, "--format", "json"],
            cwd=project,
            env=self._environment(home),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        start = done.stdout.find("{")
        assert start >= 0, done.stdout + done.stderr
        answer: dict[str, Any] = json.loads(done.stdout[start:])
        return answer

    def register(self, sites: Iterable[str]) -> None:
        """Make the keys of these nodes known."""
        for site in sites:
            answer = self.flwr("supernode", "register", str(self.folder / "keys" / f"{site}.pub"), "lab")
            assert answer["success"], answer

    def states_of_nodes(self) -> list[str]:
        """What the SuperLink says of those that are registered: online or not, sorted."""
        return sorted(str(node["status"]) for node in self.flwr("supernode", "list", "lab")["nodes"])

    def begin(self, sites: Iterable[str] | None = None) -> None:
        """Start the SuperLink and its SuperExec, register the keys, start the nodes (all, unless some are named)."""
        self.start("superlink")
        wait(lambda: self.is_healthy("superlink"), 60, "the SuperLink")
        self.start("serverapp")
        chosen = list(self.sites if sites is None else sites)
        self.register(chosen)
        self.start(*(f"node:{site}" for site in chosen))

    def submit(self, run_config: str) -> int:
        """Start a run; its number in Flower."""
        answer = self.flwr("run", ".", "lab", "--run-config", run_config)
        assert answer["success"], answer
        return int(answer["run-id"])

    def finish(self, run: int, seconds: float) -> tuple[str, str]:
        """Wait for a run's end; (status, details)."""
        control, deadline = SecureControlApi(self.port, self._authority), time.monotonic() + seconds
        while True:
            status, details = control.run_status(run)
            if status.startswith("finished"):
                return status, details
            assert time.monotonic() < deadline, f"the run goes on after {seconds:g} s\n{self.tail('serverapp')}"
            time.sleep(1.0)

    def tail(self, service: str, lines: int = 40) -> str:
        """The end of a service's log."""
        text = (self.logs / f"{service.replace(':', '-')}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def run_folder(self, name: str) -> RunFolder:
        """The folder of a run of this name."""
        return RunFolder(self.runs / name)


def digit_folders(root: Path, site: int, sites: int, each: int = 20, without: Iterable[int] = ()) -> Path:
    """Class folders 0 ... 9 with PNG files of digits that no other of the sites has; some classes may be missing."""
    train = load_dataset("digits", "data", 0).train
    for digit in set(range(10)) - set(without):
        (root / str(digit)).mkdir(parents=True)
        for index in np.flatnonzero(train.labels == digit)[site::sites][:each]:
            Image.fromarray(train.take(np.array([index]))[0, :, :, 0]).save(root / str(digit) / f"{index}.png")
    return root
