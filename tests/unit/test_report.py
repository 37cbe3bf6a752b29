"""A run's page: charts with numbers by hand, well-formed, and true to the run folder."""

import json
import re
import warnings
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from finished import finished_run

from fedmetanas_core.config import Config
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.output.pictures import draw_alphas, draw_partition, draw_run, edge_names, over_rounds
from fedmetanas_core.output.report import files
from fedmetanas_core.output.report.charts import Series, Span, heat_map, histogram, line_chart, shown, thinned, ticks
from fedmetanas_core.output.report.facts import RunFacts
from fedmetanas_core.output.report.files import show_result, write_report
from fedmetanas_core.output.report.page import report
from fedmetanas_core.preflight import prepare_experiment
from fedmetanas_core.run.folder import RunFolder
from fedmetanas_core.runs import begin_run

VOID = {"meta", "link", "input", "br"}


class Balanced(HTMLParser):
    """Refuses tags that are not closed, and keeps the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.ids = "", list[str]()
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.0]),
        (0.0, 0.8, [0.0, 0.2, 0.4, 0.6, 0.8]),
        (3.0, 3.0, [3.0]),
        (1.0, 150.0, [50.0, 100.0, 150.0]),
        (-1.5, 2.5, [-1.0, 0.0, 1.0, 2.0]),
    ],
)
def test_axes_have_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_numbers_read_well() -> None:
    assert [shown(value) for value in (0.0, 0.97777, 12345.6, 1e-5)] == ["0", "0.9778", "12,346", "1e-05"]


def test_a_chart_has_its_points_where_they_belong_and_its_figures_with_it() -> None:
    """Rounds 1 to 3 over 358 units from 50; values 0 to 2 over 154 units from 174 up, of which 4 % are headroom."""
    svg = line_chart("loss <b>", "loss & more", [Series("a & b", [(1, 0.0), (3, 2.0)])], [Span("warm-up", 1, 3)])
    figure = ElementTree.fromstring(svg)
    (line,) = figure.iter("polyline")
    assert line.get("points") == "50.0,174.0 408.0,25.9"
    data = json.loads(figure.find("svg").get("data-chart"))  # type: ignore[union-attr, arg-type]
    assert data["series"] == [{"name": "a & b", "points": [[1, 0.0], [3, 2.0]]}]
    assert figure.find("svg").get("aria-label") == "loss <b>"  # type: ignore[union-attr]


def test_a_chart_without_points_says_so_and_one_with_one_has_a_dot() -> None:
    assert "not measured" in line_chart("x", "y", [Series("a", [])])
    assert "<circle" in line_chart("x", "y", [Series("a", [(4, 0.5)])])


def test_a_heat_map_joins_what_is_alike_and_shows_what_is_gone() -> None:
    svg = ElementTree.fromstring(heat_map("m", ["sep"], [[0.5, 0.5, 1.0, None]], "round", 1.0, [1, 2, 3, 4]))
    found = [(each.get("class"), each.get("fill-opacity"), each[0].text) for each in svg.iter("rect")]
    assert found == [
        ("heat", "0.5", "sep, round 1 to 2: 0.5"),
        ("heat", "1", "sep, round 3: 1"),
        ("gone", None, "sep, round 4: pruned"),
    ]


def test_a_histogram_counts_every_client() -> None:
    svg = histogram("h", [1.0, 0.999, 0.5, 0.0], bins=10)
    said = [each[0].text for each in ElementTree.fromstring(svg).iter("rect")]
    assert said == ["1 of 4: 0.00 to 0.10", "1 of 4: 0.50 to 0.60", "2 of 4: 0.90 to 1.00"]


def test_edges_and_rounds_of_a_history_by_hand() -> None:
    assert edge_names(5) == ["c(k-2) → 1", "c(k-1) → 1", "c(k-2) → 2", "c(k-1) → 2", "1 → 2"]
    history = [
        {"round": 2, "operations": {"normal": [[0.5, 0.5]]}},
        {"round": 4, "operations": {"normal": [[1.0, None]]}},
    ]
    shares = over_rounds(history, "normal", 5)
    assert shares[0, 0].tolist() == [0.5, 0.5, 0.5, 1.0, 1.0]
    assert [value != value for value in shares[0, 1]] == [False, False, False, True, True]


def finished(tmp_path: Path, **keys: Any) -> RunFacts:
    return RunFacts.of(finished_run(tmp_path, **keys))


def test_a_page_says_what_the_folder_says_and_needs_nothing_beside_it(tmp_path: Path) -> None:
    facts = finished(tmp_path, search_fraction=0.8)
    page = report(facts)
    text = Balanced(page).text
    assert f"{100 * facts.summary['test_accuracy']:.1f} %" in text
    assert "sep_conv_3x3" in text
    assert "6 clients, 2 a round, 6 rounds" in text
    assert facts.config["partition_hash"] in text
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "Images: 1×8×8, 10 classes, 360 test images" in text
    assert page.count("<h2>") == 11


def test_a_run_is_shown_in_its_folder_and_a_fault_of_drawing_is_only_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(finished_run(tmp_path, search_fraction=0.8))
    assert show_result(folder) == ""
    assert "6 clients" in folder.report_file.read_text()
    names = {f"{name}.{ending}" for name in ("genotype", "curves", "alphas", "partition") for ending in ("svg", "png")}
    assert {path.name for path in folder.pictures_directory.iterdir()} == names
    for path in folder.pictures_directory.glob("*.svg"):
        ElementTree.parse(path)
    monkeypatch.setattr(files, "draw_run", lambda rounds: 1 / 0)
    assert show_result(folder) == "the report is not complete: ZeroDivisionError: division by zero"


def test_a_run_that_goes_on_has_no_report_of_its_former_end(tmp_path: Path) -> None:
    folder = RunFolder(finished_run(tmp_path))
    write_report([folder.path])
    folder.rewind(3)
    assert not folder.report_file.exists()


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, "one"), finished_run(tmp_path, "two", dir_alpha=5.0)]
    page = write_report(runs, tmp_path / "both.html").read_text()
    text = Balanced(page).text
    assert "2 runs side by side" in text
    assert "dir_alpha0.35.0" in text
    assert page.count('class="genotype-drawing"') == 2


@pytest.mark.parametrize("method", ["fedavg", "local_darts", "fednas"])
def test_every_kind_of_method_has_a_page(tmp_path: Path, method: str) -> None:
    Balanced(report(finished(tmp_path, method=method)))


def test_a_run_that_has_not_begun_has_a_page(tmp_path: Path) -> None:
    experiment = prepare_experiment(Config.from_mapping({"num_clients": 6, "clients_per_round": 2}), tmp_path)
    run = begin_run(tmp_path, "run", experiment, tmp_path)
    assert "No round has been completed yet" in Balanced(report(RunFacts.of(run.folder.path))).text


def test_names_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    facts = finished(tmp_path)
    facts.rounds[0]["notes"].append({"client": None, "note": "<script>alert(1)</script>"})
    facts.summary["error"] = "<img src=x onerror=alert(1)>"
    page = report(facts)
    assert "<script>alert" not in page
    assert "<img" not in page


def test_pictures_are_the_same_for_the_same_folder(tmp_path: Path) -> None:
    facts = finished(tmp_path, search_fraction=0.8)
    for draw in (
        lambda: draw_run(facts.rounds),
        lambda: draw_alphas(facts.history, 6),
        lambda: draw_partition(facts.counts, facts.class_names),
    ):
        first, second = draw(), draw()
        assert first["svg"] == second["svg"]
        ElementTree.fromstring(first["svg"])
        assert first["png"].startswith(b"\x89PNG")


def test_phases_are_named_below_the_curves_and_accuracy_begins_at_nought(tmp_path: Path) -> None:
    facts = finished(tmp_path, search_fraction=0.8)
    drawn = draw_run(facts.rounds)["svg"].decode()
    for phase in ("warm-up", "search", "one-hot"):
        assert drawn.count(f">{phase}</text>") == 1
    page = report(facts)
    narrow = [Span("warm-up", 1, 1), Span("search", 2, 100)]
    chart = line_chart("x", "y", [Series("a", [(1, 0.4), (100, 0.5)])], narrow, from_zero=True)
    assert re.findall(r'<text class="phase"[^>]*>(.*?)</text>', chart) == ["search"]
    assert chart.endswith('height="12"/></svg>warm-up</li></ul></figure>')
    (data,) = re.findall(r'aria-label="Accuracy of the global model over rounds" data-chart="(.*?)"', page)
    assert json.loads(unescape(data))["bottom"] == 174.0
    assert ">0</text>" in page.split('aria-label="Accuracy of the global model')[1].split("</svg>")[0]


def test_a_federation_of_thousands_keeps_the_page_small(tmp_path: Path) -> None:
    facts = finished(tmp_path)
    counts = np.random.default_rng(0).integers(0, 50, (5000, 1000))
    many = replace(facts, counts=counts, class_names=tuple(f"class{number}" for number in range(1000)))
    page = report(many)
    assert len(page) < 4_000_000
    assert "The first of 5000 clients and 1000 classes." in Balanced(page).text


def test_more_runs_than_colours_are_told_apart() -> None:
    svg = line_chart("many", "y", [Series(f"run {number}", [(1, 0.0), (2, float(number))]) for number in range(14)])
    looks = [line.get("class") for line in ElementTree.fromstring(svg).iter("polyline")]
    assert len(set(looks)) == 14


def test_names_from_a_folder_of_elsewhere_stay_text(tmp_path: Path) -> None:
    facts = finished(tmp_path, search_fraction=0.8)
    bad = 'normal"><script>alert(1)</script>'
    history = [{**line, "operations": {bad: line["operations"]["normal"]}} for line in facts.history]
    assert "<script>alert" not in report(replace(facts, history=history))


def test_odd_class_names_are_drawn(tmp_path: Path) -> None:
    """Two dollars would be mathematics to matplotlib, and its font lacks some scripts."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = draw_partition(np.ones((3, 3), dtype=np.int64), ["$\\frac$", "a$b$", "猫"])
    assert picture["png"].startswith(b"\x89PNG")


