"""Which clients a run has, and which of them a round takes."""

import numpy as np
import pytest
from local_grid import LocalGrid, roster_of

from fedmetanas_core.config import Config
from fedmetanas_core.errors import RunFailedError
from fedmetanas_core.federation.sampling import sample_clients
from server_app.courier import Courier
from server_app.roster import Roster


def test_missing_nodes_fail_with_the_setup_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_app.roster.VIRTUAL_WAIT_S", 0.1)
    roster = Roster(Courier(LocalGrid(3)), Config.from_mapping({"num_clients": 6}), virtual=True)  # type: ignore[arg-type]
    with pytest.raises(RunFailedError, match=r"Flower has 3 nodes; run `fedmetanas setup --nodes 6`"):
        roster.count()


def test_other_code_on_the_clients_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_app.roster.code_fingerprint", lambda: "another")
    with pytest.raises(RunFailedError, match="it runs other code"):
        roster_of(LocalGrid(5), Config.from_mapping({"num_clients": 5}))


def test_clients_are_sampled_by_seed_and_round() -> None:
    draws = [sample_clients(3, number, range(100), 5) for number in range(1, 201)]
    assert draws == [sample_clients(3, number, range(100), 5) for number in range(1, 201)]
    assert all(len(set(draw)) == 5 and draw == sorted(draw) for draw in draws)
    counts = np.bincount(np.concatenate(draws), minlength=100)
    # 1,000 draws over 100 clients: mean 10, standard deviation sqrt(200 * 0.05 * 0.95) = 3.1
    assert abs(counts - 10).max() < 5 * 3.1
    assert draws != [sample_clients(4, number, range(100), 5) for number in range(1, 201)]
