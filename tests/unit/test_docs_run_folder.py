"""The page about the run folder names every file and every field that a run writes."""

import json
import re
from pathlib import Path

import pytest
from finished import finished_run

from fedmetanas_core.output.report.files import show_result
from fedmetanas_core.run.folder import FIGURES, RunFolder

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "run-folder.md").read_text()
FILES, FIELDS = TEXT.split("## summary.json")
CODE = {span.removesuffix("...") for span in re.findall(r"`([^`\n]+)`", TEXT)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    """One with all that a method can have beside the usual, and one of own networks."""
    place = tmp_path_factory.mktemp("runs")
    keys = {"search_fraction": 0.8, "unseen_clients": 2, "collapse_watch": "on", "evaluate_every": 2}
    folders = [finished_run(place, "one", **keys), finished_run(place, "own", method="local_darts")]
    for folder in folders:
        assert show_result(RunFolder(folder)) == ""
    return [RunFolder(folder) for folder in folders]


def named(field: str) -> bool:
    """By its own name, or by the beginning of a family: `client_accuracy_adapted...`."""
    families = [span[:-3] for span in re.findall(r"`(\w+\.\.\.)`", FIELDS)]
    endings = re.findall(r"`\.\.\.(_\w+)`", FIELDS)
    stem = next((field.removesuffix(ending) for ending in endings if field.endswith(ending)), field)
    return field in CODE or stem in CODE or any(field.startswith(family) for family in families)


def test_every_file_is_named(runs: list[RunFolder]) -> None:
    for run in runs:
        for path in run.path.iterdir():
            name = f"{path.name}/" if path.is_dir() else path.name
            assert f"`{name}`" in FILES, name
    pictures = {path.stem for path in runs[0].pictures_directory.iterdir()}
    assert all(f"`{name}`" in FILES for name in pictures)


def test_every_field_is_named(runs: list[RunFolder]) -> None:
    for run in runs:
        summary = run.read_summary() or {}
        rows = run.rounds.read()
        found = {*FIGURES, *summary, *(key for row in rows for key in row)}
        found |= {key for event in summary["pruning_events"] for key in event}
        found |= {key for line in run.architecture.read() for key in line}
        assert [field for field in sorted(found) if not named(field)] == []


def test_no_field_is_named_that_is_gone(runs: list[RunFolder]) -> None:
    source = "\n".join(
        path.read_text() for name in ("server_app", "fedmetanas_core") for path in (ROOT / name).rglob("*.py")
    )
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", FIELDS, re.MULTILINE)
    fields = [field for row in rows for field in re.findall(r"`(\w+)`", row)]
    assert len(fields) > 40
    assert [field for field in fields if not re.search(rf"\b{field}\b", source)] == []
    assert json.loads((runs[0].path / "summary.json").read_text())["status"] == "completed"
