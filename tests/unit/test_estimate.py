"""The dry run: what is worked out by hand, what a real run in this process then takes, refusals, and the two forms."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_grid import LocalGrid, run_all

from fedmetanas_core import cli
from fedmetanas_core.config import Config
from fedmetanas_core.errors import ProcessDiedError
from fedmetanas_core.estimate import clients, whole
from fedmetanas_core.estimate.clients import Work
from fedmetanas_core.estimate.course import take_course
from fedmetanas_core.estimate.makespan import alike, between, makespan
from fedmetanas_core.estimate.partition import about_partition
from fedmetanas_core.estimate.probe import Worker, sizes
from fedmetanas_core.estimate.table import as_table, summary_line
from fedmetanas_core.estimate.team import Team
from fedmetanas_core.estimate.traffic import Load, payload_bytes, total
from fedmetanas_core.estimate.whole import estimate
from fedmetanas_core.launch import worker_count
from fedmetanas_core.methods.registry import METHODS, make_method
from fedmetanas_core.preflight import Experiment, prepare_experiment
from fedmetanas_core.runs import begin_run

SMALL = {
    "num_clients": 5,
    "unseen_clients": 1,
    "clients_per_round": 2,
    "num_rounds": 8,
    "local_epochs": 1,
    "init_channels": 2,
    "num_cells": 3,
    "num_nodes": 2,
    "evaluate_every": 4,
    "samples_per_client": 40,
    "fedpnas_samples": 2,
    "model": "mobilenet_v3_large_s4",
}


def prepared(tmp_path: Path, **values: Any) -> Experiment:
    return prepare_experiment(Config.from_mapping({**SMALL, **values}), tmp_path)


class Here:
    """Probes in this process, one after the other."""

    def __init__(self, config: Config, count: int) -> None:
        self.count = count
        self.workers = [Worker(prepare_experiment(config, Path.cwd(), check=False)) for _ in range(count)]
        self.ready = [{"seconds": 0.25, **sizes()} for _ in range(count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.workers = []

    def ask(self, orders: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        pairs = zip(self.workers, orders, strict=True)
        return [getattr(worker, order["do"])(*list(order.values())[1:]) for worker, order in pairs]


@pytest.fixture(autouse=True)
def _one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run side by side."""
    monkeypatch.setattr(whole, "available_cores", lambda: 1)


# ---- side by side


@pytest.mark.parametrize(
    ("seconds", "workers", "cores", "expected"),
    [
        ([1.0] * 4, 2, 2, 2.0),
        ([1.0] * 5, 2, 2, 3.0),  # one core idles while the fifth works alone
        ([1.0] * 5, 3, 2, 2.5),  # three share two cores for 1.5 s, two have one each for 1 s
        ([1.0] * 5, 3, 4, 2.0),
        ([3.0, 1.0, 1.0], 2, 2, 3.0),
        ([2.0, 1.0], 2, 1, 3.0),  # at half speed for 2 s, when the second ends and the first has 1 s left
        ([], 2, 2, 0.0),
    ],
)
def test_makespans(seconds: list[float], workers: int, cores: int, expected: float) -> None:
    assert makespan(seconds, workers, cores) == pytest.approx(expected)


@given(st.floats(0.01, 10), st.integers(1, 40), st.integers(1, 8), st.integers(1, 8))
def test_equal_tasks_by_the_formula_and_one_by_one(seconds: float, count: int, workers: int, cores: int) -> None:
    found = alike(seconds, count, workers, cores)
    assert found == pytest.approx(makespan([seconds] * count, workers, cores))
    assert found >= seconds * max(1.0, count / min(workers, cores)) * (1 - 1e-9)
    assert alike(seconds, count, workers, cores + 1) <= found * (1 + 1e-9)


def test_lines_through_what_was_measured() -> None:
    points = [(10.0, 1.0), (30.0, 2.0)]
    assert between(20.0, points) == 1.5
    assert between(10.0, points) == 1.0
    assert between(60.0, points) == 4.0
    assert between(5.0, points) == 0.5
    assert between(5.0, [(0.0, 7.0)]) == 7.0


# ---- the course of a run


