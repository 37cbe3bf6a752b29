"""A run from its first round to its summary, in this process."""

from pathlib import Path
from typing import Any

from local_grid import LocalGrid, run_all

from fedmetanas_core.config import Config
from fedmetanas_core.preflight import prepare_experiment
from fedmetanas_core.runs import begin_run

SMALL = {"num_clients": 6, "clients_per_round": 2, "num_rounds": 6, "local_epochs": 1, "init_channels": 2}


def finished_run(runs_dir: Path, name: str = "run", **keys: Any) -> Path:
    """The folder of a run of six clients and six rounds on digits."""
    experiment = prepare_experiment(Config.from_mapping({**SMALL, "num_nodes": 2, **keys}), runs_dir)
    run = begin_run(runs_dir, name, experiment, runs_dir)
    summary = run_all(run, LocalGrid(6))
    run.folder.write_summary({**summary, "status": "completed"})
    return run.folder.path
