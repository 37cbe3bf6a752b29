"""A run that goes on from its last state arrives at the same bytes as one that was never interrupted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from local_grid import LocalGrid, run_all

from fedmetanas_core.config import Config
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.methods.registry import METHODS
from fedmetanas_core.preflight import prepare_experiment
from fedmetanas_core.run.checkpoint import PREVIOUS_FILE, STATE_FILE
from fedmetanas_core.run.folder import RunFolder
from fedmetanas_core.run.ownership import LAUNCHER, WRITER, OwnedError, owned
from fedmetanas_core.runs import Run, begin_run, is_complete, reopen_run
from server_app.loop import RoundLoop

SMALL = {
    "num_clients": 5,
    "clients_per_round": 2,
    "num_rounds": 6,
    "local_epochs": 1,
    "init_channels": 2,
    "num_cells": 3,
    "num_nodes": 2,
    "evaluate_every": 2,
    "samples_per_client": 24,
    "search_fraction": 0.7,
    "fedpnas_samples": 1,
}


class StoppedError(Exception):
    """Stands in for a SIGKILL."""


def begin(tmp_path: Path, name: str, **values: Any) -> Run:
    experiment = prepare_experiment(Config.from_mapping({**SMALL, **values}), tmp_path)
    return begin_run(tmp_path, name, experiment, tmp_path)


def stop_when(monkeypatch: pytest.MonkeyPatch, round_number: int, saved: bool) -> None:
    """Let the next run end in this round: before its state is saved but after its row is written, or after that."""
    save = RoundLoop._save

    def stopping(self: RoundLoop) -> None:
        if self.state.round == round_number and not saved:
            raise StoppedError
        save(self)
        if self.state.round == round_number:
            raise StoppedError

    monkeypatch.setattr(RoundLoop, "_save", stopping)


def break_off(monkeypatch: pytest.MonkeyPatch, run: Run, grid: LocalGrid, round_number: int, saved: bool) -> None:
    """One session that ends in this round; see ``stop_when``."""
    with monkeypatch.context() as patch:
        stop_when(patch, round_number, saved)
        with pytest.raises(StoppedError):
            run_all(reopen_run(run.folder.path), grid)


def results(run: Run) -> dict[str, bytes]:
    """All files that the run's figures do not share with its times."""
    files = [path for path in run.folder.model_directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(run.folder.path)): path.read_bytes() for path in files}


def rows(run: Run) -> list[dict[str, Any]]:
    times = ("seconds", "compute_seconds", "longest_compute_seconds", "notes")
    return [{key: value for key, value in row.items() if key not in times} for row in run.folder.rounds.read()]


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if "seconds" not in key and "memory" not in key}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_to_the_same_bytes(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken off twice, once with a row too many; other objects, the clients' own disks the same."""
    whole, broken = (begin(tmp_path, name, method=method) for name in ("whole", "broken"))
    expected = without_times(run_all(whole, LocalGrid(5)))
    grid = LocalGrid(5)
    for round_number, saved in ((2, True), (4, False)):
        break_off(monkeypatch, broken, grid, round_number, saved)
    assert len(broken.folder.rounds.read()) == 4
    found = without_times(run_all(reopen_run(broken.folder.path), grid))
    assert found.pop("resumed_after") == [2, 3]
    assert expected.pop("resumed_after") == []
    assert found == expected
    assert rows(broken) == rows(whole)
    notes = [row["notes"] for row in broken.folder.rounds.read()]
    assert [{"client": None, "note": "resumed with the state of round 2"} in each for each in notes].index(True) == 2
    assert results(broken) == results(whole)


def test_compressed_updates_go_on_with_what_they_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = (begin(tmp_path, name, compression="int8") for name in ("whole", "broken"))
    run_all(whole, LocalGrid(5))
    grid = LocalGrid(5)
    break_off(monkeypatch, broken, grid, 4, saved=False)
    run_all(reopen_run(broken.folder.path), grid)
    assert results(broken) == results(whole)


def test_a_run_has_its_first_state_before_anything_runs(tmp_path: Path) -> None:
    run = begin(tmp_path, "new")
    state, tally = reopen_run(run.folder.path).load()
    assert (state.round, tally.uplink_bytes) == (0, 0)
    assert torch.equal(state.weights, run.method().initial_state().weights)
    assert not is_complete(run.folder.path)


def test_the_state_before_serves_where_the_newest_is_damaged_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = (begin(tmp_path, name, method="fedrep") for name in ("whole", "broken"))
    run_all(whole, LocalGrid(5))
    grid = LocalGrid(5)
    break_off(monkeypatch, broken, grid, 4, saved=True)
    newest = broken.folder.checkpoint_directory / STATE_FILE
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    with pytest.raises(RefusalError, match=rf"{STATE_FILE}.*checksum.*of round 3, is whole: remove that file"):
        reopen_run(broken.folder.path)
    newest.unlink()
    run_all(reopen_run(broken.folder.path), grid)
    assert results(broken) == results(whole)


def broken_run(tmp_path: Path, how: str) -> Path:
    run = begin(tmp_path, "run")
    folder = run.folder
    states = folder.checkpoint_directory
    if how == "no state":
        (states / STATE_FILE).unlink()
    elif how == "pickle":
        torch.save({"weights": torch.ones(3)}, states / STATE_FILE)
    elif how == "another network":
        other = begin(tmp_path, "other", init_channels=4)
        (states / STATE_FILE).write_bytes((other.folder.checkpoint_directory / STATE_FILE).read_bytes())
    elif how == "older config":
        lines = folder.config_file.read_text().splitlines()
        folder.config_file.write_text("\n".join(line for line in lines if not line.startswith("run_id")))
    elif how == "damaged config":
        folder.config_file.write_text("method: [fedmetanas")
    elif how == "bad value":
        folder.config_file.write_text(folder.config_file.read_text().replace("momentum: 0.9", "momentum: 9.0"))
    elif how == "other images":
        folder.config_file.write_text(folder.config_file.read_text().replace("partition_hash: ", "partition_hash: 0"))
    elif how == "damaged rounds":
        (states / PREVIOUS_FILE).write_bytes(b"")
        (states / STATE_FILE).write_bytes(b"")
    return folder.path


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no state", "there is no checkpoint"),
        ("pickle", "not a safetensors file"),
        ("another network", "not that of this run"),
        ("older config", "lacks run_id, so it is of another version"),
        ("damaged config", "cannot read"),
        ("bad value", "momentum: 9.0 is out of range"),
        ("other images", "not those it began with"),
        ("damaged rounds", "truncated"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused_in_one_line(tmp_path: Path, how: str, words: str) -> None:
    path = broken_run(tmp_path, how)
    with pytest.raises(RefusalError) as refusal:
        reopen_run(path)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_folder_has_one_launcher_and_one_writer(tmp_path: Path) -> None:
    with owned(tmp_path, LAUNCHER), owned(tmp_path, WRITER):
        for role in (LAUNCHER, WRITER):
            with pytest.raises(OwnedError, match="in use by process"), owned(tmp_path, role):
                pytest.fail("two at once")
    with owned(tmp_path, WRITER):
        pass


def test_a_row_that_came_after_the_state_is_forgotten(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    for number in (1, 2, 3):
        folder.rounds.append({"round": number, "loss": 0.1 * number})
    with folder.rounds.path.open("a") as file:
        file.write('{"round": 4, "lo')
    folder.write_summary({"status": "failed"})
    folder.rewind(2)
    assert folder.rounds.path.read_text() == '{"round": 1, "loss": 0.1}\n{"round": 2, "loss": 0.2}\n'
    assert folder.read_summary() is None