def test_the_segments_of_the_digits_search(tmp_path: Path) -> None:
    """150 rounds, one-hot at 0.45: a prune every 0.05 x 0.45 / 0.8 of the run from 0.3 x 0.45 / 0.8 on."""
    experiment = prepare_experiment(Config.from_mapping({}), tmp_path)
    method = make_method(experiment.config, experiment.spec)
    course = take_course(experiment.config, method)
    assert course.prunes[0] == 26
    assert course.prunes[-1] == 68
    phases = {
        phase: sum(s.rounds for s in course.segments if s.phase == phase) for phase in ("warm-up", "search", "one-hot")
    }
    assert phases == {"warm-up": 13, "search": 55, "one-hot": 82}
    firsts = [segment.first for segment in course.segments]
    # Events before the caps begin to fall remove nothing but ``none``, at the first of them.
    assert firsts[:2] == [1, 14]
    assert firsts[2:] == [each + 1 for each in course.prunes]
    assert course.is_settled(method)
    assert course.segments[-1].state.architecture.is_one_hot()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_segments_cover_every_round_once(method: str, tmp_path: Path) -> None:
    experiment = prepared(tmp_path, method=method)
    engine = make_method(experiment.config, experiment.spec)
    course = take_course(experiment.config, engine)
    assert [segment.first for segment in course.segments] == [
        1 + sum(each.rounds for each in course.segments[:place]) for place in range(len(course.segments))
    ]
    assert sum(segment.rounds for segment in course.segments) == engine.num_rounds
    assert all(len(clients) == 2 and max(clients) < 4 for clients in course.trainings.values())


def test_what_is_learned_decides_where_no_cap_does(tmp_path: Path) -> None:
    experiment = prepared(tmp_path, prune_cap="off")
    method = make_method(experiment.config, experiment.spec)
    assert not take_course(experiment.config, method).is_settled(method)


# ---- bytes


def test_bytes_of_a_whole_run_by_hand(tmp_path: Path) -> None:
    """3 rounds of 100 down and 0.5 x 120 up, then 5 of 20 and 0.5 x 24, two clients each; at the end 7 and 1."""
    config = Config.from_mapping({"num_clients": 5, "clients_per_round": 2})

    class Rounds:
        def __init__(self, rounds: int) -> None:
            self.rounds = rounds

    found = total([Rounds(3), Rounds(5)], [Load(100, 120), Load(20, 24)], [0.5, 0.5], (7, 1), config)  # type: ignore[list-item]
    assert (found.first_down, found.first_up, found.last_down, found.last_up) == (200, 120, 40, 24)
    assert (found.down, found.up) == (3 * 200 + 5 * 40 + 35, 3 * 120 + 5 * 24 + 5)


def test_bytes_of_a_fixed_models_payload(tmp_path: Path) -> None:
    """Two arrays of float32, each with numpy's header of 128 bytes."""
    experiment = prepared(tmp_path, method="fedavg")
    method = make_method(experiment.config, experiment.spec)
    state = method.initial_state()
    payload = method.payload(state, 0, method.plan(1))
    assert payload_bytes(payload) == 2 * 128 + 4 * (len(state.weights) + len(state.statistics))


# How far bytes may be off: nothing where nothing is searched; else by what the learned operations weigh more or less
# than random ones, which at this size is much.
TOLERANCE = {
    "fedmetanas": 0.12,
    "fednas": 0.15,
    "fedavg": 0.0,
    "fedpnas": 0.02,
    "local_darts": 0.3,
    "random_search": 0.0,
    "meta_fedpnas": 0.12,
}


@pytest.mark.parametrize("method", TOLERANCE)
def test_bytes_are_those_of_a_real_run(method: str, tmp_path: Path) -> None:
    experiment = prepared(tmp_path, method=method)
    found = estimate(experiment, Here)
    run = begin_run(tmp_path, "run", experiment, tmp_path)
    summary = run_all(run, LocalGrid(5))
    off = TOLERANCE[method]
    for way in ("up", "down"):
        assert found["bytes"]["run"][way] == pytest.approx(summary[f"{way}link_bytes"], rel=off, abs=0.5), way
        least, most = found["bytes"]["least"][way], found["bytes"]["most"][way]
        assert 0.95 * least <= summary[f"{way}link_bytes"] <= 1.05 * most or method == "local_darts"
    (first, *_) = run.folder.rounds.read()
    for way in ("up", "down"):
        assert found["bytes"]["first_round"][way] == pytest.approx(first[f"{way}link_bytes"], rel=1e-6), way
    assert found["network"]["first_parameters"] >= found["network"]["final_parameters"]["most"]
    json.dumps(found)


