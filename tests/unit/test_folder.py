"""The run folder: names, refusals that leave nothing behind, and files that survive a crash."""

from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fedmetanas_core.config import Config
from fedmetanas_core.errors import RefusalError, RunFailedError
from fedmetanas_core.run.files import plain, write_atomically
from fedmetanas_core.run.folder import (
    RunFolder,
    blank_summary,
    check_can_create,
    check_run_name,
    default_run_name,
    resolve_runs_dir,
)


def everything_below(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def one_line_refusal(action: pytest.ExceptionInfo[RefusalError]) -> str:
    message = str(action.value)
    assert "\n" not in message
    assert "; " in message, "what and fix"
    return message


@pytest.mark.parametrize(
    ("configured", "environment", "expected"),
    [
        ("", {}, "/launch/runs"),
        ("", {"FEDMETANAS_RUNS": "shared"}, "/launch/shared"),
        ("", {"FEDMETANAS_RUNS": "/shared"}, "/shared"),
        ("", {"FEDMETANAS_RUNS": ""}, "/launch/runs"),
        ("here", {"FEDMETANAS_RUNS": "/shared"}, "/launch/here"),
        ("../beside", {}, "/beside"),
        ("/there", {}, "/there"),
    ],
)
def test_runs_dir_is_configured_then_environment_then_launch_directory(
    configured: str, environment: dict[str, str], expected: str
) -> None:
    assert resolve_runs_dir(configured, environment, Path("/launch")) == Path(expected)


def test_runs_dir_is_absolute_even_for_a_relative_launch_directory() -> None:
    assert resolve_runs_dir("", {}, Path()).is_absolute()


def test_runs_dir_expands_the_home_directory_and_refuses_unknown_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home-of-somebody")
    assert resolve_runs_dir("~/runs", {}, Path("/launch")) == Path("/home-of-somebody/runs")
    with pytest.raises(RefusalError):
        resolve_runs_dir("~no-such-user-here/runs", {}, Path("/launch"))


@pytest.mark.parametrize(
    "name",
    ["", " ", "a/b", "a\\b", "..", "a..b", ".hidden", "a\nb", "a\x00b", "a\x1b[31m", "a\u2028b", "\ud800", " a", "a "],
)
def test_bad_run_names_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(RefusalError) as action:
        check_run_name(name)
    assert "run_name=" in one_line_refusal(action)


def test_run_names_are_measured_in_bytes() -> None:
    check_run_name("ä" * 100)
    check_run_name("fedmetanas-digits 2026.01.31")
    with pytest.raises(RefusalError, match="200 bytes"):
        check_run_name("ä" * 101)


def test_probing_leaves_nothing_behind(tmp_path: Path) -> None:
    check_can_create(tmp_path / "not" / "yet" / "there", "run")
    check_can_create(tmp_path, "run")
    assert everything_below(tmp_path) == []


def test_an_existing_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(RefusalError, match=r"exists; choose another run_name"):
        check_can_create(tmp_path, "run")
    with pytest.raises(RefusalError, match=r"exists; choose another run_name"):
        RunFolder.create(tmp_path, "run")


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for runs_dir in ("file", "file/below", "file/far/below", "dangling"):
        with pytest.raises(RefusalError) as action:
            check_can_create(tmp_path / runs_dir, "run")
        one_line_refusal(action)
    for runs_dir in ("file", "file/below"):
        with pytest.raises(RefusalError) as action:
            RunFolder.create(tmp_path / runs_dir, "run")
        assert "resume" not in one_line_refusal(action)
    assert everything_below(tmp_path) == ["dangling", "file"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, which refuses even root")
@pytest.mark.parametrize("runs_dir", ["/proc", "/proc/runs", "/proc/self/far/below"])
def test_a_place_that_refuses_writing_is_refused(runs_dir: str) -> None:
    with pytest.raises(RefusalError, match="cannot be written"):
        check_can_create(Path(runs_dir), "run")


def test_an_overlong_directory_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusalError):
        check_can_create(tmp_path / ("x" * 300), "run")
    assert everything_below(tmp_path) == []


def test_create_then_open(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs", "first")
    assert folder.path == tmp_path / "runs" / "first"
    assert everything_below(folder.path) == ["checkpoint", "model"]
    with pytest.raises(RefusalError, match=r"config\.yaml"):
        RunFolder.open(folder.path)
    folder.write_config({"zebra": 1, "ant": Path("/data"), "name": "Zürich", "nothing": None})
    assert RunFolder.open(folder.path).read_config() == {"zebra": 1, "ant": "/data", "name": "Zürich", "nothing": None}
    assert folder.config_file.read_text().index("zebra") < folder.config_file.read_text().index("ant")
    with pytest.raises(RefusalError, match="not a directory"):
        RunFolder.open(tmp_path / "nowhere")


class Status(str, Enum):  # noqa: UP042 - the case to convert
    DONE = "completed"


def test_summary_is_strict_json_with_converted_scalars(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    assert folder.read_summary() is None
    folder.write_summary(
        {
            "accuracy": np.float32(0.5),
            "macs": np.int64(7),
            "loss": torch.tensor(0.25),
            "mean": float("nan"),
            "deep": {"worst": [np.float64("inf"), torch.tensor(float("nan"))]},
            "flag": np.bool_(True),
            "shape": (1, 2),
            "clients": {3, 1},
            "status": Status.DONE,
            1: "integer key",  # type: ignore[dict-item]
        }
    )
    assert "NaN" not in folder.summary_file.read_text()
    assert folder.read_summary() == {
        "accuracy": 0.5,
        "macs": 7,
        "loss": 0.25,
        "mean": None,
        "deep": {"worst": [None, None]},
        "flag": True,
        "shape": [1, 2],
        "clients": [1, 3],
        "status": "completed",
        "1": "integer key",
    }
    assert everything_below(folder.path) == ["checkpoint", "model", "summary.json"]


def test_a_summary_has_a_line_for_each_key_and_each_event(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    summary = {
        "status": "completed",
        "client_accuracy": [0.5] * 100,
        "events": [{"round": 1}, {"round": 2}],
        "none": [],
    }
    folder.write_summary(summary)
    assert folder.read_summary() == summary
    assert len(folder.summary_file.read_text().splitlines()) == 2 + 3 + 2 + 2


def test_what_cannot_be_stored_is_an_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    folder.write_summary({"status": "completed"})
    with pytest.raises(TypeError, match="object"):
        folder.write_summary({"status": object()})
    assert folder.read_summary() == {"status": "completed"}
    assert plain(np.arange(3)) == [0, 1, 2]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"old")

    def disk_error(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", disk_error)
        with pytest.raises(RunFailedError, match="file: Input/output error"):
            write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert everything_below(tmp_path) == ["file"]


def test_rounds_come_back_in_order(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    assert folder.rounds.read() == []
    folder.rounds.append({"round": 1, "train_loss": np.float32(2.5), "clients": (4, 2)})
    folder.rounds.append({"round": 2, "train_loss": float("nan"), "phase": "a\nb"})
    assert folder.rounds.read() == [
        {"round": 1, "train_loss": 2.5, "clients": [4, 2]},
        {"round": 2, "train_loss": None, "phase": "a\nb"},
    ]


@pytest.mark.parametrize("lost_bytes", [1, 5, 19])
def test_half_a_line_is_ignored_and_then_cut_off(tmp_path: Path, lost_bytes: int) -> None:
    folder = RunFolder.create(tmp_path, "run")
    for number in (1, 2):
        folder.rounds.append({"round": number, "padding": "x" * 9000})
    folder.rounds.path.write_bytes(folder.rounds.path.read_bytes()[:-lost_bytes])
    assert [row["round"] for row in folder.rounds.read()] == [1]
    folder.rounds.append({"round": 2})
    assert [row["round"] for row in folder.rounds.read()] == [1, 2]


def test_a_first_half_line_is_cut_off_too(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    folder.rounds.path.write_bytes(b'{"round": 1, "clie')
    folder.rounds.append({"round": 1})
    assert folder.rounds.path.read_bytes() == b'{"round": 1}\n'


def test_a_failed_append_takes_its_bytes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path, "run")
    folder.rounds.append({"round": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(RunFailedError, match=r"rounds\.jsonl: No space left"):
            folder.rounds.append({"round": 2})
    assert folder.rounds.path.read_bytes() == b'{"round": 1}\n'


def test_rounds_can_be_read_as_they_come(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    assert folder.rounds.after(0) == ([], 0)
    folder.rounds.append({"round": 1})
    rows, place = folder.rounds.after(0)
    assert (rows, place) == ([{"round": 1}], folder.rounds.path.stat().st_size)
    with folder.rounds.path.open("ab") as file:
        file.write(b'{"round": 2')
    assert folder.rounds.after(place) == ([], place)
    folder.rounds.append({"round": 2})
    assert folder.rounds.after(place)[0] == [{"round": 2}]
    with folder.rounds.path.open("ab") as file:
        file.write(b"broken\n")
    with pytest.raises(RunFailedError, match=f"line 2 from byte {place} on is damaged"):
        folder.rounds.after(place)


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    folder.rounds.path.write_bytes(b'{"round": 1}\n{"rou\n{"round": 3}\n')
    with pytest.raises(RunFailedError, match=r"rounds\.jsonl, line 2"):
        folder.rounds.read()


@pytest.mark.parametrize("content", [b"- 1\n", b"a: [\n", b"\xff\xfe\x00", b"!!python/object:os.system {}\n"])
def test_a_damaged_config_is_named(tmp_path: Path, content: bytes) -> None:
    folder = RunFolder.create(tmp_path, "run")
    folder.config_file.write_bytes(content)
    with pytest.raises(RunFailedError, match=r"config\.yaml"):
        folder.read_config()


def test_config_reads_back_with_any_yaml_reader(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    folder.write_config({"dir_alpha": np.float64(0.3), "seeds": (0, 1), "run_name": "no"})
    assert yaml.safe_load(folder.config_file.read_text()) == {"dir_alpha": 0.3, "seeds": [0, 1], "run_name": "no"}


@pytest.mark.parametrize(
    "dataset", ["..", "a/v1..2.npz", "字" * 70 + ".npz", "/tmp/my photos (1)", "x\n.npz", "digits"]
)
def test_the_name_made_for_a_run_is_always_a_good_one(dataset: str) -> None:
    check_run_name(default_run_name("fedmetanas", dataset))


def test_a_blank_summary_has_every_figure_of_a_finished_one() -> None:
    blank = blank_summary(Config.from_mapping({"seed": 3}))
    assert (blank["seed"], blank["dataset"], blank["test_accuracy"], blank["genotype"]) == (3, "digits", None, None)