def test_without_its_partition_a_run_has_a_page_all_the_same(tmp_path: Path) -> None:
    facts = finished(tmp_path)
    (facts.path / "partition.npz").unlink()
    assert "Training images of each class" not in report(RunFacts.of(facts.path))


def test_files_of_another_version_are_refused_in_a_line(tmp_path: Path) -> None:
    facts = finished(tmp_path)
    rows = facts.rounds
    del rows[0]["longest_compute_seconds"]
    (facts.path / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RefusalError, match="written by another version, or damaged"):
        write_report([facts.path])


def test_several_runs_tell_of_their_own_networks_and_budgets(tmp_path: Path) -> None:
    own = finished_run(tmp_path / "a", method="perfedrlnas", num_rounds=2)
    bound = finished_run(tmp_path / "b", max_parameters=1500, num_rounds=2)
    text = Balanced(write_report([own, bound], tmp_path / "runs.html").read_text()).text
    summary = json.loads((own / "summary.json").read_text())
    assert f"{summary['personal_parameters']:,.0f}" in text
    assert "max_parameters=1,500" in text
    assert str(own) in text, "both folders are called run"


def test_long_runs_are_thinned_out_and_keep_their_ends() -> None:
    assert thinned(range(10), 4) == [0, 3, 6, 9]
    assert thinned([1, 2], 4) == [1, 2]
    svg = line_chart("long", "y", [Series("a", [(float(number), 1.0) for number in range(5000)])])
    (line,) = ElementTree.fromstring(svg).iter("polyline")
    assert len((line.get("points") or "").split()) == 600
