"""The commands and Python of README.md and the documentation, typed as they stand there, one page after the other.

`fedmetanas` runs in this process, as its console script would run it; the tutorial's search starts Flower. Other
searches do everything but that: their rounds run here as well. What is put behind a command to save time stands in
docs_commands.PROVEN.
"""

import glob
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from docs_commands import PAGES, ROOT, Command, Run, blocks, commands, lines_of, proof_of
from finished import finished_run
from local_grid import LocalGrid, run_all
from PIL import Image
from searching import command, processes_of

from fedmetanas_core.cli import main
from fedmetanas_core.launch import Launch, Outcome
from fedmetanas_core.output.report.files import show_result
from fedmetanas_core.run.folder import blank_summary
from fedmetanas_core.runs import begin_run

pytestmark = pytest.mark.e2e

TUTORIAL = ROOT / "docs" / "tutorial.md"
WITH_PYTHON = {"README.md", "docs/tutorial.md", "docs/own-data.md"}  # other pages' is run by tests of its own
RUN_HERE = [page for page in PAGES if any(isinstance(proof_of(line), Run) for line in commands(page))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME and OTHER, two finished runs on digits."""
    folder = tmp_path_factory.mktemp("finished") / "runs"
    for seed, name in enumerate(("NAME", "OTHER")):
        finished_run(folder, name, seed=seed, unseen_clients=2)
    return folder


def search_here(launch: Launch, *others: object) -> Outcome:
    """What launch.start does, without Flower's processes."""
    folder, config = launch.folder, launch.experiment.config
    run = begin_run(folder.path.parent, folder.name, launch.experiment, launch.app)
    summary = blank_summary(config) | run_all(run, LocalGrid(config.num_clients))
    folder.write_summary({**summary, "rounds": len(folder.rounds.read()), "status": "completed"})
    assert show_result(folder) == ""
    return Outcome("completed", "", 1.0, folder.read_summary() or {})


@pytest.fixture
def place(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone's folders, and whatever images and runs people have who follow a page from its middle."""
    for name in ("conf", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    monkeypatch.delenv("FEDMETANAS_RUNS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def furnish(place: Path, runs: Path) -> None:
    """Ten small images of each of three classes and of the digits, and the finished runs."""
    rng = np.random.default_rng(0)
    for folder, classes in (("photos", 3), ("new", 10)):
        for number in range(20 * classes):
            file = place / folder / str(number % classes) / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(file)
    images, labels = rng.integers(0, 256, (200, 16, 16), dtype=np.uint8), np.arange(200) % 3
    np.savez(place / "images.npz", x_train=images[:150], y_train=labels[:150], x_test=images[150:], y_test=labels[150:])
    (place / "runs").mkdir()
    for run in runs.iterdir():
        (place / "runs" / run.name).symlink_to(run)
    (place / "more").mkdir()
    for name in ("photo.jpg", "more/1.png"):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(place / name)


def typed(words: list[str], place: Path, page: Path) -> int:
    """Run one command; its exit code."""
    program, *arguments = words
    if program == "python":
        return subprocess.run([sys.executable, *arguments], cwd=place, check=False).returncode
    assert program == "fedmetanas"
    if page == TUTORIAL and arguments[0] == "search":
        done = command(place, *arguments)
        assert processes_of(place) == []
        print(done.stderr)
        return done.returncode
    return main(arguments)


@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_tells_to_type(page: Path, place: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmetanas_core.commands.search.start", search_here)
    name, count = page.relative_to(ROOT).as_posix(), 0
    if page != TUTORIAL:  # which makes everything that it needs
        furnish(place, runs)
    for kind, text in blocks(page):
        if kind == "python" and name in WITH_PYTHON:
            subprocess.run([sys.executable, "-W", "ignore", "-c", text], cwd=place, check=True)
            count += 1
        for line in lines_of(text) if kind == "bash" else ():
            proof: Any = proof_of(Command(name, line))
            if not isinstance(proof, Run):
                continue
            words = [found for word in shlex.split(line) for found in sorted(glob.glob(word)) or [word]]
            assert typed([*words, *proof.small.split()], place, page) == 0, line
            count += 1
    assert count > 0
    if page == TUTORIAL:
        assert {"adapted", "model", "pictures", "report.html"} <= set(os.listdir(place / "runs" / "first"))
        assert (place / "runs" / "first" / "model" / "network.onnx").is_file()
