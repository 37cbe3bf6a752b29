"""Replies that are lost, spoilt, late, forged or come twice: what the strategy makes of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message
from local_grid import LocalGrid, run_all
from rounds import exchanged, make_loop, prepare
from torch import Tensor

from fedmetanas_core.errors import RunFailedError
from fedmetanas_core.federation import wire
from fedmetanas_core.federation.sampling import sample_clients
from fedmetanas_core.federation.update import Evaluation
from fedmetanas_core.run.checkpoint import load_checkpoint


class BrokenGrid(LocalGrid):
    """Loses the replies of some clients and spoils those of others."""

    def __init__(self, num_nodes: int, lost: set[int], spoilt: set[int]) -> None:
        super().__init__(num_nodes)
        self.lost, self.spoilt = lost, spoilt

    def replies(self, messages: Sequence[Message]) -> list[Message]:
        kept = []
        for reply in super().replies(messages):
            client = reply.metadata.src_node_id - 1000
            if client in self.spoilt:
                update = wire.decode_update(reply.content, (torch.empty(0), torch.empty(0)))
                update.weights[0] = float("nan")
                reply.content = wire.encode_update(update)
            if client not in self.lost:
                kept.append(reply)
        return kept


def test_a_lost_and_a_spoilt_reply_are_named_and_the_round_goes_on(tmp_path: Path) -> None:
    run, _ = prepare(tmp_path, round_timeout_s=0.2, num_rounds=1, clients_per_round=4)
    asked = sample_clients(0, 1, range(6), 4)
    make_loop(run, BrokenGrid(6, {asked[0]}, {asked[1]})).run()
    (row,) = run.folder.rounds.read()
    assert row["clients"] == asked
    assert row["excluded"] == [
        {"client": asked[0], "reason": "no reply before the deadline"},
        {"client": asked[1], "reason": "weights is not finite"},
    ]


def test_a_reply_of_an_earlier_round_is_refused(tmp_path: Path) -> None:
    run, grid = prepare(tmp_path, num_rounds=3, num_clients=2)
    strategy = make_loop(run, grid).strategy
    late = []
    for number in (1, 2):
        messages = strategy.configure_train(number, ArrayRecord(), ConfigRecord(), grid)  # type: ignore[arg-type]
        late = late or exchanged(grid, messages)
        if number == 1:
            strategy.aggregate_train(number, late)
    strategy.aggregate_train(2, late)
    reasons = [(row["client"], row["reason"]) for row in strategy.exchange.excluded]
    assert reasons == [(0, "answers round 1, this is round 2"), (1, "answers round 1, this is round 2")]


def test_a_reply_that_comes_twice_counts_once(tmp_path: Path) -> None:
    run, grid = prepare(tmp_path, num_rounds=1, num_clients=2)
    found = []
    for again in (False, True):
        strategy = make_loop(run, grid).strategy
        replies = exchanged(grid, strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid))  # type: ignore[arg-type]
        client = grid.client_of(replies[0].metadata.src_node_id)
        strategy.aggregate_train(1, [*replies, replies[0]] if again else replies)
        assert [update.client for update in strategy.exchange.accepted] == [0, 1]
        found.append((strategy.state.weights, [each["note"] for each in strategy.exchange.notes]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == []
    assert found[1][1] == [f"a reply of client {client} that nobody asked for, dropped"]


def test_an_error_reply_is_named_by_its_last_line(tmp_path: Path) -> None:
    run, grid = prepare(tmp_path, num_rounds=1, num_clients=2)
    strategy = make_loop(run, grid).strategy
    messages = list(strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid))  # type: ignore[arg-type]
    good = exchanged(grid, messages[:1])
    bad = Message(Error(2, "Traceback ...\n\x1b[31mValueError: no images\x1b[0m\n"), reply_to=messages[1])
    strategy.aggregate_train(1, [*good, bad])
    assert strategy.exchange.excluded == [{"client": 1, "reason": "ValueError: no images"}]
    dead = Message(Error(0, "ray.exceptions.ActorDiedError: gone"), reply_to=messages[1])
    strategy.virtual = False  # a node may write what it likes
    strategy.aggregate_train(1, [*good, dead])
    assert strategy.exchange.excluded[-1] == {"client": 1, "reason": "ray.exceptions.ActorDiedError: gone"}
    strategy.virtual = True
    with pytest.raises(RunFailedError, match="a Ray worker died"):
        strategy.aggregate_train(1, [*good, dead])


class OutageGrid(LocalGrid):
    """Nobody answers in these rounds."""

    def __init__(self, num_nodes: int, *rounds: int) -> None:
        super().__init__(num_nodes)
        self.outage, self.round = rounds, 0

    def replies(self, messages: Sequence[Message]) -> list[Message]:
        self.round += 1
        return [] if self.round in self.outage else super().replies(messages)


def test_a_round_without_any_usable_update_is_void_and_keeps_the_state(tmp_path: Path) -> None:
    run, _ = prepare(tmp_path, round_timeout_s=0.2, num_rounds=6, search_fraction=1.0)
    loop = make_loop(run, OutageGrid(6, 1, 2, 4, 5))  # never three in a row
    loop.run()
    rows = run.folder.rounds.read()
    assert [len(row["excluded"]) for row in rows] == [2, 2, 0, 2, 2, 0]
    assert [row["train_loss"] is None for row in rows] == [True, True, False, True, True, False]
    assert rows[0]["uplink_bytes"] == 0 < rows[2]["uplink_bytes"]
    assert loop.state.round == 6
    assert loop.state.architecture.is_one_hot(), "the schedule goes on"
    assert rows[1]["test_accuracy"] == loop.state.evaluations[0][1] is not None


def test_updates_of_a_minority_are_not_the_federations(tmp_path: Path) -> None:
    run, _ = prepare(tmp_path, round_timeout_s=0.2, num_rounds=4, clients_per_round=4)
    asked = sample_clients(0, 1, range(6), 4)
    loop = make_loop(run, BrokenGrid(6, set(asked[:3]), set()))
    before = loop.state.weights.clone()
    loop._exchange(1)
    assert torch.equal(loop.state.weights, before)
    assert [row["client"] for row in loop.strategy.exchange.excluded] == asked
    assert loop.strategy.exchange.excluded[3]["reason"].startswith("usable, but")


def test_a_lasting_outage_fails_the_run_and_keeps_the_last_state(tmp_path: Path) -> None:
    run, _ = prepare(tmp_path, round_timeout_s=0.2, num_rounds=9)
    with pytest.raises(RunFailedError, match=r"^round 4: fewer than half .* for 3 rounds in a row .*deadline"):
        make_loop(run, OutageGrid(6, 2, 3, 4)).run()
    assert load_checkpoint(run.folder.checkpoint_directory)[1]["round"] == 3


def test_a_run_in_which_nobody_ever_answers_is_no_success(tmp_path: Path) -> None:
    run, _ = prepare(tmp_path, round_timeout_s=0.2, num_rounds=1)
    with pytest.raises(RunFailedError, match=r"^round 1: fewer than half of the clients sent a usable update \("):
        make_loop(run, OutageGrid(6, 1)).run()
    assert load_checkpoint(run.folder.checkpoint_directory)[1]["round"] == 0


class ForgingGrid(LocalGrid):
    """The clients of ``forgeries`` answer the evaluation with a network that their entry has spoilt."""

    def __init__(self, num_nodes: int, forgeries: dict[int, Callable[[Evaluation], Evaluation]]) -> None:
        super().__init__(num_nodes)
        self.forgeries = forgeries

    def replies(self, messages: Sequence[Message]) -> list[Message]:
        found = super().replies(messages)
        for reply in found:
            forge = self.forgeries.get(self.client_of(reply.metadata.src_node_id))
            if forge is not None and reply.metadata.message_type == "evaluate":
                reply.content = wire.encode_evaluation(forge(wire.decode_evaluation(reply.content)))
        return found


def test_a_client_whose_own_network_is_none_is_left_out_of_the_evaluation(tmp_path: Path) -> None:
    def without_network(answer: Evaluation) -> Evaluation:
        return replace(answer, genotype=None, weights=None, statistics=None)

    forgeries: dict[int, Callable[[Evaluation], Evaluation]] = {
        0: lambda answer: replace(answer, genotype="{}"),
        1: lambda answer: replace(answer, genotype="[" * 100_000),
        2: lambda answer: replace(answer, weights=torch.full_like(cast(Tensor, answer.weights), torch.inf)),
        3: lambda answer: replace(answer, statistics=cast(Tensor, answer.statistics)[:-1]),
        4: without_network,
    }
    run, _ = prepare(tmp_path, method="meta_dnas", num_rounds=2, clients_per_round=6)
    summary = run_all(run, ForgingGrid(6, forgeries))
    reasons = {each["client"]: each["reason"] for each in summary["clients_not_evaluated"]}
    assert sorted(reasons) == [0, 1, 2, 3, 4]
    assert "genotype" in reasons[0]
    assert "RecursionError" in reasons[1]
    assert "not finite" in reasons[2]
    assert "do not fit" in reasons[3]
    assert reasons[4] == "sent no network of its own"
    assert [path.name for path in (run.folder.model_directory / "clients").iterdir()] == ["5"]
    assert summary["clients_evaluated"] == 1
