"""One run through Flower on virtual clients, with a SuperLink of its own: prepared, started, followed, ended."""

import os
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from fedmetanas_core.config import AUTO, Config
from fedmetanas_core.data.sites import NODES
from fedmetanas_core.errors import FedMetaNASError, ProcessDiedError, RefusalError, RunFailedError
from fedmetanas_core.output.report.files import show_result
from fedmetanas_core.output.tracking.session import check_trackers, how_to_install, missing_trackers, tracker_names
from fedmetanas_core.preflight import Experiment, pick_device, prepare_experiment
from fedmetanas_core.run.files import write_aside
from fedmetanas_core.run.folder import RunFolder, blank_summary, check_can_create, default_run_name, resolve_runs_dir
from fedmetanas_core.run.ownership import LAUNCHER, PREDECESSOR_S, WRITER, OwnedError, is_owned, owned
from fedmetanas_core.run.processes import available_cores
from fedmetanas_core.run.superlink import Simulation
from fedmetanas_core.runs import Run, begin_run, going_on, reopen_run
from fedmetanas_core.space.native import build

GPU_CLIENTS = 5  # virtual clients that share a GPU at a time
POLL_S = 0.5
LOG_LINES = 12
HANGS_S = 60.0
PROBE_BYTES = 1 << 16  # a summary is smaller
GONE_S = 5.0  # between the end of a server's work and Flower's word of it
CLUSTER_TIMEOUT_S = 5.0
RESTARTS = 3  # of a run whose processes died; a cause that has not gone by then will not
INTERRUPTED = "interrupted by the user"

Say = Callable[[str], None]


class Follower(Protocol):
    """Shows rows of the ledger as they come."""

    def update(self, row: Mapping[str, object]) -> None: ...


@dataclass(frozen=True)
class Launch:
    """A run that has passed all checks and has not been started; ``run`` is there if it only goes on."""

    app: Path
    config: Config
    experiment: Experiment
    folder: RunFolder
    launch_directory: Path
    run: Run | None = None


@dataclass
class Outcome:
    """How a run ended: ``status`` is completed, failed or interrupted; ``log`` the end of its log, where that says more
    than the reason. ``restart``: whether it can be hoped to go on by itself from its last state."""

    status: str
    reason: str
    seconds: float
    summary: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    restart: bool = False


