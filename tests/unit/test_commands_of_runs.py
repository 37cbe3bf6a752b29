"""`fedmetanas report` and `fedmetanas draw` as a user types them."""

from pathlib import Path

import pytest
from finished import finished_run

from fedmetanas_core.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs"))


def test_report_prints_where_the_page_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert (run / "report.html").read_text().startswith("<!doctype html>")


def test_several_runs_and_a_place_of_ones_own(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run), str(run), "--output=both.html"]) == 0
    assert main(["report", str(run), str(run)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'both.html'}\n{tmp_path / 'runs.html'}\n"
    assert "2 runs side by side" in (tmp_path / "both.html").read_text()


def test_draw_prints_the_folder_of_the_pictures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draw", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'pictures'}\n"
    assert (run / "pictures" / "genotype.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["report"], "no run was given"),
        (["report", "nowhere"], "is not a run folder"),
        (["report", "RUN", "--output=none/x.html"], "cannot be a file"),
        (["report", "RUN", "--outptu=x"], "unknown option"),
        (["report", "~nobody-of-this-name/x"], "is no path"),
        (["draw", "x" * 300], "is no path"),
        (["draw"], "no run was given"),
        (["draw", "RUN", "RUN"], "unknown argument"),
    ],
)
def test_what_is_refused(run: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run) if word == "RUN" else word for word in words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
