"""What `compare` runs, what it resumes from, and what it refuses before anything starts."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from tables import TABLE, write

from fedmetanas_core.comparison import engine
from fedmetanas_core.comparison.engine import compare_table
from fedmetanas_core.comparison.plan import read_table
from fedmetanas_core.comparison.rows import row_of
from fedmetanas_core.errors import RefusalError, RunFailedError
from fedmetanas_core.launch import Launch, Outcome, prepare_launch
from fedmetanas_core.run.fingerprint import code_fingerprint
from fedmetanas_core.run.folder import RunFolder


def finished(launch: Launch) -> Outcome:
    """A completed run of two rounds in the launch's folder, without running anything."""
    folder = RunFolder.create(launch.folder.path.parent, launch.folder.name)
    experiment = launch.experiment
    folder.write_config(
        {
            **experiment.config.to_dict(), "commit": "abc", "device": "cpu", "versions": {"torch": "2"},
            "evaluate_every": experiment.config.evaluate_every, "code_fingerprint": code_fingerprint(),
            "partition_hash": experiment.partition.hash(),
        }
    )  # fmt: skip
    for number in (1, 2):
        folder.rounds.append(
            {
                "round": number, "clients": [0, 1], "uplink_bytes": 3_000_000, "downlink_bytes": 1_000_000,
                "test_accuracy": 0.5 * number, "stage": 0, "compute_seconds": 4.0, "longest_compute_seconds": 3.0,
            }
        )  # fmt: skip
    accuracies = {"test_accuracy": 0.9, "client_accuracy_mean": 0.8}
    folder.write_summary({**accuracies, "pruning_events": [], "status": "completed", "seconds": 1.0})
    return Outcome("completed", "", 1.5)


def test_parallel_time_is_the_slowest_client_and_its_transfer(tmp_path: Path) -> None:
    """4 MB over two clients at 100 Mbit/s take 0.16 s each round; 3 s of compute: 3.16 s a round."""
    run = read_table(write(tmp_path)).runs[0]
    launch = prepare_launch({**run.keys, "run_name": "run", "evaluate_every": 1}, tmp_path)
    finished(launch)
    row = row_of(run, launch.folder)
    assert row["compute_seconds"] == 8.0
    assert (row["keys"].get("batch_size"), row["settings"]["batch_size"]) == (None, 16)
    assert "run_name" not in row["settings"]
    assert row["parallel_seconds"] == pytest.approx(6.32)
    assert row["curve"][-1]["bytes"] == 8_000_000
    assert (row["test_accuracy_last"], row["round_std"]) == (1.0, None)  # a fifth of two rounds: the last one


