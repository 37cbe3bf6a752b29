"""Runs on disks that are full, or can no longer be written to."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from local_grid import LocalGrid, run_all

from fedmetanas_core import launch
from fedmetanas_core.config import Config
from fedmetanas_core.errors import FedMetaNASError, ProcessDiedError, RunFailedError
from fedmetanas_core.preflight import prepare_experiment
from fedmetanas_core.run.ownership import WRITER, OwnedError, is_owned, owned
from fedmetanas_core.runs import begin_run, reopen_run

KEYS = {
    "num_clients": 3,
    "clients_per_round": 2,
    "num_rounds": 5,
    "local_epochs": 1,
    "init_channels": 2,
    "num_cells": 3,
    "num_nodes": 2,
    "run_name": "run",
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "fedmetanas", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


class Meddling(LocalGrid):
    """Does something to the disk when the clients of a round are asked."""

    def __init__(self, when: int, deed: Any) -> None:
        super().__init__(3)
        self.when, self.deed, self.rounds = when, deed, 0

    def replies(self, messages: list[Message]) -> list[Message]:  # type: ignore[override]
        self.rounds += messages[0].metadata.message_type == "train"
        if self.rounds == self.when:
            self.deed()
        return super().replies(messages)


def fill(disk: Path) -> None:
    """Leave no room at all."""
    with (disk / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            return


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)


@pytest.mark.parametrize(
    ("spoil", "mend", "word"),
    [
        (fill, lambda disk: (disk / "filler").unlink(), "No space left on device"),
        (lambda disk: remount(disk, "ro"), lambda disk: remount(disk, "rw"), "Read-only file system"),
    ],
    ids=["full", "read-only"],
)
def test_a_run_on_a_disk_that_fails_ends_named_and_goes_on_once_it_is_mended(
    disk: Path, tmp_path: Path, spoil: Any, mend: Any, word: str
) -> None:
    experiment = prepare_experiment(Config.from_mapping(KEYS), tmp_path)
    whole = begin_run(tmp_path / "whole", "run", experiment, tmp_path)
    run_all(whole, LocalGrid(3))
    broken = begin_run(disk, "run", experiment, tmp_path)
    with pytest.raises(FedMetaNASError, match=rf"{disk}.*{word}"):
        run_all(broken, Meddling(3, lambda: spoil(disk)))
    mend(disk)
    again = reopen_run(broken.folder.path)
    assert again.load()[0].round == 2
    run_all(again, LocalGrid(3))
    files = [run.folder.model_directory / "weights.safetensors" for run in (whole, again)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_lock_is_seen_and_taken_on_a_disk_that_fails(disk: Path) -> None:
    view = disk.with_name("view")  # the same folder, as a system sees it that has found errors on the disk
    view.mkdir()
    with owned(disk, WRITER):
        subprocess.run(["mount", "--bind", str(disk), str(view)], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(view)], check=True)
            assert is_owned(view, WRITER)
            with pytest.raises(OwnedError, match="Read-only file system"), owned(view, WRITER):
                pass
        finally:
            subprocess.run(["umount", "--lazy", str(view)], check=True)
    assert not is_owned(disk, WRITER)
    fill(disk)
    with owned(disk, WRITER):
        assert is_owned(disk, WRITER)


def test_the_launching_command_says_that_the_disk_is_full(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server could not say so: it had no room for its last words."""
    monkeypatch.setattr(launch, "POLL_S", 0.01)
    monkeypatch.setattr(launch, "GONE_S", 0.05)
    experiment = prepare_experiment(Config.from_mapping(KEYS), disk)
    run = begin_run(disk, "run", experiment, disk)
    with owned(run.folder.path, WRITER):
        assert is_owned(run.folder.path, WRITER)
    fill(disk)
    server = ExitStack()
    server.enter_context(owned(run.folder.path, WRITER))

    class Flower:
        def status(self) -> tuple[str, str]:
            server.close()
            return "finished:failed", "No heartbeat received from the task"

    with pytest.raises(RunFailedError, match=r"gone without a word.*No space left on device") as failure:
        launch._follow(Flower(), run.folder, Silent())  # type: ignore[arg-type]
    assert not isinstance(failure.value, ProcessDiedError), "going on would not mend it"


class Silent:
    def update(self, row: object) -> None:
        pass
