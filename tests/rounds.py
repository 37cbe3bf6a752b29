"""Small runs round by round, for tests: prepared, with their loop, and one exchange of messages."""

from pathlib import Path
from typing import Any

from flwr.app import Message
from local_grid import LocalGrid, identity_of

from fedmetanas_core.config import Config
from fedmetanas_core.preflight import prepare_experiment
from fedmetanas_core.runs import Run, begin_run
from server_app.courier import Courier
from server_app.loop import RoundLoop
from server_app.roster import Roster
from server_app.strategy import SearchStrategy

SMALL = {
    "num_clients": 6,
    "clients_per_round": 2,
    "local_epochs": 1,
    "init_channels": 2,
    "num_cells": 3,
    "num_nodes": 2,
    "evaluate_every": 2,
    "search_fraction": 0.8,
}


def prepare(tmp_path: Path, **values: Any) -> tuple[Run, LocalGrid]:
    experiment = prepare_experiment(Config.from_mapping({**SMALL, **values}), tmp_path)
    return begin_run(tmp_path, "run", experiment, tmp_path), LocalGrid(experiment.config.num_clients)


def exchanged(grid: LocalGrid, messages: Any) -> list[Message]:
    return Courier(grid).exchange(messages, 60)  # type: ignore[arg-type]


def make_loop(run: Run, grid: Any) -> RoundLoop:
    config, method = run.experiment.config, run.method()
    nodes = {client: 1000 + client for client in range(config.num_clients)}
    strategy = SearchStrategy(method, method.initial_state(), nodes, identity_of(run), config)
    return RoundLoop(strategy, run.experiment, Roster(Courier(grid), config, virtual=True), run.folder)