@pytest.mark.parametrize("method", ["fedmetanas", "fednas", "meta_fedpnas"])
def test_where_nothing_is_learned_about_operations_bytes_are_exact(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alphas that stay where they began prune as they do in the estimate."""
    monkeypatch.setattr(whole, "DRAWS", 1)
    monkeypatch.setattr(whole, "LEARNED", 0.0)
    rates = {"meta_lr_alphas": 0.0, "task_lr_alphas": 0.0}
    experiment = prepared(tmp_path, method=method, **rates)
    found = estimate(experiment, Here)
    summary = run_all(begin_run(tmp_path, "run", experiment, tmp_path), LocalGrid(5))
    assert found["bytes"]["run"]["down"] == summary["downlink_bytes"]
    assert found["bytes"]["run"]["up"] == pytest.approx(
        summary["uplink_bytes"], rel=1e-6 if method != "meta_fedpnas" else 0.02
    )
    if method != "meta_fedpnas":  # its clients' own
        assert found["network"]["final_parameters"]["mean"] == summary["parameters"]


def test_compressed_bytes_are_those_of_a_real_encoding(tmp_path: Path) -> None:
    experiment = prepared(tmp_path, method="random_search", compression="int8")
    found = estimate(experiment, Here)
    summary = run_all(begin_run(tmp_path, "run", experiment, tmp_path), LocalGrid(5))
    assert found["bytes"]["run"]["up"] == pytest.approx(summary["uplink_bytes"], rel=0.03)
    plain = estimate(prepared(tmp_path, method="random_search"), Here)
    assert found["bytes"]["run"]["up"] < 0.6 * plain["bytes"]["run"]["up"]
    assert found["bytes"]["run"]["down"] == plain["bytes"]["run"]["down"]


# ---- seconds and memory


def test_every_part_of_the_time_is_counted(tmp_path: Path) -> None:
    experiment = prepared(tmp_path)
    found = estimate(experiment, Here)
    seconds = found["seconds"]
    assert seconds["loading"] == pytest.approx(0.25 * max(1, found["workers"]))  # on one core
    assert [phase["phase"] for phase in seconds["phases"]] == ["warm-up", "search", "one-hot"]
    assert sum(phase["rounds"] for phase in seconds["phases"]) == 8
    rounds = sum(phase["seconds"] for phase in seconds["phases"])
    assert rounds == pytest.approx(sum(seconds["rounds_by_part"].values()))
    assert all(value > 0 for value in seconds["rounds_by_part"].values())
    assert seconds["run"] == pytest.approx(seconds["loading"] + rounds + seconds["final"])
    assert seconds["command"] == pytest.approx(seconds["start"] + seconds["run"] + seconds["end"])
    assert seconds["rounds_by_part"]["clients"] >= seconds["compute"]  # on one core
    memory = found["memory"]
    assert memory["total"] == found["workers"] * memory["client"] + memory["server"] + memory["others"]


def test_a_local_method_has_nothing_to_evaluate_between_rounds(tmp_path: Path) -> None:
    found = estimate(prepared(tmp_path, method="local_darts"), Here)
    assert found["seconds"]["rounds_by_part"]["evaluation"] == 0.0
    assert [phase["stage"] for phase in found["seconds"]["phases"]] == ["search", "retraining"]


class Linear:
    """A probe that takes a second and a hundredth for every image; the first time as long again."""

    def __init__(self) -> None:
        self.count, self.ready, self.asked = 1, [{"seconds": 0.0, **sizes()}], list[int]()

    def ask(self, orders: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        self.asked.append(int(orders[0]["images"]))
        seconds = (1 + 0.01 * self.asked[-1]) * (2 if len(self.asked) == 1 else 1)
        return [{"seconds": seconds, "sent": 50, "whole": 100, "images": self.asked[-1], **sizes()}]


def test_large_clients_follow_from_two_small_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,200 images, 4 batches of 16 and twice as many are tried: 1.64 s and 2.28 s, so 13 s for all."""
    experiment = prepared(tmp_path, samples_per_client=1200)
    team = Linear()
    course = take_course(experiment.config, make_method(experiment.config, experiment.spec))
    measuring = clients._Measuring(team, experiment, course)
    found = measuring.segment(course.segments[0], 4)
    assert team.asked == [64, 128, 64]
    assert found == Work(pytest.approx(13.0), 50, 0.5, pytest.approx(2 * 1.64 - 13 * 64 / 1200))
    monkeypatch.setattr(clients, "BUDGET_S", 1e9)
    team.asked.clear()
    assert measuring.segment(course.segments[0], 4).seconds == pytest.approx(13.0)
    assert team.asked == [64, 1200]


def test_the_first_and_last_of_each_kind_are_measured_and_the_rest_from_afar(tmp_path: Path) -> None:
    experiment = prepare_experiment(Config.from_mapping({}), tmp_path)
    segments = take_course(experiment.config, make_method(experiment.config, experiment.spec)).segments
    must = clients._extremes(segments)
    assert must == [0, 1, len(segments) - 2, len(segments) - 1]
    order = clients._spread(len(segments), must)
    assert sorted([*must, *order]) == list(range(len(segments)))
    assert min(abs(order[0] - each) for each in must) >= (len(segments) - 3) // 2


# ---- the partition


def test_what_may_surprise_in_a_partition(tmp_path: Path) -> None:
    skewed = prepared(tmp_path, partition="label_skew", classes_per_client=1, samples_per_client=20, num_rounds=1)
    facts = about_partition(skewed, {1: (0, 1)})
    said = "\n".join(facts["warnings"])
    assert "clients with images of a single class: 0, 1, 2, 3, 4" in said
    held = {int(skewed.dataset.train.labels[share.train[0]]) for share in skewed.partition.shares}
    missing = ", ".join(str(label) for label in range(10) if label not in held)
    assert f"classes that no client holds: {missing}"[:50] in said
    used = len(np.unique(np.concatenate([share.train for share in skewed.partition.shares])))
    assert facts["images_unused"] == 1437 - used
    assert f"{1437 - used:,} of 1,437 training images are in no client's share" in said
    assert "2 clients will not come to train in so few rounds" in said  # of four, the fifth never does
    apart = about_partition(prepared(tmp_path, protocol="disjoint", partition="iid"), {1: (0, 1, 2, 3)})
    assert apart["images_shared"] == 0
    assert not any("several" in text or "single" in text or "will not" in text for text in apart["warnings"])


def test_tiny_shares_are_named(tmp_path: Path) -> None:
    facts = about_partition(prepared(tmp_path, samples_per_client=1), {1: (0, 1)})
    said = "\n".join(facts["warnings"])
    assert "clients with fewer than 2 training images: 0, 1, 2, 3, 4" in said
    assert "clients with fewer than 10 images to be measured on: 0, 1, 2, 3, 4" in said
    assert "batches of 1 make batch norm unreliable" in said


# ---- the command


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["resume=runs/a"], "resume: that run has begun"),
        (["dataset=nodes"], "dataset: an estimate needs images"),
        (["metod=fedavg"], "metod: unknown key"),
        (["method=fedavgg"], "did you mean fedavg?"),
        (["clients_per_round=0"], "clients_per_round"),
        (["--json", "--json"], "--json was given twice"),
        (["--jsn"], "is not KEY=VALUE"),
        (["dataset=nowhere.npz"], "nowhere.npz"),
    ],
    ids=str,
)
def test_refusals(words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main(["estimate", *words]) == cli.REFUSED
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert named in err
    assert list(tmp_path.iterdir()) == []


def test_both_forms_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """With probes that are processes of their own."""
    monkeypatch.chdir(tmp_path)
    words = [f"{key}={value}" for key, value in SMALL.items()]
    assert cli.main(["estimate", *words, "--json"]) == cli.COMPLETED
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["workers"] == worker_count(Config.from_mapping(SMALL), on_gpu=False)
    assert found["gpu"] is None
    assert found["memory"]["client"] > 2e8
    assert found["summary"] == summary_line(found)
    assert "note: fedpnas_samples, model: without effect in fedmetanas" in err
    lines = as_table(found).splitlines()
    assert lines[-1] == f"in short  {found['summary']}"
    assert max(len(line) for line in lines) <= 120
    for label in ("run", "partition", "network", "bytes", "memory", "time", "GPU", "notes"):
        assert any(line.startswith(label) for line in lines), label
    assert lines[1].strip() == "images of 1x8x8, 10 classes"
    assert any("warm-up" in line and "1 round of" in line for line in lines)
    assert list(tmp_path.iterdir()) == []  # no run folder


def test_a_probe_that_dies_is_told(tmp_path: Path) -> None:
    config = prepared(tmp_path).config
    with Team(config, 1) as team:
        pids = [probe.pid for probe in team._probes]
        team._probes[0].kill()
        with pytest.raises(ProcessDiedError, match="most likely for want of memory"):
            team.ask([{"do": "evaluate", "client": 0, "images": 4}])
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
