"""Progress: one display in a terminal, a few plain lines elsewhere, and times people can read."""

import io
import re
from types import SimpleNamespace

import pytest

from fedmetanas_core.run.progress import MOST_PLAIN_LINES, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def row(number: int, **changes: object) -> dict[str, object]:
    """A ledger row; `changes` replaces keys."""
    return {
        "round": number,
        "phase": "search",
        "temperature": 1.0,
        "clients": [1, 2],
        "excluded": [],
        "train_loss": 2.0 / number,
        "test_accuracy": None,
        "alive_operations": 100 - number,
        "macs": 1000,
        "parameters": 10,
        "uplink_bytes": 5,
        "downlink_bytes": 5,
        "seconds": 2.0,
        **changes,
    }


def run_plain(total: int, rows: list[dict[str, object]]) -> list[str]:
    stream = io.StringIO()
    with Progress(total, before="", stream=stream, clock=Clock()) as progress:
        for each in rows:
            progress.update(each)
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()
    return stream.getvalue().splitlines()


def test_a_short_run_gets_a_line_for_every_round(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_plain(3, [row(1, test_accuracy=0.5), row(2), row(3)])
    assert lines == [
        "round 1/3, search, loss 2, accuracy 0.500, 99 operations, 0.0 s elapsed",
        "round 2/3, search, loss 1, accuracy 0.500 (round 1), 98 operations, 0.0 s elapsed, about 2.0 s left",
        "round 3/3, search, loss 0.6667, accuracy 0.500 (round 1), 97 operations, 0.0 s elapsed",
    ]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_it_says_what_goes_on_before_and_after_the_rounds(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress(2, before="starting Ray", after="measuring", stream=stream) as progress:
        assert "starting Ray" in stream.getvalue()
        progress.update(row(1))
        assert "measuring" not in stream.getvalue()
        progress.update(row(2))
    assert stream.getvalue().count("starting Ray") == 1
    assert "measuring" in stream.getvalue()


def test_excluded_updates_are_counted() -> None:
    lines = run_plain(2, [row(1, excluded=[{"client": 3, "reason": "late"}]), row(2)])
    assert ["1 update excluded so far" in line for line in lines] == [True, True]


def shown_rounds(lines: list[str]) -> set[int]:
    return {int(found[1]) for line in lines if (found := re.match(r"round (\d+)/", line))}


def test_a_long_run_shows_phase_changes_evaluations_and_the_end() -> None:
    def phase(number: int) -> str:
        return "warm-up" if number < 33 else "search" if number < 471 else "one-hot"

    evaluated = {101, 203, 307, 449}
    rows = [row(n, phase=phase(n), test_accuracy=0.5 if n in evaluated else None) for n in range(1, 501)]
    lines = run_plain(500, rows)
    assert {1, 33, 471, 500} | evaluated <= shown_rounds(lines)
    assert len(lines) <= MOST_PLAIN_LINES


@pytest.mark.parametrize("total", [60, 61, 100, 499, 1000, 5000])
def test_evaluating_every_round_does_not_flood_the_log(total: int) -> None:
    lines = run_plain(total, [row(n, test_accuracy=0.5) for n in range(1, total + 1)])
    assert 30 <= len(lines) <= MOST_PLAIN_LINES + 3
    assert total in shown_rounds(lines)


def test_time_left_follows_the_recent_rounds_of_this_phase() -> None:
    clock = Clock()
    progress = Progress(100, stream=io.StringIO(), clock=clock)
    assert progress.seconds_left() is None
    for number in range(1, 31):  # rounds get cheaper: 30 s, 29 s, ... 1 s
        progress.update(row(number, seconds=31.0 - number))
    assert progress.seconds_left() == pytest.approx(70 * 5.5)
    clock.now_s = 5.0  # and it runs down while the next round is on its way
    assert progress.seconds_left() == pytest.approx(70 * 5.5 - 5)
    progress.update(row(31, phase="one-hot", seconds=0.5))
    assert progress.seconds_left() == pytest.approx(69 * 0.5)
    progress.update(row(100, phase="one-hot"))
    assert progress.seconds_left() == 0.0


def test_without_seconds_the_clock_is_used() -> None:
    clock = Clock()
    progress = Progress(3, stream=io.StringIO(), clock=clock)
    clock.now_s = 60.0  # the first round takes the start of the workers with it
    progress.update({"round": 1})
    assert progress.seconds_left() is None
    clock.now_s = 64.0
    progress.update({"round": 2})
    assert progress.seconds_left() == pytest.approx(4.0)


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_status_stays_on_one_line_and_keeps_what_tells_most(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress(150, stream=io.StringIO(), clock=Clock())
    progress._live = SimpleNamespace(console=SimpleNamespace(width=width), refresh=lambda: None)  # type: ignore[assignment]
    for number in range(1, 24):
        progress.update(row(number, seconds=2.0, test_accuracy=0.3 if number == 20 else None))
    line = progress._status_line()
    assert "left" in line
    assert line.startswith("search")
    assert ("elapsed" in line) == (width == 200)
    assert len(line) <= width or width < 60


def test_rows_with_missing_or_odd_values_are_taken() -> None:
    lines = run_plain(5, [{}, {"round": 2, "train_loss": float("nan"), "phase": None}, row(9, phase="a\x1b[31m\nb")])
    assert len(lines) == 3
    assert lines[2].startswith("round 9/5, a\\x1b[31m\\nb, ")


def test_a_terminal_gets_one_live_display(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Progress(20, before="starting [bold]", stream=stream) as progress:
        print("the result", flush=True)
        for number in range(1, 8):
            progress.update(row(number, test_accuracy=0.75))
    text = stream.getvalue()
    assert "\x1b[" in text
    assert "7/20" in text
    assert "accuracy 0.750" in text
    assert "starting [bold]" in text, "it is text, not markup"
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor comes back"
    assert capsys.readouterr().out == "the result\n"


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(2, stream=stream) as progress:
        progress.update(row(1))
    assert stream.getvalue().startswith("waiting for the first round\nround 1/2, search")
    assert "\x1b" not in stream.getvalue()


def test_the_display_ends_when_the_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with pytest.raises(RuntimeError), Progress(2, stream=stream):
        raise RuntimeError
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")
