"""Whole runs on nodes that have their own images, in this process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deployment import digit_folders
from flwr.app import Message, RecordDict
from local_grid import HANDLERS, LocalGrid

from client_app.state import STATE_PATH
from fedmetanas_core.config import Config
from fedmetanas_core.output.tracking.session import Tracking
from fedmetanas_core.preflight import prepare_experiment, with_agreement
from fedmetanas_core.runs import begin_run, reopen_run
from server_app.app import search
from server_app.courier import Courier
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

    def __init__(self, root: Path) -> None:
        super().__init__(3)
        self.root = root
        for site in range(3):
            if not (root / f"site{site}").exists():
                digit_folders(root / f"site{site}", site, 3, each=8, without=[site])

    def replies(self, messages: list[Message]) -> list[Message]:  # type: ignore[override]
        found = []
        for message in messages:
            site = self.client_of(message.metadata.dst_node_id)
            own = {"name": f"s{site}", "data-path": str(self.root / f"site{site}"), STATE_PATH: str(self.root / "kept")}
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
