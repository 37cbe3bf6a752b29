"""Clients that send the opposite of what they learned, in whole runs."""

import importlib
import sys
from pathlib import Path

import pytest
from local_grid import LocalGrid, run_all

from fedmetanas_core.config import Config
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.preflight import prepare_experiment
from fedmetanas_core.runs import begin_run, reopen_run

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sign_flip = importlib.import_module("benchmarks.sign_flip")

KEYS = {
    "num_clients": 12,
    "clients_per_round": 12,
    "num_rounds": 5,
    "local_epochs": 3,
    "init_channels": 2,
    "num_cells": 3,
    "num_nodes": 2,
    "opposed": "exclude",
}


def test_those_who_reverse_their_updates_are_named_and_left_out_also_after_a_resume(tmp_path: Path) -> None:
    experiment = prepare_experiment(Config.from_mapping(KEYS), tmp_path)
    whole = begin_run(tmp_path, "whole", experiment, tmp_path)
    run_all(whole, sign_flip.FlippingGrid(12, {2, 5}, whole.method()))
    rows = whole.folder.rounds.read()
    assert [[each["client"] for each in row["excluded"]] for row in rows] == [[2, 5]] * 5
    last = rows[-1]["excluded"]
    assert all("points against what the others have in common (-" in each["reason"] for each in last)
    again = reopen_run(whole.folder.path)
    known = again.load()[1].agreement
    assert {client for client, score in known.items() if score < 0} == {"2", "5"}
    assert len(known) == 12


def test_honest_clients_are_kept(tmp_path: Path) -> None:
    experiment = prepare_experiment(Config.from_mapping(KEYS), tmp_path)
    run = begin_run(tmp_path, "run", experiment, tmp_path)
    assert run_all(run, LocalGrid(12))["updates_excluded"] == 0


def test_it_is_refused_where_it_could_not_tell(tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match="opposed: clients_per_round=4 are too few to tell"):
        prepare_experiment(Config.from_mapping({**KEYS, "clients_per_round": 4}), tmp_path)
    with pytest.raises(RefusalError, match="opposed: whole networks are compared, and clients of fedrlnas send parts"):
        prepare_experiment(Config.from_mapping({**KEYS, "method": "fedrlnas"}), tmp_path)