def app_directory() -> Path:
    """The folder with pyproject.toml that Flower runs."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file() or not (root / "flwr.toml").is_file():
        raise RefusalError(
            f"{root} does not hold the Flower app", "install it from its source folder: pip install -e ."
        )
    return root


def prepare_launch(given: Mapping[str, Any], launch_directory: Path) -> Launch:
    """Check everything that can be checked beforehand; raises RefusalError."""
    app, config = app_directory(), Config.from_mapping(given)
    if config.resume:
        run = reopen_run(launch_directory / Path(config.resume).expanduser())
        if run.experiment.on_nodes:
            raise RefusalError(
                f"{run.folder.path} is a run on real machines",
                f"go on with it by `flwr run . CONNECTION --run-config \"resume='{run.folder.path}'\"`",
            )
        own = run.experiment.config
        there = replace(own, ray_address=config.ray_address or own.ray_address)  # the cluster of before may be gone
        return Launch(app, there, run.experiment, run.folder, launch_directory, run)
    if config.dataset == NODES:
        raise RefusalError(
            "dataset: nodes stands for the images of real machines", "start it with `flwr run` (docs/deployment.md)"
        )
    check_trackers(config.track)
    runs_dir = resolve_runs_dir(config.runs_dir, os.environ, launch_directory)
    run_name = config.run_name or default_run_name(config.method, config.dataset)
    check_can_create(runs_dir, run_name)  # before the data, which may have to be downloaded
    experiment = prepare_experiment(config, launch_directory)
    return Launch(app, config, experiment, RunFolder(runs_dir / run_name), launch_directory)


def start(launch: Launch, follower: Callable[[], AbstractContextManager[Follower]], say: Say) -> Outcome:
    """Run it to its end; SIGTERM and the end of its terminal are taken as Ctrl-C. Leaves no process behind.

    A run whose workers or server died goes on from its last state, at most RESTARTS times. Raises RefusalError if its
    folder cannot be made, or somebody else works in it.
    """
    device = pick_device(launch.config)
    if launch.config.ray_cluster:
        check_cluster(launch.config.ray_cluster, launch.run is not None)
    build.prepare(say, device)  # before anything is started
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGTERM, _interrupt)
    if previous[signal.SIGHUP] != signal.SIG_IGN:  # nohup wants it to go on
        signal.signal(signal.SIGHUP, _hang_up)
    started, folder = time.monotonic(), launch.folder
    try:
        run = launch.run or begin_run(folder.path.parent, folder.name, launch.experiment, launch.app)
        with _sole_launcher(folder):
            # Of a run that goes on; a new one has been refused.
            for name in missing_trackers(tracker_names(launch.config.track)):
                say(f"note: track: {name} is not installed here ({how_to_install(name)}): the run goes on without it")
            for attempt in range(RESTARTS + 1):
                outcome = _session(launch, run, device, follower, say)
                if not outcome.restart or attempt == RESTARTS:
                    break
                say(f"{outcome.reason}; going on from the last state, restart {attempt + 1} of {RESTARTS}")
    except KeyboardInterrupt:  # before the first session, or between two
        outcome = Outcome("interrupted", INTERRUPTED, 0.0)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    outcome.seconds = time.monotonic() - started
    return outcome


@contextmanager
def _sole_launcher(folder: RunFolder) -> Iterator[None]:
    """Nobody else may start this run meanwhile, and whoever last wrote in its folder has ended."""
    try:
        with owned(folder.path, LAUNCHER):
            with owned(folder.path, WRITER, patience_s=PREDECESSOR_S):
                pass  # its server takes this one
            yield
    except OwnedError as error:
        raise RefusalError(str(error), "wait for it, or end it") from error


def _session(
    launch: Launch, run: Run, device: str, follower: Callable[[], AbstractContextManager[Follower]], say: Say
) -> Outcome:
    """One SuperLink from its start to its end, on a run that goes on from its last state."""
    folder, simulation = run.folder, _simulation(launch, device)
    going_on(run)
    status, reason, restart, summary, log = "failed", "", False, dict[str, Any](), list[str]()
    had_ended = False
    try:
        say("starting Flower ...")
        with simulation:
            try:
                with follower() as shown:
                    flower_status, details = _follow(simulation, folder, shown)
                summary = folder.read_summary() or {}
                if flower_status == "finished:completed" and summary.get("status") == "completed":
                    status = "completed"
                reason = str(summary.get("error") or details or flower_status)
                restart = bool(summary.get("restart"))
            except FedMetaNASError as error:
                reason, restart = str(error), isinstance(error, ProcessDiedError)
            except KeyboardInterrupt:
                had_ended = folder.read_summary() is not None
                raise
            if status != "completed":
                simulation.keep_log = folder.path / "run.log"
                log = simulation.log_tail(LOG_LINES)
    except KeyboardInterrupt:
        summary = folder.read_summary() or {}
        # A server that is being ended may meet a worker that has been, and call that a failure.
        had_ended |= summary.get("status") == "completed"
        status, reason = (summary["status"], summary.get("error") or "") if had_ended else ("interrupted", INTERRUPTED)
        restart = False
    except (FedMetaNASError, OSError) as error:  # while Flower starts or ends
        if status == "completed":
            say(f"note: {error}")
        reason, restart = reason or str(error), restart or isinstance(error, ProcessDiedError)
    if status != "completed":
        try:
            _mark(folder, launch.experiment, status, reason)
        except (RunFailedError, OSError) as error:  # a full disk, which may be the reason of it all
            reason = f"{reason}; {error}"
    return Outcome(status, reason, 0.0, summary, [] if summary.get("error") else log, restart)


def _simulation(launch: Launch, device: str) -> Simulation:
    on_gpu, address = device == "cuda", launch.config.ray_cluster
    return Simulation(
        launch.app,
        {"resume": str(launch.folder.path)},
        num_nodes=launch.config.num_clients,
        num_workers=None if address else worker_count(launch.config, on_gpu),
        launch_dir=launch.launch_directory,
        gpus_per_client=1 / GPU_CLIENTS if on_gpu else 0.0,
        environment={"RAY_ADDRESS": address} if address else {},
    )


def check_cluster(address: str, goes_on: bool) -> None:
    """RefusalError unless somebody answers there: Flower would wait, and not say for what."""
    elsewhere = ", or give ray_address=HOST:PORT (none: this machine) beside resume" if goes_on else ""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CLUSTER_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise RefusalError(
            f"ray_address: no Ray cluster answers at {address!r} ({error})",
            f"start one with `ray start --head`{elsewhere}",
        ) from error


def worker_count(config: Config, on_gpu: bool) -> int:
    """How many clients work side by side on this machine."""
    if config.workers != AUTO:
        return int(config.workers)
    if on_gpu:
        return GPU_CLIENTS
    cores, clients = available_cores(), config.clients_per_round
    # One more than there are cores where the clients do not come out even: five clients on two cores then keep both
    # busy to the end, instead of leaving one idle while the fifth works alone.
    return min(clients, cores + (clients % cores > 0))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _hang_up(number: int, frame: FrameType | None) -> None:
    """The terminal has gone: whatever is still to be said goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):  # one that has hung up is no tty any more
            os.dup2(nowhere, stream)
    os.close(nowhere)
    raise KeyboardInterrupt


