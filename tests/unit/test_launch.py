"""What the launching command makes of the ends that a session can come to; Flower itself is stood in for."""

import os
import pty
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from fedmetanas_core import launch
from fedmetanas_core.errors import RefusalError, RunFailedError
from fedmetanas_core.launch import Outcome, prepare_launch, start
from fedmetanas_core.output.tracking import session
from fedmetanas_core.run.folder import RunFolder
from fedmetanas_core.run.ownership import WRITER, owned
from fedmetanas_core.runs import begin_run

SMALL = {"num_clients": 2, "clients_per_round": 2, "num_rounds": 3, "init_channels": 2, "num_nodes": 2, "run_name": "r"}


class Session:
    """A simulation that ends as its script says: a function of the run folder, called at the second question."""

    scripts: Iterator[Callable[[RunFolder, ExitStack], tuple[str, str]]]

    def __init__(self, app: Path, run_config: dict[str, Any], **settings: Any) -> None:
        self.folder, self.keep_log, self.held = RunFolder(Path(run_config["resume"])), None, ExitStack()

    def __enter__(self) -> "Session":
        self.script = next(type(self).scripts)
        self.held.enter_context(owned(self.folder.path, WRITER))
        self.questions = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.held.close()

    def status(self) -> tuple[str, str]:
        self.questions += 1
        return ("running", "") if self.questions < 2 else self.script(self.folder, self.held)

    def log_tail(self, lines: int = 30) -> list[str]:
        return ["last words"]


def completes(folder: RunFolder, held: ExitStack) -> tuple[str, str]:
    folder.write_summary({"status": "completed", "test_accuracy": 0.5})
    return "finished:completed", ""


def loses_a_worker(folder: RunFolder, held: ExitStack) -> tuple[str, str]:
    folder.write_summary({"status": "failed", "error": "a Ray worker died", "restart": True})
    return "finished:failed", ""


def meets_an_error(folder: RunFolder, held: ExitStack) -> tuple[str, str]:
    folder.write_summary({"status": "failed", "error": "no client answered", "restart": False})
    return "finished:failed", ""


def is_killed(folder: RunFolder, held: ExitStack) -> tuple[str, str]:
    held.close()  # its lock goes with it; Flower has not noticed yet
    return "running", ""


def is_killed_at_its_start(folder: RunFolder, held: ExitStack) -> tuple[str, str]:
    held.close()
    return "finished:failed", "No heartbeat received from the task"


def is_interrupted(folder: RunFolder, held: ExitStack) -> tuple[str, str]:
    raise KeyboardInterrupt


def is_interrupted_when_done(folder: RunFolder, held: ExitStack) -> tuple[str, str]:
    completes(folder, held)
    raise KeyboardInterrupt


def is_interrupted_after_a_failure(folder: RunFolder, held: ExitStack) -> tuple[str, str]:
    meets_an_error(folder, held)
    raise KeyboardInterrupt


def is_interrupted_and_loses_a_worker_by_that(folder: RunFolder, held: ExitStack) -> tuple[str, str]:
    held.callback(loses_a_worker, folder, held)  # while everything is being ended
    raise KeyboardInterrupt


class Silent:
    def update(self, row: object) -> None:
        pass


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *scripts: Any) -> tuple[Outcome, list[str], int]:
    Session.scripts = iter(scripts)
    monkeypatch.setattr(launch, "Simulation", Session)
    monkeypatch.setattr(launch, "POLL_S", 0.01)
    monkeypatch.setattr(launch, "GONE_S", 0.05)
    said: list[str] = []
    outcome = start(prepare_launch(SMALL, tmp_path), lambda: nullcontext(Silent()), said.append)
    return outcome, said, len(list(Session.scripts))


@pytest.mark.parametrize("fault", [loses_a_worker, is_killed, is_killed_at_its_start])
def test_a_run_whose_processes_die_goes_on_by_itself(
    fault: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, said, left = run(tmp_path, monkeypatch, fault, fault, fault, completes)
    assert (outcome.status, left) == ("completed", 0)
    assert sum("going on from the last state" in line for line in said) == 3
    assert "restart 3 of 3" in said[-2]


def test_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, _, left = run(tmp_path, monkeypatch, *[loses_a_worker] * 4, completes)
    assert (outcome.status, outcome.reason, left) == ("failed", "a Ray worker died", 1)


def test_what_going_on_would_not_mend_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, _, left = run(tmp_path, monkeypatch, meets_an_error, completes)
    assert (outcome.status, outcome.reason, outcome.log, left) == ("failed", "no client answered", [], 1)


@pytest.mark.parametrize(
    ("script", "status", "reason"),
    [
        (is_interrupted, "interrupted", launch.INTERRUPTED),
        (is_interrupted_and_loses_a_worker_by_that, "interrupted", launch.INTERRUPTED),
        (is_interrupted_after_a_failure, "failed", "no client answered"),
        (is_interrupted_when_done, "completed", ""),
    ],
)
def test_an_interrupted_run_is_marked_so_and_one_that_had_ended_is_not(
    script: Callable[..., Any], status: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, _, _ = run(tmp_path, monkeypatch, script)
    assert (outcome.status, outcome.reason) == (status, reason)
    summary = RunFolder(tmp_path / "runs" / "r").read_summary() or {}
    assert (summary["status"], summary.get("error") or "") == (status, reason)


def test_the_folder_is_whole_before_flower_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str]] = []

    def looks(folder: RunFolder, held: ExitStack) -> tuple[str, str]:
        seen.append((len(list(folder.checkpoint_directory.glob("*.safetensors"))), folder.read_config()["method"]))
        return completes(folder, held)

    run(tmp_path, monkeypatch, looks)
    assert seen == [(1, "fedmetanas")]


