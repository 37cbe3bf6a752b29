"""Tables: how they are read, and the figures they give, worked by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from tables import TABLE, write

from fedmetanas_core.comparison.picture import _draw, _is_wide, draw_curves
from fedmetanas_core.comparison.plan import read_table
from fedmetanas_core.comparison.report import as_csv, as_json, markdown
from fedmetanas_core.comparison.statistics import (
    Difference,
    _holm,
    cells_of,
    differences,
    reached,
    sentences,
    smoothed,
    spread,
    verdict,
)
from fedmetanas_core.errors import RefusalError


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
        ("[settings]", "bandwidth_mbit = 0\n[settings]", "bandwidth_mbit is unknown"),
        ("[[dataset]]", "[dataset]", "[dataset] is not [[dataset]]"),
        ("seeds = [0, 1, 2]", 'seeds = [0]\nrows_from = ["nowhere"]', "no nowhere.toml beside it"),
        ("seeds = [0, 1, 2]", 'seeds = [0]\nrows_from = ["../conf/x"]', "no ../conf/x.toml beside it"),
        ("seeds = [0, 1, 2]", "seeds = [0]\nrows_from = 0", "rows_from is not a list of different values"),
        ('name = "evenly"', 'name = "evenly"\ndataset = "mnist"', "[[partition]] evenly names a dataset"),
        ("[settings]", "settings = 3\n[other]", "other is unknown"),
        ("target = 0.5", "target = true", "target True of digits"),
        ('{ fednas = "12.3" }', '"12.3"', "published = '12.3' is not a table of keys"),
        ("{ meta_lr_weights = 0.05 }", "3", "fednas = 3 is not a table of keys"),
        ('{ fednas = "12.3" }', '{ fedavg = "1" }', "[published.fedavg] is not among the methods"),
        ('name = "evenly"', 'name = "Dirichlet-0.1"', "have the same file name"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused_in_one_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in TABLE
    with pytest.raises(RefusalError) as refusal:
        read_table(write(tmp_path, TABLE.replace(old, new, 1)))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


HEAD = 'methods = ["fedmetanas"]\nseeds = [0]\n'
PLACES = '[[dataset]]\nname = "digits"\n[[partition]]\nname = "evenly"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"settings = 3\n{HEAD}{PLACES}", "settings = 3 is not a table of keys"),
        (f'dataset = ["digits"]\n{HEAD}[[partition]]\nname = "evenly"\n', "a [[dataset]] without a name"),
        (f"method = 1\n{HEAD}{PLACES}", "method = 1 is not a table of keys"),
        (f"method.fedmetanas = 3\n{HEAD}{PLACES}", "method.fedmetanas = 3 is not a table of keys"),
    ],
)
def test_values_that_should_be_tables_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(RefusalError) as refusal:
        read_table(write(tmp_path, text))
    assert words in str(refusal.value)
    assert "small.toml" in str(refusal.value)


def test_a_partitions_own_keys_go_before_the_datasets(tmp_path: Path) -> None:
    text = TABLE.replace('partition = "iid"\n', 'partition = "iid"\ntarget = 0.7\nmethod.fednas = { momentum = 0.5 }\n')
    table = read_table(write(tmp_path, text.replace("momentum = 0.5", "meta_lr_weights = 0.2")))
    rates = {run.partition.name: run.keys["meta_lr_weights"] for run in table.runs if run.method == "fednas"}
    assert rates == {"Dirichlet 0.1": 0.05, "evenly": 0.2}
    cells = cells_of(table, [fake_row("fednas", 0, 0.9), fake_row("fednas", 0, 0.9, partition="Dirichlet 0.1")])
    assert {cell.partition: cell.target for cell in cells} == {"Dirichlet 0.1": 0.5, "evenly": 0.7}


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
        "client_accuracy_used_std": 0.02, "test_accuracy_supernet": accuracy, "partition_hash": f"seed {seed}",
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


def test_seconds_of_different_machines_are_not_compared(tmp_path: Path) -> None:
    table = read_table(write(tmp_path))
    rows = [fake_row("fedmetanas", seed, 0.9, 5.0) for seed in range(2)]
    rows += [{**fake_row("fednas", seed, 0.8 - 0.1 * seed, 20.0), "hardware": "another"} for seed in range(2)]
    (found,) = differences(table, cells_of(table, rows))
    assert found.compute_ratio is None
    (line,) = sentences(table, [found])
    assert line.endswith("their computing was timed on different machines and does not compare.")
    page = markdown(table, cells_of(table, rows), [found], "")
    assert "- hardware: a machine; another (seconds of different machines do not compare); device cpu" in page


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


def test_an_adjusted_p_never_falls_below_the_one_before() -> None:
    """p of 0.02, 0.03, 0.04: times 3, 2 and 1 gives 0.06, 0.06, 0.04; the last is raised to 0.06."""
    found = [difference(p) for p in (0.04, 0.02, 0.03)]
    assert [each.adjusted for each in _holm(found)] == pytest.approx([0.06, 0.06, 0.06])
    assert _holm([difference(None), difference(0.04)])[1].adjusted == 0.04


def difference(p: float | None) -> Difference:
    return Difference("digits", "evenly", "fedmetanas", "fednas", 0.1, 0.0, 0.2, p, None, 3, 0.5)


def test_differences_that_are_equal_but_for_rounding_are_no_proof(tmp_path: Path) -> None:
    """0.9 - 0.8, 0.8 - 0.7 and 0.7 - 0.6 differ in the last bit."""
    table = read_table(write(tmp_path))
    rows = [fake_row("fedmetanas", seed, value) for seed, value in enumerate((0.9, 0.8, 0.7))]
    rows += [fake_row("fednas", seed, value) for seed, value in enumerate((0.8, 0.7, 0.6))]
    (found,) = differences(table, cells_of(table, rows))
    assert found.p is found.low is None
    assert not found.real
    assert "by the same amount with each of 3 seeds" in sentences(table, [found])[0]


def test_rows_of_other_images_are_not_paired(tmp_path: Path) -> None:
    table = read_table(write(tmp_path))
    other = {**fake_row("fednas", 0, 0.8), "partition_hash": "another"}
    rows = [fake_row("fedmetanas", 0, 0.9), fake_row("fedmetanas", 1, 0.9), other]
    assert differences(table, cells_of(table, rows)) == []
    (found,) = differences(table, cells_of(table, [*rows, fake_row("fednas", 1, 0.6)]))
    assert (found.seeds, found.mean) == (1, pytest.approx(0.3))


def test_the_verdict_names_what_is_real() -> None:
    real = replace(difference(0.01), adjusted=0.02)
    assert verdict([real, difference(0.5)]) == (
        "Told apart from chance, 1 of 2: fedmetanas is above fednas on digits, evenly."
    )
    assert verdict([difference(0.5)]) == "Told apart from chance: none of 1."


def test_a_method_without_a_curve_has_no_target_of_its_own(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, TABLE.replace("target = 0.5\n", "")))
    rows = [{**fake_row("random_search", 0, 0.8), "curve": []}, fake_row("fednas", 0, 0.6)]
    without, with_curve = cells_of(table, rows)
    assert without.own_target is None
    assert (without.to_own.seeds, without.to_target.seeds) == (0, 0)
    assert with_curve.own_target == pytest.approx(0.6)
    assert with_curve.target == pytest.approx(0.95 * 0.6)
    page = markdown(table, [without, with_curve], [], "fedmetanas compare small.toml")
    assert "| random_search |  |" in page


def test_the_own_target_is_where_the_last_stages_curve_ends(tmp_path: Path) -> None:
    """The last stage has 0.4 and 0.6, whose running mean ends at 0.5; the stage before had 0.9."""
    row = fake_row("fednas", 0, 0.9)
    for at, stage, value in zip(row["curve"], (0, 0, 0, 1, 1), (0.9, 0.9, 0.9, 0.4, 0.6), strict=True):
        at.update(stage=stage, accuracy=value)
    (cell,) = cells_of(read_table(write(tmp_path)), [row])
    assert cell.own_target == pytest.approx(0.5)
    assert (cell.to_own.seeds, cell.to_own.rounds) == (1, 5.0)


def test_what_cutting_costs_is_the_last_derivation_or_extraction(tmp_path: Path) -> None:
    events = [
        {"kind": "pruning", "before": 0.1, "after": 0.2, "recalibrated": None},
        {"kind": "derivation", "before": 0.8, "after": 0.3, "recalibrated": 0.4},
    ]
    cut = {**fake_row("fednas", 0, 0.9), "events": events}
    whole = {**fake_row("fedmetanas", 0, 0.9), "test_accuracy_supernet": 0.7, "test_accuracy_recalibrated": None}
    fixed = {**fake_row("random_search", 0, 0.9), "test_accuracy_supernet": None}
    mine, other, its = cells_of(read_table(write(tmp_path)), [whole, fixed, cut])
    means = [[value and value.mean for value in map(cell.derivation, ("before", "after", "recalibrated"))]
             for cell in (mine, other, its)]  # fmt: skip
    assert means == [[0.7, 0.9, None], [None, None, None], [0.8, 0.3, 0.4]]


def test_what_prune_events_took_and_cost_is_counted_over_the_runs(tmp_path: Path) -> None:
    """Two runs of fedmetanas, of two events and of one; 5 = (6 + 4) / 2 choices of a run fell below the threshold."""

    def event(voluntary: int, before: float | None, after: float | None, darts: float | None) -> dict[str, Any]:
        accuracies = {"before": before, "after": after, "hard_darts_rule": darts}
        return {"kind": "pruning", "voluntary": voluntary, "forced": 2, "none": 0, "stranded": 1, **accuracies}

    rows = [fake_row("fedmetanas", seed, 0.9) for seed in (0, 1)]
    rows[0]["events"] = [event(2, 0.5, 0.4, 0.3), event(4, 0.7, 0.6, 0.65)]
    rows[1]["events"] = [event(4, 0.9, 0.8, 0.1), {"kind": "derivation", "before": 0.8, "after": 0.8}]
    table = read_table(write(tmp_path))
    page = markdown(table, cells_of(table, [*rows, fake_row("fednas", 0, 0.9)]), [], "")
    (line,) = [line for line in page.splitlines() if "→" in line and line.startswith("| fedmetanas")]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == [
        *("5", "3", "0", "2"),
        "70.0 → 60.0 / 35.0",
        "80.0 → 70.0 / 37.5",
        "1 of 3",
    ]


def test_what_the_picture_cannot_show_is_said(tmp_path: Path) -> None:
    """A method without a global model has no curve; a single evaluation is a point."""
    table = read_table(write(tmp_path))
    rows = [fake_row("fedmetanas", 0, 0.9), {**fake_row("fednas", 0, 0.8), "curve": []}]
    rows[0]["curve"] = rows[0]["curve"][:1]
    cells = cells_of(table, rows)
    page = markdown(table, cells, differences(table, cells), "")
    assert "Without a global model, and so without a curve: fednas." in page
    assert "no curve to see" in page
    assert "Nothing is said about chance" in page
    assert "Holm" not in page
    assert "<use" in draw_curves(table, cells)  # a marker


def test_curves_end_where_the_runs_do_on_average(tmp_path: Path) -> None:
    """Two runs that spent 10 and 30: the line ends at 20 and at their mean accuracy, not where the shorter one ends."""
    rows = [fake_row("fedmetanas", 0, 0.9, compute=10.0), fake_row("fedmetanas", 1, 0.5, compute=30.0)]
    (cell,) = cells_of(read_table(write(tmp_path)), rows)
    drawn = Mock()
    drawn.plot.return_value = (None,)
    _draw(drawn, cell, "compute_seconds", {"color": "red"})
    spent, mean = drawn.plot.call_args.args
    assert spent[-1] == pytest.approx(20.0)
    # smoothed over three evaluations of 0.9 and 0.5
    assert mean[-1] == pytest.approx(0.7)


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
    content = json.loads(as_json(table, cells, differences(table, cells)))
    assert content["cells"][0]["method"] == "fedmetanas"
    assert [(each["other"], each["mean"], each["real"]) for each in content["differences"]] == [
        ("random_search", 0.0, False),
        ("fednas", 0.0, False),
    ]
    assert "no curve to see" not in page
    picture = draw_curves(table, cells)
    assert picture == draw_curves(table, cells)
    assert not _is_wide(cells, "bytes")
    rows[0]["curve"] = [{**at, "bytes": 30 * at["bytes"]} for at in rows[0]["curve"]]
    assert _is_wide(cells, "bytes")
    assert "10^{" not in picture
    assert "10^{" in draw_curves(table, cells) or "10$" in draw_curves(table, cells)
    for words in ("fednas", "rounds", "digits, evenly", "<svg"):
        assert words in picture
