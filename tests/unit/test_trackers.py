"""Trackers: what each of the three really holds after a run, and that none can fail a run or hold it up."""

import os
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from local_grid import LocalGrid, roster_of
from rounds import prepare
from tables import TABLE, write

from fedmetanas_core.comparison.plan import read_table
from fedmetanas_core.config import Config
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.launch import prepare_launch
from fedmetanas_core.output.tracking import session
from fedmetanas_core.output.tracking.program import reason_of
from fedmetanas_core.output.tracking.session import Tracking, check_trackers, tracker_names
from fedmetanas_core.output.tracking.sinks import figures
from fedmetanas_core.run.superlink import Simulation
from fedmetanas_core.runs import Run, reopen_run
from server_app import app
from server_app.app import _session
from server_app.loop import RoundLoop

ROOT = Path(__file__).resolve().parents[2]
PER_ROUND = {"test_accuracy", "train_loss", "support_loss", "alive_operations", "parameters", "macs", "temperature"}
PER_ROUND |= {"uplink_bytes", "downlink_bytes", "seconds", "compute_seconds", "num_clients", "num_excluded"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of whoever runs the tests, and no network."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")


def tracked(run: Run, grid: LocalGrid) -> list[str]:
    """One session, as the server does it; what trackers failed at."""
    with Tracking(run.folder, run.experiment.config.track, run.folder.path.parent) as tracking:
        _session(roster_of(grid, run.experiment.config), run, tracking)
    return tracking.failures


def broken_off(run: Run, grid: LocalGrid, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that ends when the row of the round after this one is written, and its state is not."""
    save = RoundLoop._save

    def stopping(self: RoundLoop) -> None:
        if self.state.round > after:
            raise OSError("stopped")
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(RoundLoop, "_save", stopping)
        with pytest.raises(OSError, match="stopped"):
            tracked(run, grid)


def expected(run: Run, name: str) -> dict[int, float]:
    """Round to figure, by the ledger."""
    rows = run.folder.rounds.read()
    return {row["round"]: figures(row)[name] for row in rows if name in figures(row)}


def events_of(run: Run) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run.folder.path / "tensorboard")).Reload()


def mlflow_of(run: Run, uri: str = "") -> tuple[Any, Any]:
    """A client, and the only run of the experiment."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri or f"sqlite:///{run.folder.path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedmetanas")
    (found,) = client.search_runs([experiment.experiment_id])
    return client, found


def wandb_records(path: Path) -> Iterator[Any]:
    """What a .wandb file holds: LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        body = data[place + 7 : place + 7 + length]
        assert zlib.crc32(body, zlib.crc32(bytes([kind]))) == int.from_bytes(data[place : place + 4], "little")
        parts, place = parts + body, place + 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_tensorboard_holds_a_scalar_for_each_round_and_the_end(tmp_path: Path) -> None:
    run, grid = prepare(tmp_path, num_rounds=5, track="tensorboard")
    assert tracked(run, grid) == []
    events, summary = events_of(run), run.folder.read_summary() or {}
    assert set(events.Tags()["scalars"]) >= PER_ROUND
    for name in PER_ROUND:
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx(expected(run, name), rel=1e-6), name  # floats of four bytes
    assert len(expected(run, "test_accuracy")) < 5 == len(expected(run, "seconds"))
    (final,) = events.Scalars("final/test_accuracy")
    assert (final.step, final.value) == (5, pytest.approx(summary["test_accuracy"]))
    (genotype,) = events.Tensors("genotype")
    assert b"normal" in genotype.tensor_proto.string_val[0]
    assert "track_failures" not in summary


def test_rounds_that_come_again_stand_once_in_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, grid = prepare(tmp_path, num_rounds=5, track="tensorboard")
    broken_off(run, grid, 2, monkeypatch)
    assert [event.step for event in events_of(run).Scalars("seconds")] == [1, 2, 3]
    first = events_of(run).Scalars("seconds")[2].value
    tracked(reopen_run(run.folder.path), grid)
    found = {event.step: event.value for event in events_of(run).Scalars("seconds")}
    assert [event.step for event in events_of(run).Scalars("seconds")] == [1, 2, 3, 4, 5]
    assert found == pytest.approx(expected(run, "seconds"), rel=1e-6)
    assert found[3] != first


def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, grid = prepare(tmp_path, num_rounds=5, track="mlflow", class_names=",".join(f"class{i}" for i in range(200)))
    broken_off(run, grid, 2, monkeypatch)
    client, found = mlflow_of(run)
    assert found.info.status == "FAILED"
    assert tracked(reopen_run(run.folder.path), grid) == []
    client, found = mlflow_of(run)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert found.data.tags["fedmetanas.run_id"] == run.run_id
    for name in PER_ROUND - {"seconds", "compute_seconds"}:  # of the round that came again, the first stays
        history = [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name)]
        assert sorted(history) == sorted(expected(run, name).items()), name
    assert len(client.get_metric_history(found.info.run_id, "seconds")) == 5
    summary = run.folder.read_summary() or {}
    assert found.data.metrics["final/test_accuracy"] == summary["test_accuracy"]
    assert found.data.params["num_rounds"] == "5"
    assert found.data.params["class_names"] == run.experiment.config.class_names[:500]
    names = {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
    assert names == {"config.yaml", "summary.json", "report.html", "genotype.svg", "genotype.json"}
    assert (run.folder.path / "mlartifacts").is_dir()


def test_mlflow_gets_rounds_that_it_has_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a session that ended together with its tracker, and a server that the environment names."""
    uri = f"sqlite:///{tmp_path / 'all.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run, grid = prepare(tmp_path, num_rounds=4, track="mlflow")
    with monkeypatch.context() as patch:
        patch.setattr(Tracking, "start", lambda self, after: None)
        broken_off(run, grid, 2, monkeypatch)
    assert tracked(reopen_run(run.folder.path), grid) == []
    client, found = mlflow_of(run, uri)
    assert sorted(each.step for each in client.get_metric_history(found.info.run_id, "seconds")) == [1, 2, 3, 4]
    assert not (run.folder.path / "mlflow.db").exists()


def test_wandb_offline_holds_every_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "elsewhere")
    run, grid = prepare(tmp_path, num_rounds=3, track="wandb")
    assert tracked(run, grid) == []
    (file,) = (run.folder.path / "wandb").glob(f"offline-run-*-{run.run_id}/run-{run.run_id}.wandb")
    records = list(wandb_records(file))
    (begun,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (begun.run_id, begun.project, begun.display_name) == (run.run_id, "elsewhere", "run")
    assert {item.key: item.value_json for item in begun.config.update}["num_rounds"] == "3"
    rounds = {record.history.step.num: record.history for record in records if record.HasField("history")}
    assert sorted(rounds) == [1, 2, 3]
    for name in PER_ROUND:
        found = {
            step: float(item.value_json)
            for step, history in rounds.items()
            for item in history.item
            if name in (item.key, *item.nested_key)
        }
        assert found == pytest.approx(expected(run, name)), name
    told = {item.key or item.nested_key[0] for each in records for item in each.summary.update}
    assert {"final/test_accuracy", "final/status", "final/genotype"} <= told


def test_a_tracker_that_fails_is_noted_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two of three: a file lies where TensorBoard's folder should be, and nobody answers for MLflow."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    found = []
    for name, track in (("without", ""), ("with", "tensorboard,mlflow,wandb")):
        (tmp_path / name).mkdir()
        run, grid = prepare(tmp_path / name, num_rounds=4, track=track)
        (run.folder.path / "tensorboard").write_text("in the way")
        failures = tracked(run, grid)
        summary = run.folder.read_summary() or {}
        found.append(((run.folder.model_directory / "weights.safetensors").read_bytes(), summary["status"]))
    assert found[0] == found[1]
    assert found[0][1] == "completed"
    assert sorted(failure.split(": ")[1] for failure in failures) == ["mlflow", "tensorboard"]
    assert all(failure.endswith("; switched off") and "\n" not in failure for failure in failures)
    assert summary["track_failures"] == failures
    said = capfd.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("track: ")] == failures