def _follow(simulation: Simulation, folder: RunFolder, follower: Follower) -> tuple[str, str]:
    """Show the ledger as it grows until Flower says that the run is over; its final status.

    A server that was killed is noticed by the lock that it no longer holds: Flower would take a minute.
    """
    place, began, silent_since = folder.rounds.after(0)[1], False, time.monotonic()
    while True:
        status, details = simulation.status()
        rows, place = folder.rounds.after(place)
        for row in rows:
            follower.update(row)
        if is_owned(folder.path, WRITER):
            began, silent_since = True, time.monotonic()
        ended = status.startswith("finished")
        silent_s = time.monotonic() - silent_since
        began |= "heartbeat" in details.lower()  # Flower's word for the same, also before it began
        if began and (ended or silent_s > GONE_S) and folder.read_summary() is None:  # it leaves one, if it can
            raise _without_a_word(folder)
        if ended:
            return status, details
        if began and silent_s > HANGS_S:  # its work is done; Ray or Flower does not come to an end
            own = str((folder.read_summary() or {}).get("status"))
            return f"finished:{own}", f"Flower did not end within {HANGS_S:g} s of the server"
        time.sleep(POLL_S)


def _without_a_word(folder: RunFolder) -> RunFailedError:
    """What it means that a server has gone and left no summary."""
    try:
        write_aside(folder.path / "probe", bytes(PROBE_BYTES)).unlink()
    except (RunFailedError, OSError) as error:
        return RunFailedError(f"the run's server has gone without a word; {error}")
    return ProcessDiedError("the run's server process was killed")


def _mark(folder: RunFolder, experiment: Experiment, status: str, reason: str) -> None:
    """Say in the run folder how the run ended, where the server could not any more."""
    known = folder.read_summary() or {}
    if known.get("status") == "completed" or known.get("status") == status == "failed":
        return
    rows = folder.rounds.read()
    totals = {key: sum(row[key] for row in rows) for key in ("uplink_bytes", "downlink_bytes", "seconds")}
    totals.update({key: rows[-1][key] for key in ("parameters", "macs")} if rows else {})
    end = {"rounds": len(rows), "status": status, "error": reason}
    folder.write_summary({**blank_summary(experiment.config), **totals, **known, **end})
    show_result(folder)
