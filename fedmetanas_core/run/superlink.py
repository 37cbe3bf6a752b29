"""Run a Flower app with a SuperLink of its own, and leave nothing behind.

`Simulation` starts a warden (see `processes`), the warden starts `flower-superlink`, and that starts the simulation
and Ray. Everything of Flower's and Ray's lies in one private folder, so another SuperLink, Flower configuration or
Ray cluster on this machine is neither used nor disturbed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedmetanas_core.errors import ProcessDiedError, RefusalError, RunFailedError
from fedmetanas_core.run import processes
from fedmetanas_core.run.control import ControlApi

Value = bool | int | float | str

_CONNECTION = "own"
_RUN_LOG = "run.log"
_START_TIMEOUT_S = 180.0  # cold caches on two busy cores have taken 20
_SUBMIT_TIMEOUT_S = 180.0
_END_TIMEOUT_S = 40.0  # the warden's own grace and kill, with room
_SILENCE_LIMIT_S = 120.0
_TAIL_BYTES = 1 << 18
_TAIL_LINES_KEPT = 400
# Unix sockets hold 107 characters, and Ray appends about 65 to its temporary folder.
_LONGEST_TEMPORARY_FOLDER = 24

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_ACCESS_LINE = re.compile(r'"(?:GET|POST) /\S* HTTP/|ControlServicer\.')


def toml_value(value: Value, key: str = "value") -> str:
    """`value` as TOML, such that TOML reads back the same value. RefusalError for what Flower cannot carry."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise RefusalError(f"{key}={value} does not fit into 64 bits", "give a smaller number")
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RefusalError(f"{key}={value} is not a finite number", "give a finite one")
        return repr(value)
    if not isinstance(value, str):
        raise RefusalError(f"{key} is of type {type(value).__name__}", "give a text, a number, true or false")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RefusalError(f"{key}={value!r} is not valid text", "give a text that UTF-8 can hold") from error
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_table(values: Mapping[str, Value]) -> str:
    """Lines `"key" = value`. Keys are quoted, so a dot in a key stays part of it."""
    return "".join(f"{toml_value(key)} = {toml_value(value, key)}\n" for key, value in values.items())


