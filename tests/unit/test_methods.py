"""Every method, whole: a run through strategy, wire and client app, and what travels and stays meanwhile."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from flwr.app import Message
from local_grid import LocalGrid, run_all

from client_app.state import memory_of
from fedmetanas_core.config import Config
from fedmetanas_core.errors import FedMetaNASError
from fedmetanas_core.federation.wire import ARRAYS, MASKS
from fedmetanas_core.methods.registry import METHODS, make_method
from fedmetanas_core.preflight import Experiment, prepare_experiment
from fedmetanas_core.run.folder import FIGURES, RunFolder
from fedmetanas_core.runs import begin_run
from fedmetanas_core.space.models import layouts
from fedmetanas_core.space.network import load_network
from fedmetanas_core.space.parts import part_layout

SMALL = {
    "num_clients": 5,
    "unseen_clients": 1,
    "clients_per_round": 2,
    "num_rounds": 4,
    "local_epochs": 2,
    "init_channels": 2,
    "num_cells": 3,
    "num_nodes": 2,
    "evaluate_every": 2,
    "samples_per_client": 40,
    "fedpnas_samples": 2,
}
CONTINUE = ("fedpnas", "meta_fedpnas")  # their stages are one and the same network's
FIXED = ("fedavg", "per_fedavg", "fedrep", "fedbabu", "fine_tuning")
# (part of the weights that goes down, part that comes back, whether alphas travel, what the client keeps)
TRAVELS: dict[str, tuple[str, str, bool, set[str]]] = {
    "fedmetanas": ("all", "all", True, set()),
    "fedavg": ("all", "all", False, set()),
    "fine_tuning": ("all", "all", False, set()),
    "per_fedavg": ("all", "all", False, set()),
    "fedrep": ("body", "all", False, {"weights", "statistics"}),
    "fedbabu": ("body", "body", False, set()),
    "fednas": ("all", "all", True, set()),
    "feddsnas": ("all", "touched", True, set()),
    "fedrlnas": ("subnet", "subnet", False, set()),
    "fedpnas": ("all", "all", True, set()),
    "perfedrlnas": ("subnet", "subnet", False, set()),
    "meta_fedpnas": ("all", "touched", True, {"operation_mask", "input_mask"}),
    "meta_perfedrlnas": ("subnet", "subnet", False, set()),
    "meta_dnas": ("all", "all", True, set()),
    "local_darts": (
        "none",
        "none",
        False,
        {"weights", "statistics", "operation_mask", "input_mask", "operation_logits", "input_logits", "stage"},
    ),
    "random_search": ("all", "all", False, set()),
}


def run(tmp_path: Path, method: str, **values: Any) -> tuple[Experiment, RunFolder, LocalGrid, dict[str, Any]]:
    experiment = prepare_experiment(Config.from_mapping({**SMALL, "method": method, **values}), tmp_path)
    begun, grid = begin_run(tmp_path, "run", experiment, tmp_path), LocalGrid(experiment.config.num_clients)
    return experiment, begun.folder, grid, run_all(begun, grid)


def trainings(grid: LocalGrid) -> list[tuple[Message, Message]]:
    return [pair for pair in grid.sent if pair[0].metadata.message_type == "train"]


def floats(message: Message, name: str) -> int:
    arrays = message.content.array_records[ARRAYS]
    return arrays[name].numpy().size if name in arrays else 0


def test_every_registered_method_is_expected_here() -> None:
    assert set(TRAVELS) == set(METHODS)


@pytest.mark.parametrize("method", sorted(TRAVELS))
def test_a_whole_run_and_what_travels(method: str, tmp_path: Path) -> None:
    experiment, folder, grid, summary = run(tmp_path, method)
    check_messages(experiment, grid, method)
    check_result(folder, summary, method)


def check_messages(experiment: Experiment, grid: LocalGrid, method: str) -> None:
    down, up, alphas, kept = TRAVELS[method]
    engine = make_method(experiment.config, experiment.spec)
    spec = engine.recipe.stages[0].space
    state = engine.initial_state()
    whole = layouts(spec, state.architecture.operation_mask)
    sent, reply = trainings(grid)[0]
    for index, name in enumerate(("w/weights", "w/statistics")):
        if down in ("all", "body", "none"):
            assert floats(sent, name) == part_layout(whole[index], down, spec).size
        if up in ("all", "body", "none"):
            assert floats(reply, name) == part_layout(whole[index], up, spec).size
    if down == "subnet":
        mask = torch.from_numpy(sent.content.array_records[MASKS]["operations"].numpy()).bool()
        assert bool((mask.sum(-1) == 1).all())
        subnet = layouts(spec, mask)
        assert floats(sent, "w/weights") == floats(reply, "w/weights") == subnet[0].size < whole[0].size / 2
    if up == "touched":
        touched = torch.from_numpy(reply.content.array_records[ARRAYS]["t/operations"].numpy()).bool()
        assert floats(reply, "w/weights") == layouts(spec, touched)[0].size
    for message in (sent, reply):
        assert (floats(message, "a/operation_logits") > 0) == alphas
        names = set(message.content.array_records[ARRAYS])
        assert names <= {"w/weights", "w/statistics", "a/operation_logits", "a/input_logits", "t/operations"}
    trained = {pair[0].metadata.dst_node_id - 1000 for pair in trainings(grid)}
    assert 4 not in trained, "an unseen client trains"
    for client in trained:
        assert set(memory_of(grid.kept(client))) == kept
    assert grid.kept(4) == {}


def check_result(folder: RunFolder, summary: dict[str, Any], method: str) -> None:
    rows = folder.rounds.read()
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    measured = set(FIGURES) - {"rounds", "status", "seconds", "genotype", "test_accuracy_supernet"}
    without_global = {"max_logit_difference"}
    for name in measured - without_global:
        assert summary[name] is not None, name
    assert 0.0 <= summary["test_accuracy"] <= 1.0
    for key in ("client_accuracy_mean", "client_accuracy_adapted_mean", "unseen_client_accuracy_mean"):
        assert 0.0 <= summary[key] <= 1.0
    assert len(summary["client_accuracy"]) == 4
    assert len(summary["unseen_client_accuracy"]) == 1
    kept = [row for row in rows if row["stage"] == rows[-1]["stage"] or method in CONTINUE]
    if method != "local_darts":
        regular = [row["test_accuracy"] for row in kept if row["round"] % 2 == 0]
        assert summary["test_accuracy_last_evaluations"] == pytest.approx(fmean(regular))
        check_cost(folder, summary)
    clients = folder.model_directory / "clients"
    if method in FIXED:
        assert summary["test_accuracy_supernet"] is summary["max_logit_difference"] is None
        assert summary.get("genotype") is None
        assert summary["macs"] > 0
    elif method != "local_darts":
        assert summary["genotype"] is not None
        assert json.loads((folder.model_directory / "genotype.json").read_text())["genotype"] == summary["genotype"]
    if method in ("fedpnas", "perfedrlnas", "meta_fedpnas", "meta_perfedrlnas", "meta_dnas", "local_darts"):
        assert sorted(int(path.name) for path in clients.iterdir()) == [0, 1, 2, 3, 4]
        network, _ = load_network(clients / "3")
        assert network(torch.rand(1, 1, 8, 8)).shape == (1, 10)
    else:
        assert not clients.exists()
    if method == "local_darts":
        with pytest.raises(FedMetaNASError, match=r"its clients have their own, such as .*/model/clients/0"):
            load_network(folder.path)
    else:
        network, _ = load_network(folder.path)
        assert network(torch.rand(1, 1, 8, 8)).shape == (1, 10)  # a batch of one


def check_cost(folder: RunFolder, summary: dict[str, Any]) -> None:
    """The summary's size is that of the network that lies in the folder."""
    network, _ = load_network(folder.path)
    assert summary["parameters"] == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("method", sorted(set(TRAVELS) - set(FIXED)))
@pytest.mark.parametrize("rounds", [1, 2])
def test_the_shortest_runs(method: str, rounds: int, tmp_path: Path) -> None:
    _, folder, _, summary = run(tmp_path, method, num_rounds=rounds, samples_per_client=4)
    assert len(folder.rounds.read()) == rounds
    assert 0.0 <= summary["test_accuracy"] <= 1.0


@pytest.mark.parametrize("method", ["fedmetanas", "fedrlnas", "fedpnas", "meta_dnas", "fednas"])
def test_the_same_seed_gives_the_same_network(method: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run(tmp_path / name, method, num_rounds=3)
    first, second = (tmp_path / name / "run/model/weights.safetensors" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
