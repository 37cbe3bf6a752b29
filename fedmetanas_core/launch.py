"""One run through Flower on virtual clients, with a SuperLink of its own: prepared, started, followed, ended."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from fedmetanas_core.config import AUTO, Config
from fedmetanas_core.errors import FedMetaNASError, RefusalError
from fedmetanas_core.preflight import Experiment, pick_device, prepare_experiment
from fedmetanas_core.run.fingerprint import code_commit
from fedmetanas_core.run.folder import RunFolder, blank_summary, check_can_create, default_run_name, resolve_runs_dir
from fedmetanas_core.run.processes import available_cores
from fedmetanas_core.run.superlink import Simulation
from fedmetanas_core.space.native import build

GPU_CLIENTS = 5  # virtual clients that share a GPU at a time
POLL_S = 0.5
LOG_LINES = 12

Say = Callable[[str], None]


class Follower(Protocol):
    """Shows rows of the ledger as they come."""

    def update(self, row: Mapping[str, object]) -> None: ...


@dataclass(frozen=True)
class Launch:
    """A run that has passed all checks and has not been started."""

    app: Path
    given: dict[str, Any]
    config: Config
    experiment: Experiment
    folder: RunFolder
    launch_directory: Path


@dataclass
class Outcome:
    """How a run ended: ``status`` is completed, failed or interrupted; ``log`` the end of its log, where it has no
    folder that could hold one."""

    status: str
    reason: str
    seconds: float
    has_folder: bool
    summary: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)


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
    runs_dir = resolve_runs_dir(config.runs_dir, os.environ, launch_directory)
    run_name = config.run_name or default_run_name(config.method, config.dataset)
    check_can_create(runs_dir, run_name)  # before the data, which may have to be downloaded
    experiment = prepare_experiment(config, launch_directory)
    return Launch(app, dict(given), config, experiment, RunFolder(runs_dir / run_name), launch_directory)


def start(launch: Launch, follower: Callable[[], AbstractContextManager[Follower]], say: Say) -> Outcome:
    """Run it to its end; SIGTERM is taken as Ctrl-C. Leaves no process behind."""
    device = pick_device(launch.config)
    build.prepare(say, device)  # before anything is started
    simulation = _simulation(launch, device)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    started, folder = time.monotonic(), launch.folder
    status, reason, summary = "failed", "", dict[str, Any]()
    try:
        say("starting Flower ...")
        with simulation:
            try:
                with follower() as shown:
                    flower_status, details = _follow(simulation, folder, shown)
                summary = (folder.read_summary() or {}) if _is_ours(simulation, folder) else {}
                if flower_status == "finished:completed" and summary.get("status") == "completed":
                    status = "completed"
                reason = str(summary.get("error") or details or flower_status)
            except FedMetaNASError as error:
                reason = str(error)
            if status != "completed" and _is_ours(simulation, folder):
                simulation.keep_log = folder.path / "run.log"
    except KeyboardInterrupt:
        status, reason = "interrupted", "interrupted by the user"
    finally:
        signal.signal(signal.SIGTERM, previous)
    ours = _is_ours(simulation, folder)
    if status != "completed" and ours:
        _mark(folder, launch.experiment, status, reason)
    log = [] if status == "completed" or ours else simulation.log_tail(LOG_LINES)
    return Outcome(status, reason, time.monotonic() - started, ours, summary, log)


def _simulation(launch: Launch, device: str) -> Simulation:
    resolved, on_gpu = launch.experiment.config, device == "cuda"
    located = {"dataset": resolved.dataset, "data_root": resolved.data_root}
    placed = {"run_name": launch.folder.name, "runs_dir": str(launch.folder.path.parent)}
    return Simulation(
        launch.app,
        {**launch.given, **located, **placed},
        num_nodes=launch.config.num_clients,
        num_workers=_workers(launch.config, on_gpu),
        launch_dir=launch.launch_directory,
        gpus_per_client=1 / GPU_CLIENTS if on_gpu else 0.0,
        environment={"FEDMETANAS_COMMIT": code_commit(launch.app) or ""},
    )


def _workers(config: Config, on_gpu: bool) -> int:
    if config.workers != AUTO:
        return int(config.workers)
    if on_gpu:
        return GPU_CLIENTS
    cores, clients = available_cores(), config.clients_per_round
    # One more than there are cores where the clients do not come out even: five clients on two cores then keep both
    # busy to the end, instead of leaving one idle while the fifth works alone.
    return min(clients, cores + (clients % cores > 0))


def _is_ours(simulation: Simulation, folder: RunFolder) -> bool:
    """Whether this launch made the folder; another one may have taken its name in the meantime."""
    return folder.config_file.is_file() and folder.read_config().get("launch") == simulation.marker


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _follow(simulation: Simulation, folder: RunFolder, follower: Follower) -> tuple[str, str]:
    """Show the ledger as it grows until Flower says that the run is over; its final status."""
    shown = 0
    while True:
        status, details = simulation.status()
        rows = folder.read_rounds() if shown or _is_ours(simulation, folder) else []
        for row in rows[shown:]:
            follower.update(row)
        shown = len(rows)
        if status.startswith("finished"):
            return status, details
        time.sleep(POLL_S)


def _mark(folder: RunFolder, experiment: Experiment, status: str, reason: str) -> None:
    """Say in the run folder how the run ended, where the server could not any more."""
    known = folder.read_summary() or {}
    if known.get("status") in ("completed", "failed"):
        return
    rows = folder.read_rounds()
    totals = {key: sum(row[key] for row in rows) for key in ("uplink_bytes", "downlink_bytes", "seconds")}
    totals.update({key: rows[-1][key] for key in ("parameters", "macs")} if rows else {})
    end = {"rounds": len(rows), "status": status, "error": reason}
    folder.write_summary({**blank_summary(experiment.config), **totals, **known, **end})