def test_a_failure_stands_in_the_next_rounds_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, grid = prepare(tmp_path, num_rounds=3, track="tensorboard")
    (run.folder.path / "tensorboard").write_text("in the way")
    start = Tracking.start

    def waiting(self: Tracking, after: int) -> None:
        start(self, after)
        self._running["tensorboard"].wait(60)

    monkeypatch.setattr(Tracking, "start", waiting)
    failures = tracked(run, grid)
    notes = [row["notes"] for row in run.folder.rounds.read()]
    assert notes == [[{"client": None, "note": failures[0]}], [], []]
    assert failures[0].startswith("track: tensorboard: ")


def test_a_reason_is_one_line_without_passwords() -> None:
    error = ValueError("no answer\nfrom https://me:secret@host:5000/api or postgresql://a:b@c/d")
    assert reason_of(error) == "ValueError: no answer from https://host:5000/api or postgresql://c/d"
    assert len(reason_of(ValueError("x" * 9999))) == 300


def test_a_tracker_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands still from its start on; the run does not, and its process is gone afterwards."""
    monkeypatch.setattr(session, "CLOSES_S", 1.0)
    hanging = tmp_path / "python"
    hanging.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    hanging.chmod(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", str(hanging))
    run, _ = prepare(tmp_path, track="tensorboard")
    started = time.monotonic()
    with Tracking(run.folder, "tensorboard", tmp_path) as tracking:
        tracking.start(0)
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        assert tracking.failed() == []
    assert time.monotonic() - started < 20
    assert tracking.failures == ["track: tensorboard: it did not end within 1 s of the run; switched off"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_tracker_ends_with_a_server_that_is_killed(tmp_path: Path) -> None:
    """Its rows are told all the same, and nobody stays behind."""
    run, _ = prepare(tmp_path, track="tensorboard")
    program = f"""