def test_a_run_goes_on_where_its_tracker_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = prepare_launch({**SMALL, "track": "wandb"}, tmp_path)
    begin_run(begun.folder.path.parent, "r", begun.experiment, begun.app)
    monkeypatch.setattr(session, "find_spec", lambda name: None)
    monkeypatch.setattr(launch, "Simulation", Session)
    Session.scripts, said = iter([completes]), list[str]()
    again = prepare_launch({"resume": str(begun.folder.path)}, tmp_path)
    assert start(again, lambda: nullcontext(Silent()), said.append).status == "completed"
    assert said[0] == 'note: track: wandb is not installed here (pip install -e ".[wandb]"): the run goes on without it'
    with pytest.raises(RefusalError, match=r"track: wandb is not installed; pip install"):
        prepare_launch({**SMALL, "run_name": "new", "track": "wandb"}, tmp_path)


def test_a_run_begun_on_a_cluster_that_is_gone_goes_on_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = prepare_launch({**SMALL, "ray_address": "127.0.0.1:1"}, tmp_path)
    begin_run(begun.folder.path.parent, "r", begun.experiment, begun.app)
    settings: list[dict[str, Any]] = []

    class Here(Session):
        def __init__(self, app: Path, run_config: dict[str, Any], **given: Any) -> None:
            settings.append(given)
            super().__init__(app, run_config)

    Here.scripts = iter([completes])
    monkeypatch.setattr(launch, "Simulation", Here)
    again = {"resume": str(begun.folder.path)}
    with pytest.raises(RefusalError, match=r"no Ray cluster answers at .127\.0\.0\.1:1.*or give ray_address"):
        start(prepare_launch(again, tmp_path), lambda: nullcontext(Silent()), print)
    here = prepare_launch({**again, "ray_address": "none"}, tmp_path)
    assert start(here, lambda: nullcontext(Silent()), print).status == "completed"
    assert [each["environment"] for each in settings] == [{}]
    assert settings[0]["num_workers"] >= 1
    assert begun.folder.read_config()["ray_address"] == "127.0.0.1:1"


class Broken(Session):
    """Flower that does not start."""

    error: Exception = RunFailedError("the SuperLink was not up after 180 s")

    def __enter__(self) -> "Session":
        raise self.error


@pytest.mark.parametrize("error", [Broken.error, OSError(28, "No space left on device")])
def test_a_flower_that_does_not_start_is_a_failure_with_its_reason(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broken, "error", error)
    monkeypatch.setattr(launch, "Simulation", Broken)
    outcome = start(prepare_launch(SMALL, tmp_path), lambda: nullcontext(Silent()), print)
    assert (outcome.status, outcome.reason) == ("failed", str(error))
    assert (RunFolder(tmp_path / "runs" / "r").read_summary() or {})["error"] == str(error)


def test_a_flower_that_hangs_after_its_servers_end_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def completes_and_hangs(folder: RunFolder, held: ExitStack) -> tuple[str, str]:
        completes(folder, held)
        held.close()
        return "running", ""

    monkeypatch.setattr(launch, "HANGS_S", 0.2)
    outcome, _, _ = run(tmp_path, monkeypatch, completes_and_hangs)
    assert outcome.status == "completed"


def test_a_server_that_could_not_write_was_not_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_out_of_room(*_: object) -> Path:
        raise RunFailedError("cannot write: No space left on device")

    monkeypatch.setattr(launch, "write_aside", is_out_of_room)
    outcome, _, left = run(tmp_path, monkeypatch, is_killed, completes)
    assert (outcome.status, left) == ("failed", 1), "going on would not mend it"
    assert "gone without a word; cannot write: No space left on device" in outcome.reason


def test_a_terminal_that_goes_away_interrupts_the_run(tmp_path: Path) -> None:
    """What is printed afterwards goes nowhere, and does no harm."""
    program = f"""
import signal, time
from pathlib import Path
from fedmetanas_core.launch import _hang_up
signal.signal(signal.SIGHUP, _hang_up)
try:
    print("up", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("down", flush=True)
    Path({str(tmp_path / "told")!r}).touch()
"""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", program])
    while b"up" not in os.read(terminal, 1024):
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "told").exists()
