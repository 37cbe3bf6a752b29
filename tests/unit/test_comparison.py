"""Tables: how they are read, what they resume from, and the figures they give, worked by hand."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from fedmetanas_core.comparison import engine
from fedmetanas_core.comparison.engine import compare_table
from fedmetanas_core.comparison.picture import draw_curves
from fedmetanas_core.comparison.plan import read_table
from fedmetanas_core.comparison.report import as_csv, as_json, markdown
from fedmetanas_core.comparison.rows import row_of
from fedmetanas_core.comparison.statistics import cells_of, differences, reached, sentences, smoothed, spread
from fedmetanas_core.errors import RefusalError, RunFailedError
from fedmetanas_core.launch import Launch, Outcome
from fedmetanas_core.run.folder import RunFolder

TABLE = """
title = "A small table"
methods = ["fedmetanas", "random_search", "fednas"]
seeds = [0, 1, 2]

[settings]
num_clients = 6
clients_per_round = 2
num_rounds = 3

[[dataset]]
name = "digits"
target = 0.5
published = { fednas = "12.3" }
method.fednas = { meta_lr_weights = 0.05 }

[[partition]]
name = "Dirichlet 0.1"
dir_alpha = 0.1

[[partition]]
name = "evenly"
partition = "iid"
"""


def write(tmp_path: Path, text: str = TABLE) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(text)
    return path


def test_a_table_is_every_combination(tmp_path: Path) -> None:
    table = read_table(write(tmp_path))
    assert len(table.runs) == 3 * 2 * 3
    assert len({run.name for run in table.runs}) == len({run.fingerprint for run in table.runs}) == 18
    rates = {run.method: run.keys.get("meta_lr_weights") for run in table.runs}
    assert rates == {"fedmetanas": None, "random_search": None, "fednas": 0.05}
    assert {run.keys["partition"] for run in table.runs if run.partition.name == "evenly"} == {"iid"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('methods = ["fedmetanas", "random_search", "fednas"]', 'methods = ["fednass"]', "did you mean fednas"),
        ("seeds = [0, 1, 2]", "seeds = [0, 0]", "seeds is not a list of different values"),
        ("seeds = [0, 1, 2]", "sedes = [0]\nseeds = [0]", "sedes is unknown"),
        ("num_rounds = 3", "num_rounds = 0", "num_rounds: 0 is out of range"),
        ("num_rounds = 3", 'run_name = "x"', "run_name is not a setting of a table"),
        ("target = 0.5", "target = 50", "target 50 of digits"),
        ("method.fednas", "method.fedavg", "[method.fedavg] is not among the methods"),
        ("seeds = [0, 1, 2]", 'seeds = [0]\nmeasure = "speed"', "measure 'speed' is unknown"),
        ('name = "evenly"', "", "without a name"),
        ("[settings]", "[settings", "not TOML"),
        ("[settings]", "bandwidth_mbit = 0\n[settings]", "bandwidth_mbit 0 is not a number above 0"),
        ("[[dataset]]", "[dataset]", "[dataset] is a single table"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused_in_one_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in TABLE
    with pytest.raises(RefusalError) as refusal:
        read_table(write(tmp_path, TABLE.replace(old, new, 1)))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match=r"no\.toml: No such file"):
        read_table(tmp_path / "no.toml")


def fake_row(
    method: str, seed: int, accuracy: float, compute: float = 10.0, partition: str = "evenly"
) -> dict[str, Any]:
    curve = [
        {"round": round_, "stage": 0, "accuracy": accuracy * share, "bytes": 100 * round_,
         "compute_seconds": compute * share, "parallel_seconds": 1.0}
        for round_, share in ((1, 0.25), (2, 0.5), (3, 1.0), (4, 1.0), (5, 1.0))
    ]  # fmt: skip
    return {
        "method": method, "dataset": "digits", "partition": partition, "seed": seed, "test_accuracy": accuracy,
        "compute_seconds": compute, "parallel_seconds": 1.0, "curve": curve, "events": [], "commit": "abc",
        "versions": {"torch": "2"}, "hardware": "a machine", "device": "cpu", "round_std": 0.01, "rounds": 5,
        "client_accuracy_std": 0.02, "test_accuracy_supernet": accuracy,
    }  # fmt: skip


def test_spreads_are_sample_deviations() -> None:
    found = spread([1.0, 3.0, None])
    assert found is not None
    assert (found.mean, found.count) == (2.0, 2)
    assert found.std == pytest.approx(2**0.5)
    assert spread([None]) is None
    assert spread([4.0]).std is None  # type: ignore[union-attr]


def test_a_target_is_reached_when_the_smoothed_curve_is_there() -> None:
    """Accuracies 0.2, 0.4, 0.8, 0.8, 0.8: running means of three 0.2, 0.3, 0.467, 0.667, 0.8."""
    row = fake_row("fednas", 0, 0.8)
    assert smoothed(row["curve"]) == pytest.approx([0.2, 0.3, 1.4 / 3, 2 / 3, 0.8])
    found = reached([row, fake_row("fednas", 1, 0.1)], [0.6, 0.6])
    assert (found.seeds, found.of, found.rounds, found.bytes) == (1, 2, 4.0, 400.0)


def test_a_target_counts_only_in_the_stage_that_is_kept() -> None:
    row = fake_row("fednas", 0, 0.8)
    for at in row["curve"][:4]:
        at["stage"] = 0
    row["curve"][4] = {**row["curve"][4], "stage": 1, "accuracy": 0.7}
    assert reached([row], [0.6]).rounds == 5.0
    assert reached([row], [0.75]).seeds == 0


def test_a_paired_difference_with_its_interval_by_hand(tmp_path: Path) -> None:
    """Gaps 0.1, 0.2, 0.3: mean 0.2, error 0.1 / sqrt(3); t = 4.3027 for two degrees of freedom; p = 0.0742."""
    table = read_table(write(tmp_path))
    rows = [fake_row("fedmetanas", seed, 0.9, 5.0) for seed in range(3)]
    rows += [fake_row("fednas", seed, 0.8 - 0.1 * seed, 20.0) for seed in range(3)]
    (found,) = differences(table, cells_of(table, rows))
    assert found.mean == pytest.approx(0.2)
    assert found.low == pytest.approx(0.2 - 4.30265 * 0.1 / 3**0.5, abs=1e-5)
    assert found.high == pytest.approx(0.2 + 4.30265 * 0.1 / 3**0.5, abs=1e-5)
    assert found.p == pytest.approx(0.07418, abs=1e-5)
    assert found.adjusted == found.p
    assert not found.real
    assert found.compute_ratio == pytest.approx(0.25)
    (line,) = sentences(table, [found])
    assert "20.0 points above fednas" in line
    assert "not told apart from chance" in line
    assert "computed 0.25 times as long" in line


def test_holm_corrects_for_the_number_of_comparisons(tmp_path: Path) -> None:
    """Two comparisons: the smaller p doubles, the larger stays, and neither falls below the one before."""
    table = read_table(write(tmp_path))
    rows = [fake_row("fedmetanas", seed, 0.9) for seed in range(3)]
    rows += [fake_row("random_search", seed, 0.8 - 0.001 * seed) for seed in range(3)]
    rows += [fake_row("fednas", seed, 0.8 - 0.1 * seed) for seed in range(3)]
    small, large = differences(table, cells_of(table, rows))
    assert small.p is not None
    assert small.adjusted == pytest.approx(2 * small.p)
    assert small.real
    assert large.adjusted == large.p
    assert not large.real


def test_one_seed_gives_no_interval(tmp_path: Path) -> None:
    table = read_table(write(tmp_path))
    (found,) = differences(table, cells_of(table, [fake_row("fedmetanas", 0, 0.9), fake_row("fednas", 0, 0.8)]))
    assert found.low is found.p is None
    assert "with 1 seed no interval" in sentences(table, [found])[0]


def test_a_page_of_all_three_kinds_and_the_same_picture_twice(tmp_path: Path) -> None:
    table = read_table(write(tmp_path))
    rows = [fake_row(method, seed, 0.9) for method in table.methods for seed in range(2)]
    cells = cells_of(table, rows)
    page = markdown(table, cells, differences(table, cells), "fedmetanas compare small.toml")
    for words in ("6 of 18 runs so far", "90.00 ± 0.00", "| fednas |", "12.3", "target of 50.0 %", "seeds: 0, 1"):
        assert words in page
    assert as_csv(cells).splitlines()[0].startswith("method,dataset,partition,seeds,test_accuracy")
    assert len(as_csv(cells).splitlines()) == 4
    assert json.loads(as_json(table, cells, []))["cells"][0]["method"] == "fedmetanas"
    picture = draw_curves(table, cells)
    assert picture == draw_curves(table, cells)
    for words in ("fednas", "rounds", "digits, evenly", "<svg"):
        assert words in picture


def finished(launch: Launch) -> Outcome:
    """A completed run of two rounds in the launch's folder, without running anything."""
    folder = RunFolder.create(launch.folder.path.parent, launch.folder.name)
    folder.write_config({"commit": "abc", "device": "cpu", "versions": {"torch": "2"}, "evaluate_every": 1})
    for number in (1, 2):
        folder.append_round(
            {
                "round": number, "clients": [0, 1], "uplink_bytes": 3_000_000, "downlink_bytes": 1_000_000,
                "test_accuracy": 0.5 * number, "stage": 0, "compute_seconds": 4.0, "longest_compute_seconds": 3.0,
            }
        )  # fmt: skip
    folder.write_summary({"test_accuracy": 0.9, "client_accuracy_mean": 0.8, "pruning_events": []})
    return Outcome("completed", "", 1.5, True)