import os, signal
from pathlib import Path
from fedmetanas_core.output.tracking.session import Tracking
from fedmetanas_core.run.folder import RunFolder
folder = RunFolder(Path({str(run.folder.path)!r}))
tracking = Tracking(folder, "tensorboard", folder.path)
tracking.start(0)
folder.rounds.append({{"round": 1, "seconds": 0.5}})
print(tracking._running["tensorboard"].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -9
    deadline = time.monotonic() + 60
    while Path(f"/proc/{int(done.stdout)}/cmdline").exists() and time.monotonic() < deadline:
        if "State:\tZ" in Path(f"/proc/{int(done.stdout)}/status").read_text():
            break  # nobody here collects it
        time.sleep(0.1)
    (event,) = events_of(run).Scalars("seconds")
    assert (event.step, event.value) == (1, 0.5)


def test_nothing_is_imported_where_nothing_is_tracked(tmp_path: Path) -> None:
    """Nor where something is: trackers have processes of their own."""
    program = f"""
import sys
from pathlib import Path
from local_grid import LocalGrid, roster_of
from rounds import prepare
from fedmetanas_core.output.tracking.session import Tracking, check_trackers
from server_app.app import _session
for track in ("", "tensorboard"):
    place = Path({str(tmp_path)!r}) / f"with-{{track}}"
    place.mkdir()
    run, grid = prepare(place, num_rounds=1, track=track)
    check_trackers(track)
    with Tracking(run.folder, track, place) as tracking:
        _session(roster_of(grid, run.experiment.config), run, tracking)
print(*sorted({{"tensorboard", "wandb", "mlflow"}} & sys.modules.keys()), "none")
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "none"
    assert (tmp_path / "with-tensorboard" / "run" / "tensorboard").is_dir()


def test_a_trackers_process_imports_no_torch() -> None:
    code = "import sys; import fedmetanas_core.output.tracking.program; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("track", "words"),
    [
        (
            "tensorbord",
            "track: 'tensorbord' is unknown; did you mean tensorboard? choose of tensorboard, wandb",
        ),
        ("mlflow,neptune", "track: 'neptune' is unknown; choose of"),
        ("mlflow,", "track: '' is unknown; choose of"),
    ],
)
def test_unknown_trackers_are_refused_before_anything_starts(tmp_path: Path, track: str, words: str) -> None:
    with pytest.raises(RefusalError, match="^" + words.replace("?", r"\?")):
        prepare_launch({"track": track, "runs_dir": str(tmp_path)}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_may_have_blanks_and_come_twice() -> None:
    assert tracker_names("mlflow, tensorboard,mlflow") == ["mlflow", "tensorboard"]
    assert tracker_names("") == tracker_names(" ") == []


def test_what_is_not_installed_is_refused_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of that name, such as wandb leaves where it runs, is no package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("wandb", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(RefusalError) as refused:
            check_trackers(name)
        assert str(refused.value) == f'track: {name} is not installed; pip install -e ".[{name}]"'


def test_the_last_round_goes_on_without_a_tracker_that_is_missing_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, grid = prepare(tmp_path, num_rounds=3, track="wandb,tensorboard")
    broken_off(run, grid, 2, monkeypatch)
    installed = session.find_spec
    monkeypatch.setattr(session, "find_spec", lambda name: None if name == "wandb" else installed(name))
    monkeypatch.setattr(app, "_is_virtual", lambda: True)
    app._run(grid, SimpleNamespace(run_config={"resume": str(run.folder.path)}))  # type: ignore[arg-type]
    failure = 'track: wandb: it is not installed here (pip install -e ".[wandb]"); switched off'
    notes = [note["note"] for row in run.folder.rounds.read() for note in row["notes"]]
    assert [note for note in notes if "wandb" in note] == [failure]
    assert len(events_of(run).Scalars("seconds")) == 3
    assert (run.folder.read_summary() or {})["track_failures"] == [failure]


def test_the_environment_of_trackers_reaches_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"WANDB_API_KEY": "key", "WANDB_PROJECT": "p", "MLFLOW_TRACKING_URI": "http://x", "HTTPS_PROXY": "http://y"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    simulation = Simulation(ROOT, {}, num_nodes=1, num_workers=1, launch_dir=tmp_path)
    assert given.items() <= simulation._environment(tmp_path).items()


def test_a_table_may_be_tracked_and_its_rows_do_not_depend_on_it(tmp_path: Path) -> None:
    plain = read_table(write(tmp_path))
    with_tracker = read_table(write(tmp_path, TABLE.replace("[settings]", '[settings]\ntrack = "tensorboard"')))
    assert [run.fingerprint for run in with_tracker.runs] == [run.fingerprint for run in plain.runs]
    assert with_tracker.runs[0].keys["track"] == "tensorboard"
    assert Config.from_mapping(with_tracker.runs[0].keys).track == "tensorboard"
