"""Whole runs through strategy, wire and client app, without Flower's processes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from local_grid import run_all
from rounds import exchanged, make_loop, prepare

from fedmetanas_core.description import describe_experiment, most_bytes
from fedmetanas_core.federation import wire
from fedmetanas_core.federation.compression import KINDS
from fedmetanas_core.output.tracking.session import Tracking
from fedmetanas_core.run.checkpoint import load_checkpoint
from fedmetanas_core.space.native import build
from fedmetanas_core.space.network import load_network
from server_app import app


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
    # Rounds are slow without them, so that a loaded machine may have more to tell, though not of clients.
    notes = [[note for note in row["notes"] if note["client"] is not None] for row in run.folder.rounds.read()]
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


@pytest.mark.parametrize("end", [SystemExit(0), KeyboardInterrupt()])
def test_a_server_that_is_told_to_end_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    def is_told(*_: object) -> None:
        raise end

    run, _ = prepare(tmp_path)
    monkeypatch.setattr(app, "search", is_told)
    with pytest.raises(type(end)):
        app._session(None, run, Tracking(run.folder, "", tmp_path))  # type: ignore[arg-type]
    summary = run.folder.read_summary() or {}
    assert (summary["status"], summary["error"]) == ("interrupted", "the server was told to end")