class Runs:
    """Stands in for launching: counts, and stops where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int = 0, fail_at: int = 0) -> None:
        self.made: list[str] = []
        self.refuses = False
        self.stop_at, self.fail_at = stop_at, fail_at
        monkeypatch.setattr(engine, "start", self.start)

    def start(self, launch: Launch, follower: Any, say: Any) -> Outcome:
        assert isinstance(follower(), AbstractContextManager)
        if len(self.made) + 1 == self.stop_at:
            return Outcome("interrupted", "interrupted by the user", 0.1)
        self.made.append(launch.folder.name)
        say("starting Flower ...")
        say(f"note: of {launch.folder.name}")
        if len(self.made) == self.fail_at:
            if self.refuses:
                raise RefusalError("the run is in use", "wait")
            return Outcome("failed", "no more memory", 0.1)
        return finished(launch)


def compare(tmp_path: Path, path: Path) -> tuple[engine.Compared, list[str]]:
    lines: list[str] = []
    return compare_table(path, tmp_path / "results", tmp_path, lines.append), lines


def test_a_table_goes_on_where_it_stopped_and_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    first = Runs(monkeypatch, stop_at=5)
    compared, lines = compare(tmp_path, path)
    assert compared.status == "interrupted"
    assert len(first.made) == 4
    assert "the same command goes on from here" in lines[-1]
    second = Runs(monkeypatch)
    compared, lines = compare(tmp_path, path)
    assert compared.status == "completed"
    assert len(second.made) == 14
    assert [line.strip() for line in lines if "note" in line] == [f"note: of {name}" for name in second.made]
    assert not any("Flower" in line for line in lines)
    assert not set(first.made) & set(second.made)
    assert "18 runs, 4 of them are there" in lines[0]
    assert lines[1].endswith(", about 21 s left")  # 14 runs of 1.5 s each
    third = Runs(monkeypatch)
    compared, _ = compare(tmp_path, path)
    assert third.made == []
    assert compared.written == tmp_path / "results/small/table.md"
    names = {item.name for item in (tmp_path / "results/small").iterdir()}
    assert names == {"table.md", "table.csv", "table.json", "curves.svg", "rows"}
    assert len(list((tmp_path / "results/small/rows").glob("*.json"))) == 18


def test_a_run_with_other_settings_is_made_again_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Runs(monkeypatch)
    compare(tmp_path, write(tmp_path))
    again = Runs(monkeypatch)
    compare(tmp_path, write(tmp_path, TABLE.replace("meta_lr_weights = 0.05", "meta_lr_weights = 0.1")))
    assert len(again.made) == 6
    assert all(name.startswith("fednas--") and name.endswith("--2") for name in again.made)


def test_a_finished_run_without_a_row_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Runs(monkeypatch)
    compare(tmp_path, write(tmp_path))
    rows = tmp_path / "results/small/rows"
    lost = sorted(rows.iterdir())[:3]
    kept = [path.read_text() for path in lost]
    for path in lost:
        path.unlink()
    again = Runs(monkeypatch)
    compared, lines = compare(tmp_path, write(tmp_path))
    assert compared.status == "completed"
    assert again.made == []
    assert sum("holds it" in line for line in lines) == 3
    without = [{**json.loads(text), "wall_seconds": None} for text in kept]
    assert [json.loads(path.read_text()) for path in lost] == without


@pytest.mark.parametrize("what", ["code_fingerprint", "pick_device"])
def test_a_finished_run_of_other_code_or_device_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    Runs(monkeypatch)
    compare(tmp_path, write(tmp_path))
    sorted((tmp_path / "results/small/rows").iterdir())[0].unlink()
    monkeypatch.setattr(engine, what, lambda *given: "another")
    again = Runs(monkeypatch)
    compare(tmp_path, write(tmp_path))
    assert len(again.made) == 1
    assert again.made[0].endswith("--2")


def test_rows_of_another_table_serve_where_they_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Runs(monkeypatch)
    compare(tmp_path, write(tmp_path))
    other = tmp_path / "other.toml"
    other.write_text(TABLE.replace("seeds = [0, 1, 2]", 'seeds = [0, 7]\nrows_from = ["small"]'))
    again = Runs(monkeypatch)
    written = compare(tmp_path, other)[0].written
    assert len(again.made) == 6
    assert all("seed7" in name for name in again.made)
    assert "`rows/` or `../small/rows/`" in written.read_text()


def test_a_failed_run_is_named_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Runs(monkeypatch, fail_at=2)
    compared, lines = compare(tmp_path, write(tmp_path))
    assert compared.status == "failed"
    assert "random_search on digits, Dirichlet 0.1, seed 0: no more memory" in lines[-1]
    again = Runs(monkeypatch)
    assert compare(tmp_path, write(tmp_path))[0].status == "completed"
    assert len(again.made) == 1


def test_a_run_that_cannot_start_does_not_end_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch, fail_at=1)
    runs.refuses = True
    compared, lines = compare(tmp_path, write(tmp_path))
    assert compared.status == "failed"
    assert len(runs.made) == len(read_table(write(tmp_path)).runs)
    assert "the run is in use" in lines[-1]


def test_where_a_run_is_computed_makes_no_other_run_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = write(tmp_path)
    Runs(monkeypatch)
    compare(tmp_path, here)
    there = write(tmp_path, TABLE.replace("[settings]", '[settings]\nray_address = "10.0.0.5:6379"'))
    again = Runs(monkeypatch)
    assert compare(tmp_path, there)[0].status == "completed"
    assert again.made == []


def test_a_damaged_row_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Runs(monkeypatch)
    compare(tmp_path, write(tmp_path))
    row = sorted((tmp_path / "results/small/rows").iterdir())[0]
    row.write_text("{")
    with pytest.raises(RunFailedError, match="is damaged"):
        compare(tmp_path, write(tmp_path))


def test_nobody_else_fills_the_same_table_meanwhile(tmp_path: Path) -> None:
    with engine._alone(tmp_path / "results/small"), pytest.raises(RefusalError, match="another compare"):
        compare(tmp_path, write(tmp_path))


def test_a_dataset_that_is_not_there_is_refused_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(monkeypatch)
    text = TABLE.replace("[[partition]]", '[[dataset]]\nname = "own"\ndataset = "/nowhere/x.npz"\n\n[[partition]]', 1)
    with pytest.raises(RefusalError, match="nowhere"):
        compare(tmp_path, write(tmp_path, text))
    assert runs.made == []
    assert not (tmp_path / "results").exists()


def test_what_a_method_cannot_do_is_refused_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(monkeypatch)
    text = TABLE.replace('"fednas"]', '"fednas", "fedpnas"]').replace("num_rounds", "num_cells = 1\nnum_rounds")
    with pytest.raises(RefusalError, match=r"fedpnas on digits, .*: num_cells: 1 leaves no cell to share"):
        compare(tmp_path, write(tmp_path, text))
    assert runs.made == []


def test_methods_that_would_not_have_the_same_images_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(monkeypatch)
    text = TABLE.replace("{ meta_lr_weights = 0.05 }", "{ samples_per_client = 20 }")
    with pytest.raises(RefusalError, match=r"fednas on digits, .*: its clients hold other images"):
        compare(tmp_path, write(tmp_path, text))
    assert runs.made == []


@pytest.mark.parametrize("name", ["../evenly", "x" * 300])
def test_a_name_that_makes_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    runs = Runs(monkeypatch)
    with pytest.raises(RefusalError, match="give plain, short names in the table"):
        compare(tmp_path, write(tmp_path, TABLE.replace('name = "evenly"', f'name = "{name}"')))
    assert runs.made == []


def test_a_complete_table_needs_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Runs(monkeypatch)
    compare(tmp_path, write(tmp_path))
    monkeypatch.setattr(engine, "prepare_launch", lambda *given: pytest.fail("nothing is to be run"))
    assert compare(tmp_path, write(tmp_path))[0].status == "completed"


BORROWING = [path for path in (Path(__file__).parents[2] / "conf").glob("*.toml") if "rows_from" in path.read_text()]


@pytest.mark.parametrize("path", BORROWING, ids=lambda path: path.stem)
def test_a_table_that_borrows_shares_runs_with_its_lenders(path: Path) -> None:
    """Rates that are mended in one file alone would silently end the borrowing."""
    table = read_table(path)
    own = {(run.name, run.fingerprint) for run in table.runs}
    for lender in table.rows_from:
        lent = read_table(path.with_name(f"{lender}.toml"))
        theirs = {run.name for run in lent.runs}
        shared = own & {(run.name, run.fingerprint) for run in lent.runs}
        assert {name for name, _ in shared} == theirs & {run.name for run in table.runs}
        assert shared