class Simulation:
    """A Flower app on virtual clients, with a SuperLink of its own, as a context manager.

    Entering starts the SuperLink and submits the run; leaving ends every process, on any exception, KeyboardInterrupt
    included. If this process is killed outright, SIGKILL included, the warden does the same.
    """

    def __init__(
        self,
        app_dir: Path,
        run_config: Mapping[str, Value],
        *,
        num_nodes: int,
        num_workers: int | None,
        launch_dir: Path,
        gpus_per_client: float = 0.0,
        environment: Mapping[str, str] | None = None,
        keep_log: Path | None = None,
    ) -> None:
        """Nothing is started here.

        `num_nodes` virtual clients are served by `num_workers` processes, each with one core and `gpus_per_client`
        of a GPU; None: by as many as there are cores in the cluster that RAY_ADDRESS in `environment` names.
        `launch_dir` is the working directory of the ServerApp. `environment` is added last, so it wins. `keep_log` is
        where the log goes when all is over. Raises RefusalError for values that cannot be passed on.
        """
        self.app_dir, self.launch_dir, self.keep_log = app_dir.resolve(), launch_dir.resolve(), keep_log
        for name, number in (("num_nodes", num_nodes), ("num_workers", num_workers)):
            if number is not None and number < 1:
                raise RefusalError(f"{name}={number} is too small", "give 1 or more")
        if not 0.0 <= gpus_per_client < math.inf:
            raise RefusalError(f"gpus_per_client={gpus_per_client} is not a share of a GPU", "give 0 or more")
        self._run_config = toml_table(run_config)
        self._federation_config = toml_table(
            {
                "num-supernodes": num_nodes,
                "client-resources-num-cpus": 1,
                "client-resources-num-gpus": float(gpus_per_client),
                # Ray's cores are bookkeeping: one for each client that trains makes this the number of workers.
                **({} if num_workers is None else {"init-args-num-cpus": num_workers}),
            }
        )
        self._additions = dict(environment or {})
        self.marker = uuid.uuid4().hex
        self.run_id: int | None = None
        self.home: Path | None = None
        self._warden: subprocess.Popen[bytes] | None = None
        self._control: ControlApi | None = None
        self._final_lines: list[str] = []
        self._last_status = ("pending", "")
        self._answered = 0.0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def log_files(self) -> list[Path]:
        """The run's own log (ServerApp, Ray and clients), then the SuperLink's. They exist until `stop`."""
        return [self.home / name for name in (_RUN_LOG, "superlink.log")] if self.home is not None else []

    def start(self) -> None:
        """Start the SuperLink and submit the run. RunFailedError, with the log's end, if either does not work."""
        try:
            self.home = _private_home()
            self._start_superlink(self.home)
            self._submit(self.home)
        except BaseException:
            self.stop()
            raise

    def status(self) -> tuple[str, str]:
        """(status, details), for example ("running", "") or ("finished:failed", "Simulation failed with ...").

        Cheap enough for every second (one local HTTP request). A SuperLink too busy to answer leaves the last status
        standing for two minutes; ProcessDiedError after that, or as soon as the SuperLink has ended.
        """
        if self._control is None or self.run_id is None or self._warden is None:
            raise RunFailedError("the simulation has not been started")
        try:
            self._last_status = self._control.run_status(self.run_id)
            self._answered = time.monotonic()
        except OSError as error:
            if self._has_ended(self._warden):
                raise ProcessDiedError("the SuperLink ended before the run did\n" + self._tail_text(20)) from error
            if time.monotonic() - self._answered > _SILENCE_LIMIT_S:
                raise ProcessDiedError("the SuperLink does not answer\n" + self._tail_text(20)) from error
        return self._last_status

    def log_tail(self, lines: int = 30) -> list[str]:
        """The last lines of the run's log, or of the SuperLink's while the run has none; also after `stop`.

        Colour codes and the lines about HTTP requests are left out.
        """
        filled = [path for path in self.log_files if path.exists() and path.stat().st_size]
        if not filled:
            return self._final_lines[-lines:]
        with filled[0].open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - _TAIL_BYTES))
            text = _ANSI.sub("", log.read().decode("utf-8", "replace"))
        wanted = [line.rstrip() for line in text.splitlines() if line.strip() and not _ACCESS_LINE.search(line)]
        return wanted[-lines:]

    def stop(self) -> None:
        """Stop the run if it still goes, end every process, remove the private folder. Idempotent.

        RunFailedError if a process could not be ended even by SIGKILL.
        """
        warden, self._warden = self._warden, None
        if warden is None:
            if self.home is not None:
                shutil.rmtree(self.home, ignore_errors=True)
            return
        # Flower's own stop request is not sent: the simulation notices it only after seconds, and the SuperLink that
        # would remember the answer ends with it.
        self._final_lines = self.log_tail(_TAIL_LINES_KEPT)
        _dismiss(warden, self.keep_log)
        sessions = set[int]()
        left = processes.end(lambda: processes.launched(self.marker, sessions), grace_s=1.0)
        if self.home is not None:
            shutil.rmtree(self.home, ignore_errors=True)
        if left:
            raise RunFailedError(f"these processes of the run could not be ended: {sorted(left)}")

    def _start_superlink(self, home: Path) -> None:
        environment = self._environment(home)
        for _ in range(3):
            port = _free_port()
            _furnish(home, port)
            command = [
                _program("flower-superlink"),
                *("--insecure", "--simulation", "--isolation", "subprocess"),
                *("--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"),
            ]
            self._warden = subprocess.Popen(
                processes.warden_command(self.marker, home, self.log_files, command),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=self.launch_dir,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal is this process's to answer
            )
            self._control = ControlApi(port)
            if self._wait_until_healthy(self._warden, self._control):
                return
            # The port was taken between asking for it and using it. The warden removes the folder.
            _dismiss(self._warden, None)
            home.mkdir(mode=0o700, exist_ok=True)
        raise RunFailedError("no free port for the SuperLink after 3 tries")

    def _wait_until_healthy(self, warden: subprocess.Popen[bytes], control: ControlApi) -> bool:
        """True once it answers, False if its port was taken meanwhile."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            said = self._tail_text(_TAIL_LINES_KEPT).lower()
            if self._has_ended(warden):
                if "address already in use" in said:
                    return False
                raise RunFailedError("the SuperLink did not start\n" + self._tail_text(20))
            # Who answers may be another's SuperLink on the same port, so ours must have said that it has the port.
            if "uvicorn running on" in said and control.is_healthy():
                return True
            time.sleep(0.1)
        raise RunFailedError(f"the SuperLink was not up after {_START_TIMEOUT_S:.0f} s\n" + self._tail_text(20))

    def _has_ended(self, warden: subprocess.Popen[bytes]) -> bool:
        """True if the SuperLink is gone: the warden says so, or is itself gone."""
        return warden.poll() is not None or (self.home is not None and (self.home / processes.ENDED).exists())

    def _submit(self, home: Path) -> None:
        # A file, because the command line's KEY=VALUE form cannot carry quotes and drops what it cannot read.
        run_config = home / "run-config.toml"
        run_config.write_text(self._run_config, encoding="utf-8")
        federation = home / "federation-config.toml"
        federation.write_text(self._federation_config, encoding="utf-8")
        command = [
            *(_program("flwr"), "run", str(self.app_dir), _CONNECTION, "--format", "json"),
            *("--run-config", str(run_config), "--federation-config", str(federation)),
        ]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                cwd=self.launch_dir,
                env={**self._environment(home), processes.MARKER: self.marker},
                timeout=_SUBMIT_TIMEOUT_S,
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RunFailedError(f"`flwr run` did not answer within {_SUBMIT_TIMEOUT_S:.0f} s") from error
        answer = _last_json(done.stdout)
        if answer.get("success") is not True or not str(answer.get("run-id", "")).isdigit():
            said = answer.get("error-message") or _ANSI.sub("", done.stdout + done.stderr).strip()
            raise RunFailedError(f"`flwr run` was refused: {said}")
        self.run_id = int(answer["run-id"])
        self._answered = time.monotonic()

    def _environment(self, home: Path) -> dict[str, str]:
        environment = dict(os.environ)
        for name in ("RAY_ADDRESS", "FLWR_LOG_LEVEL", "OMP_WAIT_POLICY"):
            environment.pop(name, None)  # another cluster, and a log that hides the reason of a failure
        scripts = str(Path(_program("flwr")).parent)
        direct = ",".join(filter(None, [environment.get("NO_PROXY") or environment.get("no_proxy"), "127.0.0.1"]))
        environment |= {
            # Flower finds its own programs by name, also where the environment has not been activated.
            "PATH": os.pathsep.join([str(home / "bin"), scripts, environment.get("PATH", os.defpath)]),
            "NO_PROXY": direct,
            "no_proxy": direct,
            "PYTHONUNBUFFERED": "1",  # a crash must not take its last lines with it
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_TMPDIR": str(home),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",  # as many workers as cores: a second thread each only gets in the way
        }
        return environment | self._additions

    def _tail_text(self, lines: int) -> str:
        return "\n".join(self.log_tail(lines))


def _private_home() -> Path:
    folder = tempfile.gettempdir()
    if len(folder) > _LONGEST_TEMPORARY_FOLDER and os.access("/tmp", os.W_OK):
        folder = "/tmp"
    return Path(tempfile.mkdtemp(prefix="fmn-", dir=folder)).resolve()


def _program(name: str) -> str:
    """A console script of the environment this Python belongs to."""
    for folder in (Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))):
        if (folder / name).exists():
            return str(folder / name)
    found = shutil.which(name)
    if found is None:
        raise RefusalError(f"the program {name} is not installed", "install flwr[simulation]==1.41.0")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _furnish(home: Path, port: int) -> None:
    """The Flower configuration, and a `flwr-simulation` that comes first in PATH and keeps its output.

    Flower 1.41 discards what the simulation prints and keeps only what that itself reports in time, so the last words
    of a process that is killed would be lost.
    """
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{_CONNECTION}"\n\n'
        f'[superlink.{_CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n',
        encoding="utf-8",
    )
    script = home / "bin" / "flwr-simulation"
    script.parent.mkdir(exist_ok=True)
    program, log = shlex.quote(_program("flwr-simulation")), shlex.quote(str(home / _RUN_LOG))
    script.write_text(f'#!/bin/sh\nexec {program} "$@" >>{log} 2>&1\n', encoding="utf-8")
    script.chmod(0o700)


def _dismiss(warden: subprocess.Popen[bytes], keep_log: Path | None) -> None:
    """Close the warden's pipe, which makes it end everything, and wait for it."""
    if warden.stdin is not None:
        with contextlib.suppress(OSError):  # it may have ended already
            if keep_log is not None:
                warden.stdin.write(os.fsencode(keep_log.resolve()) + b"\0")
            warden.stdin.close()
    try:
        warden.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        warden.kill()
        warden.wait()


def _last_json(text: str) -> dict[str, Any]:
    """The JSON object at the end of a program's output, {} if there is none; notes may stand before it."""
    for start in (match.start() for match in re.finditer(r"^\s*\{", text, re.MULTILINE)):
        with contextlib.suppress(json.JSONDecodeError):
            parsed = json.loads(text[start:])
            if isinstance(parsed, dict):
                return parsed
    return {}
