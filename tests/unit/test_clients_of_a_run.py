"""Which clients a run has, and which of them a round takes."""

import numpy as np
import pytest
from local_grid import LocalGrid

from fedmetanas_core.errors import RunFailedError
from server_app.app import meet_nodes
from server_app.strategy import sample_clients


def test_missing_nodes_fail_with_the_setup_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_app.app.NODE_WAIT_S", 0.1)
    with pytest.raises(RunFailedError, match=r"Flower has 3 nodes; run `fedmetanas setup --nodes 6`"):
        meet_nodes(LocalGrid(3), 6)  # type: ignore[arg-type]


def test_other_code_on_the_clients_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_app.app.code_fingerprint", lambda: "another")
    with pytest.raises(RunFailedError, match="the clients run other code"):
        meet_nodes(LocalGrid(2), 2)  # type: ignore[arg-type]


def test_clients_are_sampled_by_seed_and_round() -> None:
    draws = [sample_clients(3, number, 100, 5) for number in range(1, 201)]
    assert draws == [sample_clients(3, number, 100, 5) for number in range(1, 201)]
    assert all(len(set(draw)) == 5 and draw == sorted(draw) for draw in draws)
    counts = np.bincount(np.concatenate(draws), minlength=100)
    # 1,000 draws over 100 clients: mean 10, standard deviation sqrt(200 * 0.05 * 0.95) = 3.1
    assert abs(counts - 10).max() < 5 * 3.1
    assert draws != [sample_clients(4, number, 100, 5) for number in range(1, 201)]
