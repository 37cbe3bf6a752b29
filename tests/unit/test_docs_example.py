"""The method that the documentation adds, taken from its text, registered and run."""

import re
from pathlib import Path
from typing import Any

import pytest
from local_grid import LocalGrid

from fedmetanas_core.config import Config
from fedmetanas_core.methods.registry import METHODS
from fedmetanas_core.preflight import prepare_experiment
from fedmetanas_core.run.folder import RunFolder
from server_app.app import meet_nodes, search

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text()
FILE, LINE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_example_is_short_and_registers_in_one_line() -> None:
    assert len(FILE.splitlines()) < 60
    assert LINE.strip() == '"softmax_search": softmax_search.recipe,'


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: dict[str, Any] = {}
    exec(compile(FILE, "softmax_search.py", "exec"), module)
    monkeypatch.setitem(METHODS, "softmax_search", module["recipe"])
    keys = {"num_clients": 4, "clients_per_round": 2, "local_epochs": 1, "init_channels": 2, "num_cells": 3}
    values = {**keys, "num_nodes": 2, "num_rounds": 8, "search_fraction": 0.8, "method": "softmax_search"}
    experiment = prepare_experiment(Config.from_mapping(values), tmp_path)
    folder, grid, summary = RunFolder.create(tmp_path, "run"), LocalGrid(4), dict[str, Any]()
    search(grid, experiment, meet_nodes(grid, 4), folder, summary)  # type: ignore[arg-type]
    assert summary["one_hot"]
    assert summary["max_logit_difference"] <= 1e-5


def test_every_method_stands_in_the_table() -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE))
    assert named == set(METHODS)