def test_parallel_time_is_the_slowest_client_and_its_transfer(tmp_path: Path) -> None:
    """4 MB over two clients at 8 Mbit/s take 2 s each round; 3 s of compute: 5 s a round."""
    run = read_table(write(tmp_path)).runs[0]
    launch = type("L", (), {"folder": RunFolder(tmp_path / "run")})()
    finished(launch)
    row = row_of(run, launch.folder, 8.0)
    assert row["compute_seconds"] == 8.0
    assert row["parallel_seconds"] == pytest.approx(10.0)
    assert row["curve"][-1]["bytes"] == 8_000_000


class Runs:
    """Stands in for launching: counts, and stops where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int = 0, fail_at: int = 0) -> None:
        self.made: list[str] = []
        self.stop_at, self.fail_at = stop_at, fail_at
        monkeypatch.setattr(engine, "start", self.start)

    def start(self, launch: Launch, follower: Any, say: Any) -> Outcome:
        assert isinstance(follower(), AbstractContextManager)
        if len(self.made) + 1 == self.stop_at:
            return Outcome("interrupted", "interrupted by the user", 0.1, False)
        self.made.append(launch.folder.name)
        if len(self.made) == self.fail_at:
            return Outcome("failed", "no more memory", 0.1, False)
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
    assert not set(first.made) & set(second.made)
    assert "18 runs, 4 of them are there" in lines[0]
    assert "left" in lines[1]
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
