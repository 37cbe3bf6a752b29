"""Whole runs through strategy, wire and client app, without Flower's processes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message
from local_grid import LocalGrid, identity_of, run_all
from torch import Tensor

from fedmetanas_core.config import Config
from fedmetanas_core.description import describe_experiment, most_bytes
from fedmetanas_core.errors import RunFailedError
from fedmetanas_core.federation import wire
from fedmetanas_core.federation.compression import KINDS
from fedmetanas_core.federation.update import Evaluation
from fedmetanas_core.preflight import prepare_experiment
from fedmetanas_core.run.checkpoint import load_checkpoint
from fedmetanas_core.runs import Run, begin_run
from fedmetanas_core.space.native import build
from fedmetanas_core.space.network import load_network
from server_app import app
from server_app.courier import Courier
from server_app.loop import RoundLoop
from server_app.roster import Roster
from server_app.strategy import SearchStrategy, sample_clients

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


def test_a_run_ends_one_hot_and_extracts_without_loss(tmp_path: Path) -> None:
    run, grid = prepare(tmp_path, num_rounds=8)
    summary = run_all(run, grid)
    assert summary["one_hot"]
    assert summary["max_logit_difference"] <= 1e-5
    assert summary["test_accuracy"] == summary["test_accuracy_supernet"]
    rows = run.folder.rounds.read()
    assert [row["round"] for row in rows] == list(range(1, 9))
    assert [row["phase"] for row in rows] == ["warm-up"] * 2 + ["search"] * 5 + ["one-hot"]
    alive = [row["alive_operations"] for row in rows]
    assert alive == sorted(alive, reverse=True)
    assert alive[-1] == 2 * 2 * 2  # cell types x nodes x inputs
    for column in ("macs", "parameters", "uplink_bytes", "downlink_bytes"):
        assert rows[-1][column] < rows[0][column]
    assert all(0 <= row["test_accuracy"] <= 1 for row in rows if row["test_accuracy"] is not None)
    assert summary["uplink_bytes"] == sum(row["uplink_bytes"] for row in rows)
    assert summary["uplink_bytes"] + summary["downlink_bytes"] <= most_bytes(run.experiment)


def test_what_is_not_one_hot_is_measured_as_the_network_that_is_kept(tmp_path: Path) -> None:
    run, grid = prepare(tmp_path, num_rounds=2, prune_cap="off", prune_threshold=0.0)
    summary = run_all(run, grid)
    assert not summary["one_hot"]
    assert summary["max_logit_difference"] > 1e-3
    network, _ = load_network(run.folder.path)
    assert summary["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert summary["parameters"] < run.folder.rounds.read()[-1]["parameters"]
    architecture = wire.decode_payload(grid.sent[-1][0].content, lambda plan: run.experiment.spec).architecture
    assert architecture.is_one_hot()
    assert torch.equal(architecture.operation_mask, network.genotype.masks(run.experiment.spec)[0])
    # and what the rounds arrived at is still there
    tensors, _ = load_checkpoint(run.folder.checkpoint_directory)
    assert int(tensors["operation_mask"].sum()) == run.folder.rounds.read()[-1]["alive_operations"]


def test_shares_are_written_down_as_they_are(tmp_path: Path) -> None:
    experiment = prepare(tmp_path, protocol="disjoint", num_clients=600)[0].experiment
    assert experiment.config.samples_per_client == 1437 // 600
    assert "batches of 1 make batch norm unreliable" in describe_experiment(experiment)
    ordinary = prepare(tmp_path / "ordinary")[0].experiment
    assert "note" not in describe_experiment(ordinary)


def test_labels_that_count_from_one_are_noted(tmp_path: Path) -> None:
    images, labels = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 2 + 1
    np.savez(tmp_path / "own.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    experiment = prepare(tmp_path, dataset="own.npz", samples_per_client=16)[0].experiment
    assert "note: no training image of class 0; labels count from 0" in describe_experiment(experiment)


def test_bytes_are_those_of_the_messages_that_travelled(tmp_path: Path) -> None:
    run, grid = prepare(tmp_path, num_rounds=6)
    loop = make_loop(run, grid)
    loop.run()
    sizes = [(wire.array_bytes(sent.content), wire.array_bytes(reply.content)) for sent, reply in grid.sent]
    rows = run.folder.rounds.read()
    assert [row["downlink_bytes"] for row in rows] == [sizes[2 * i][0] + sizes[2 * i + 1][0] for i in range(6)]
    assert [row["uplink_bytes"] for row in rows] == [sizes[2 * i][1] + sizes[2 * i + 1][1] for i in range(6)]
    cost = loop.cost()
    last = rows[-1]["uplink_bytes"] / 2
    assert rows[-1]["phase"] == "one-hot"
    # Beyond alive weights and statistics: 4 numpy headers and the logits.
    logits = sum(logits.numel() for logits, _ in loop.state.architecture.rows())
    assert last == cost.payload_bytes + 4 * 128 + 4 * logits


def test_what_a_client_has_to_do_without_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, "0")
    build.forget()
    run, grid = prepare(tmp_path, num_rounds=2, num_clients=2)
    run_all(run, grid)
    notes = [row["notes"] for row in run.folder.rounds.read()]
    expected = f"without compiled kernels: switched off by {build.SWITCH}=0"
    assert notes == [[{"client": client, "note": expected} for client in range(2)], []]


@pytest.mark.parametrize("kind", KINDS)
def test_a_compressed_run_sends_less_and_arrives_at_the_same_kind_of_end(tmp_path: Path, kind: str) -> None:
    run, grid = prepare(tmp_path / "plain", num_rounds=8)
    expected = run_all(run, grid)
    run, grid = prepare(tmp_path / "small", num_rounds=8, compression=kind)
    summary = run_all(run, grid)
    assert summary["one_hot"]
    assert summary["max_logit_difference"] <= 1e-5
    assert summary["uplink_bytes"] < (0.75 if kind == "float16" else 0.6) * expected["uplink_bytes"]
    assert summary["downlink_bytes"] == pytest.approx(expected["downlink_bytes"], rel=0.2)
    replies = [reply.content for sent, reply in grid.sent if sent.metadata.message_type == "train"]
    names = set(replies[0].array_records[wire.ARRAYS])
    assert names == {"c/weights", "c/statistics", "a/operation_logits", "a/input_logits"}
    assert summary["updates_excluded"] == 0
    asked = {client for row in run.folder.rounds.read() for client in row["clients"]}
    assert {client for client in range(6) if grid.kept(client)} == asked


def test_a_spoilt_compressed_update_is_excluded(tmp_path: Path) -> None:
    run, grid = prepare(tmp_path, num_rounds=1, num_clients=2, compression="int8")
    strategy = make_loop(run, grid).strategy
    messages = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)  # type: ignore[arg-type]
    replies = exchanged(grid, messages)
    arrays = replies[0].content.array_records[wire.ARRAYS]
    arrays["c/weights"] = Array(arrays["c/weights"].numpy()[:-9].copy())
    strategy.aggregate_train(1, replies)
    (excluded,) = strategy.exchange.excluded
    assert "compressed update" in excluded["reason"]


def test_uplink_at_the_papers_scale(tmp_path: Path) -> None:
    """16 channels, 8 cells: at most 8.1 MB a client at first, then what is alive and hardly more."""
    generator = np.random.default_rng(0)
    labels = np.arange(20) % 10
    images = generator.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", x_train=images, y_train=labels, x_test=images[:10], y_test=labels[:10])
    scale = {"init_channels": 16, "num_cells": 8, "num_nodes": 4, "clients_per_round": 1, "samples_per_client": 4}
    run, grid = prepare(tmp_path, dataset="few.npz", num_rounds=5, evaluate_every=5, **scale)
    assert run.experiment.spec.out_channels == 4 * 64
    loop = make_loop(run, grid)
    loop.run()
    first, last = run.folder.rounds.read()[0], run.folder.rounds.read()[-1]
    assert first["parameters"] == 1_930_618
    assert 4 * first["parameters"] < first["uplink_bytes"] <= 8_100_000
    assert last["phase"] == "one-hot"
    alive_floats = last["parameters"] + loop.state.statistics.numel()
    assert 4 * alive_floats <= last["uplink_bytes"] <= min(1.05 * 4 * alive_floats, 2_100_000)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        run, grid = prepare(tmp_path / name, num_rounds=3, seed=seed)
        run_all(run, grid)
        rows = [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in run.folder.rounds.read()]
        found.append(((run.folder.model_directory / "weights.safetensors").read_bytes(), rows))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]


def test_the_checkpoint_holds_the_last_round(tmp_path: Path) -> None:
    run, grid = prepare(tmp_path, num_rounds=3)
    loop = make_loop(run, grid)
    told: list[dict[str, Any]] = []
    loop.run(told.append)
    assert told == run.folder.rounds.read()
    tensors, facts = load_checkpoint(run.folder.checkpoint_directory)
    assert facts["round"] == 3
    assert torch.equal(tensors["weights"], loop.state.weights)
    assert torch.equal(tensors["operation_mask"], loop.state.architecture.operation_mask)
    assert facts["mask_version"] == loop.state.architecture.version


def test_voting_clients_prune_and_the_run_completes(tmp_path: Path) -> None:
    run, grid = prepare(tmp_path, num_rounds=3, preset="paper_literal", prune_threshold=0.1249)
    summary = run_all(run, grid)
    rows = run.folder.rounds.read()
    assert rows[-1]["alive_operations"] < rows[0]["alive_operations"]
    assert summary["genotype"]["normal"]


@pytest.mark.parametrize(
    "values",
    [
        {"samples_per_client": 1},
        {"samples_per_client": 3, "batch_size": 32},
        {"partition": "label_skew", "classes_per_client": 1},
        {"dir_alpha": 1e-6},
        {"batch_size": 1, "samples_per_client": 4},
        {"inner": "alternate", "inner_steps": 2},
        {"sample": "per_cell"},
        {"protocol": "disjoint", "partition": "iid"},
        {"none_policy": "absent"},
    ],
    ids=str,
)
def test_unusual_clients_and_options_complete(tmp_path: Path, values: dict[str, Any]) -> None:
    run, grid = prepare(tmp_path, num_rounds=2, **values)
    summary = run_all(run, grid)
    assert summary["one_hot"]
    assert np.isfinite([row["train_loss"] for row in run.folder.rounds.read()]).all()


def test_a_class_missing_everywhere_is_no_obstacle(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    labels = np.array([0, 1, 3] * 20)  # class 2 exists only as a number below the largest label
    images = generator.integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "gap.npz", x_train=images, y_train=labels, x_test=images[:15], y_test=labels[:15])
    run, grid = prepare(tmp_path, num_rounds=1, dataset="gap.npz", samples_per_client=8)
    assert run.experiment.spec.num_classes == 4
    assert run_all(run, grid)["one_hot"]


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


def test_only_regular_evaluations_count_as_such(tmp_path: Path) -> None:
    run, grid = prepare(tmp_path, num_rounds=10, evaluate_every=4)
    loop = make_loop(run, grid)
    loop.run()
    rows = run.folder.rounds.read()
    assert [number for number, _ in loop.state.evaluations] == [4, 8, 10]
    events = {event["round"] for event in loop.tally.events}
    assert {row["round"] for row in rows if row["test_accuracy"] is not None} == {4, 8, 10} | events
    mean = sum(rows[number - 1]["test_accuracy"] for number in (4, 8, 10)) / 3
    assert loop.totals()["test_accuracy_last_evaluations"] == pytest.approx(mean)


def test_the_comparison_at_the_end_sees_a_wrong_extraction(tmp_path: Path) -> None:
    run, grid = prepare(tmp_path, num_rounds=3)
    loop = make_loop(run, grid)
    loop.run()
    network = loop.strategy.method.extract(loop.state)
    assert loop.compare(network)["max_logit_difference"] <= 1e-5
    network.weights.data[-1] += 1.0  # the bias of the last class
    assert loop.compare(network)["max_logit_difference"] == pytest.approx(1.0, abs=1e-4)


def test_caps_hold_where_clients_vote_and_the_run_is_all_warm_up(tmp_path: Path) -> None:
    run, grid = prepare(tmp_path, num_rounds=1, prune_rule="client_vote")
    assert run_all(run, grid)["one_hot"]


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


@pytest.mark.parametrize("end", [SystemExit(0), KeyboardInterrupt()])
def test_a_server_that_is_told_to_end_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    def is_told(*_: object) -> None:
        raise end

    run, _ = prepare(tmp_path)
    monkeypatch.setattr(app, "search", is_told)
    with pytest.raises(type(end)):
        app._session(None, run)  # type: ignore[arg-type]
    summary = run.folder.read_summary() or {}
    assert (summary["status"], summary["error"]) == ("interrupted", "the server was told to end")
