"""Whole runs on nodes that have their own images, in this process."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deployment import digit_folders
from flwr.app import Message, RecordDict
from local_grid import HANDLERS, LocalGrid

from client_app import data_source
from client_app.state import STATE_PATH
from fedmetanas_core.config import Config
from fedmetanas_core.errors import RefusalError, RunFailedError
from fedmetanas_core.output.tracking.session import Tracking
from fedmetanas_core.preflight import prepare_experiment, with_agreement
from fedmetanas_core.runs import begin_run, reopen_run
from fedmetanas_core.space.latency import Latencies
from fedmetanas_core.space.network import load_network
from fedmetanas_core.space.spec import SpaceSpec
from server_app.app import search
from server_app.courier import Courier
from server_app.limits import fit_to_nodes
from server_app.roster import Roster

HELD_OUT = 18  # a fifth of eight, rounded, of nine classes
SMALL = {
    "dataset": "nodes",
    "num_clients": 3,
    "clients_per_round": 3,
    "num_rounds": 3,
    "local_epochs": 1,
    "init_channels": 2,
    "num_cells": 3,
    "num_nodes": 2,
    "evaluate_every": 1,
}


class SiteGrid(LocalGrid):
    """Three nodes with class folders of their own and no partition ids."""

    def __init__(self, root: Path, limits: dict[int, dict[str, Any]] | None = None) -> None:
        super().__init__(3)
        self.root, self.limits = root, limits or {}
        for site in range(3):
            if not (root / f"site{site}").exists():
                digit_folders(root / f"site{site}", site, 3, each=8, without=[site])

    def replies(self, messages: list[Message]) -> list[Message]:  # type: ignore[override]
        found = []
        for message in messages:
            site = self.client_of(message.metadata.dst_node_id)
            own = {"name": f"s{site}", "data-path": str(self.root / f"site{site}"), STATE_PATH: str(self.root / "kept")}
            own |= self.limits.get(site, {})
            context = SimpleNamespace(node_config=own, state=RecordDict())
            found.append(HANDLERS[message.metadata.message_type](message, context))
        return found


def gathered(grid: LocalGrid, config: Config, members: Any = None) -> Roster:
    roster = Roster(Courier(grid), config, virtual=False, members=members)  # type: ignore[arg-type]
    roster.gather()
    return roster


@pytest.mark.parametrize("method", ["fedmetanas", "perfedrlnas", "local_darts", "fedavg"])
@pytest.mark.parametrize("at_server", [False, True])
def test_a_run_on_nodes_ends_with_what_they_hold_out_as_its_measure(
    method: str, at_server: bool, tmp_path: Path
) -> None:
    grid = SiteGrid(tmp_path)
    measured = {"test_data": str(digit_folders(tmp_path / "measure", 5, 9, each=4))} if at_server else {}
    roster = gathered(grid, Config.from_mapping({**SMALL, "method": method, **measured}))
    experiment = prepare_experiment(with_agreement(roster.config, roster.agreement), tmp_path)
    roster.config = experiment.config
    assert experiment.dataset.class_names == tuple("0123456789")
    run = begin_run(tmp_path / "runs", "run", experiment, tmp_path)
    summary: dict[str, Any] = {}
    search(roster, run, summary, Tracking(run.folder, "", tmp_path))
    right = [share * HELD_OUT for share in summary["client_accuracy"]]
    assert right == pytest.approx([round(each) for each in right])
    assert 0.0 <= summary["test_accuracy"] <= 1.0
    if not at_server and method in ("fedmetanas", "fedavg"):
        assert summary["test_accuracy"] == pytest.approx(sum(right) / (3 * HELD_OUT))
    rows = run.folder.rounds.read()
    assert [row["clients"] for row in rows] == [[0, 1, 2]] * 3
    assert all(row["excluded"] == [] for row in rows)
    assert (rows[-1]["test_accuracy"] is None) == (not at_server or method == "local_darts")
    if method == "fedmetanas":
        assert summary["max_logit_difference"] <= 1e-5
        assert (summary["test_accuracy_supernet"] is None) == (not at_server)

    # The run goes on, with the same numbers, from what its folder says; the nodes are asked anew.
    again = reopen_run(run.folder.path)
    members = Roster.from_list(again.load()[1].roster)
    assert [members[client].name for client in range(3)] == ["s0", "s1", "s2"]
    assert gathered(SiteGrid(tmp_path), again.experiment.config, members).nodes == roster.nodes


def searched(tmp_path: Path, method: str, limits: dict[int, dict[str, Any]]) -> tuple[Config, dict[str, Any], Path]:
    """A whole run on nodes that limit what a network may cost there; its configuration, summary and folder."""
    roster = gathered(SiteGrid(tmp_path, limits), Config.from_mapping({**SMALL, "method": method, "num_nodes": 3}))
    experiment = prepare_experiment(with_agreement(roster.config, roster.agreement), tmp_path)
    experiment = fit_to_nodes(experiment, roster)
    roster.config, roster.begun = experiment.config, True
    run = begin_run(tmp_path / "runs", "run", experiment, tmp_path)
    summary: dict[str, Any] = {}
    search(roster, run, summary, Tracking(run.folder, "", tmp_path))
    return experiment.config, summary, run.folder.path


def test_one_network_for_all_keeps_to_what_the_poorest_node_allows(tmp_path: Path) -> None:
    limits = {0: {"max-parameters": 900}, 2: {"max-parameters": 1200, "max-macs": 40000.0}}
    config, summary, _ = searched(tmp_path, "fedmetanas", limits)
    assert (config.max_parameters, config.max_macs) == (900, 40000)
    assert summary["budget"]["max_parameters"] == {"limit": 900.0, "spent": summary["parameters"], "met": True}
    assert summary["budget"]["max_macs"]["met"]
    assert [member["limits"] for member in summary["nodes"]] == [
        {"max_parameters": 900.0},
        {},
        {"max_macs": 40000.0, "max_parameters": 1200.0},
    ]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[SpaceSpec]:
    """The spaces whose latencies nodes were asked for; they answer 5 ms and whole milliseconds an operation."""
    asked = []

    def slow(spec: SpaceSpec) -> Latencies:
        asked.append(spec)
        cell = (tuple(float(operation) for operation in range(8)), (2.0,) * 8)
        return Latencies(5.0, (cell,) * spec.num_cells)

    monkeypatch.setattr(data_source, "measure_latencies", slow)
    return asked


def limited(tmp_path: Path, limits: dict[int, dict[str, Any]], **keys: Any) -> Config:
    """The configuration of a run with limits of its own, once it has met nodes with theirs."""
    roster = gathered(SiteGrid(tmp_path, limits), Config.from_mapping({**SMALL, "num_nodes": 3}))
    experiment = prepare_experiment(with_agreement(roster.config, roster.agreement), tmp_path)
    return fit_to_nodes(replace(experiment, config=replace(experiment.config, **keys)), roster).config


def test_a_latency_that_the_run_limits_is_measured_on_every_node(tmp_path: Path, asked: list[SpaceSpec]) -> None:
    config = limited(tmp_path, {}, max_latency_ms=60.0)
    assert len(asked) == 3
    assert (config.max_latency_ms, config.latency_table.split(";")[0]) == (60.0, "5000")


def test_an_impossible_limit_of_the_run_is_nobodys_fault(tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match=r"^max_macs: 10 is less than the cheapest network"):
        limited(tmp_path, {1: {"max-macs": 10**6}}, max_macs=10)


def test_latencies_are_those_of_the_node_that_limits_them(tmp_path: Path, asked: list[SpaceSpec]) -> None:
    config, summary, _ = searched(tmp_path, "fedmetanas", {1: {"max-latency-ms": 60.0}})
    assert len(asked) == 1, "the only node that limits them"
    assert (config.max_latency_ms, config.latency_table.split(";")[0]) == (60.0, "5000")
    spent = summary["budget"]["max_latency_ms"]["spent"]
    assert summary["budget"]["max_latency_ms"]["met"]
    assert 5.0 < spent <= 60.0
    assert spent == round(spent), "whole milliseconds, as the node told"


def test_networks_of_their_own_keep_to_their_own_nodes_limits(tmp_path: Path) -> None:
    free = searched(tmp_path / "free", "meta_dnas", {})[2]
    costs = [load_network(free / "model" / "clients" / str(client))[0].weights.numel() for client in range(3)]
    least = min(costs) - 200
    config, _, bound = searched(tmp_path / "bound", "meta_dnas", {1: {"max-parameters": least}})
    assert config.max_parameters == 0
    assert load_network(bound / "model" / "clients" / "1")[0].weights.numel() <= least


def test_limits_that_say_nothing_keep_a_node_out(tmp_path: Path) -> None:
    grid = SiteGrid(tmp_path, {1: {"max-macs": "few"}})
    with pytest.raises(RunFailedError, match="its max-macs='few' is no number"):
        gathered(grid, Config.from_mapping({**SMALL, "node_timeout_s": 0.5}))


def test_a_node_that_comes_too_late_for_its_limit_is_told_of(tmp_path: Path) -> None:
    roster = gathered(SiteGrid(tmp_path, {1: {"max-macs": 5}}), Config.from_mapping(SMALL))
    roster.begun, roster.events = True, []
    roster.config = replace(roster.config, max_macs=100)
    roster._tell_of_limits(roster.members[1])
    assert roster.events == [(1, "s1 came too late for its max_macs=5: the run keeps to 100")]


def test_methods_that_cut_networks_out_at_the_server_keep_to_the_least_of_all_nodes(tmp_path: Path) -> None:
    config, summary, _ = searched(tmp_path, "perfedrlnas", {1: {"max-parameters": 1500}})
    assert config.max_parameters == 1500
    assert summary["budget"]["max_parameters"]["met"]


def test_limits_that_a_method_cannot_keep_are_told_of(tmp_path: Path) -> None:
    roster = gathered(SiteGrid(tmp_path, {1: {"max-macs": 10**6}}), Config.from_mapping({**SMALL, "method": "fedavg"}))
    experiment = prepare_experiment(with_agreement(roster.config, roster.agreement), tmp_path)
    roster.events = []
    assert fit_to_nodes(experiment, roster) is experiment
    assert roster.events == [(1, "its limits are not kept: fedavg keeps to no budget")]


@pytest.mark.parametrize("times", ["", "nan", "1;2"])
def test_a_node_that_tells_no_times_ends_the_start_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: str
) -> None:
    monkeypatch.setattr(data_source, "measure_latencies", lambda spec: SimpleNamespace(to_text=lambda: times))
    with pytest.raises(RefusalError, match="latency_table: it cannot be read"):
        searched(tmp_path, "fedmetanas", {1: {"max-latency-ms": 60.0}})


@pytest.mark.parametrize("method", ["meta_dnas", "fedmetanas"])
def test_a_node_with_an_impossible_limit_is_named(tmp_path: Path, method: str) -> None:
    with pytest.raises(RefusalError, match="s1: max_macs: 10 is less than the cheapest network"):
        searched(tmp_path, method, {1: {"max-macs": 10}, 2: {"max-macs": 10**6}})


def test_accounts_of_networks_of_their_own(tmp_path: Path) -> None:
    _, summary, _ = searched(tmp_path, "local_darts", {1: {"max-parameters": 2500}})
    (account,) = summary["node_budgets"].items()
    assert account[0] == "1"
    assert account[1]["max_parameters"]["met"]
