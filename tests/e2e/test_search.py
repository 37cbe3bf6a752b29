"""`fedmetanas search` as a user types it: real Flower processes, real Ray."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from searching import FEDMETANAS, QUICK, environment, processes_of, search

from fedmetanas_core.run.folder import RunFolder
from fedmetanas_core.space.network import load_network

pytestmark = pytest.mark.e2e

SUMMARY_KEYS = {
    "method", "dataset", "partition", "dir_alpha", "seed", "num_clients", "rounds", "status", "test_accuracy",
    "test_accuracy_supernet", "max_logit_difference", "client_accuracy_mean", "client_accuracy_std", "genotype",
    "parameters", "macs", "uplink_bytes", "downlink_bytes", "seconds", "peak_memory_bytes",
}  # fmt: skip
ROUND_KEYS = {
    "round", "phase", "temperature", "clients", "excluded", "notes", "train_loss", "test_accuracy", "alive_operations",
    "macs", "parameters", "uplink_bytes", "downlink_bytes", "seconds",
}  # fmt: skip


def rounds_without_times(folder: RunFolder) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in folder.rounds.read()]


def test_a_search_with_a_hundred_clients(tmp_path: Path) -> None:
    done = search(tmp_path, "num_rounds=3", "dir_alpha=0.1")
    assert done.returncode == 0, done.stderr
    assert processes_of(tmp_path) == []
    folder = RunFolder.open(Path(done.stdout.splitlines()[-1]))
    assert folder.path.parent == tmp_path / "runs"
    summary = json.loads(folder.summary_file.read_text())
    assert set(summary) >= SUMMARY_KEYS
    assert (summary["status"], summary["num_clients"], summary["dir_alpha"]) == ("completed", 100, 0.1)
    assert summary["max_logit_difference"] <= 1e-5
    rows = folder.rounds.read()
    assert len(rows) == 3
    for row in rows:
        assert set(row) >= ROUND_KEYS
        assert len(set(row["clients"])) == 5
        assert row["excluded"] == []
    config = yaml.safe_load(folder.config_file.read_text())
    assert config["num_rounds"] == 3
    assert "auto" not in (config["num_cells"], config["batch_size"], config["samples_per_client"])
    assert config["versions"]["flwr"] == "1.41.0"
    network, images = load_network(folder.path)
    assert network.genotype.to_dict() == summary["genotype"]
    assert len(images.class_names) == 10
    assert f"{100 * summary['test_accuracy']:.1f} %" in folder.report_file.read_text()
    assert len(list(folder.pictures_directory.iterdir())) == 8
    assert "num-supernodes = 100" in (tmp_path / "flower" / "config.toml").read_text()


def test_one_or_two_workers_give_the_same_bytes(tmp_path: Path) -> None:
    folders = []
    for workers in (1, 2):
        done = search(
            tmp_path,
            *("num_clients=8", "clients_per_round=4", "num_rounds=4"),
            *(f"workers={workers}", f"run_name=w{workers}"),
        )
        assert done.returncode == 0, done.stderr
        folders.append(RunFolder.open(Path(done.stdout.splitlines()[-1])))
    one, two = folders
    weights = [(folder.model_directory / "weights.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    assert rounds_without_times(one) == rounds_without_times(two)


def test_a_run_that_fails_says_so(tmp_path: Path) -> None:
    done = search(tmp_path, "num_clients=2", "clients_per_round=2", "num_rounds=2", "round_timeout_s=0.001")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "no reply before the deadline" in done.stderr
    assert processes_of(tmp_path) == []
    (folder,) = (tmp_path / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) >= SUMMARY_KEYS
    assert summary["status"] == "failed"
    assert "for 2 rounds in a row" in summary["error"]
    assert (folder / "checkpoint" / "state.safetensors").exists()
    assert (folder / "run.log").stat().st_size > 0


def test_an_interrupted_run_is_saved_leaves_nothing_behind_and_goes_on(tmp_path: Path) -> None:
    pairs = [*QUICK, "num_clients=4", "clients_per_round=2", "num_rounds=200", "run_name=long"]
    process = subprocess.Popen(
        [FEDMETANAS, "search", *pairs],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in a shell's background, programs are started deaf to this signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    folder = RunFolder(tmp_path / "runs" / "long")
    deadline = time.monotonic() + 400
    while not folder.rounds.path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    resume = [FEDMETANAS, "search", f"resume={folder.path}"]
    meanwhile = subprocess.run(resume, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert meanwhile.returncode == 2
    assert "is in use by process" in meanwhile.stderr
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 130, err
    assert out == ""
    assert f"fedmetanas search resume={folder.path}" in err
    assert processes_of(tmp_path) == []
    summary = folder.read_summary()
    assert summary is not None
    assert set(summary) >= SUMMARY_KEYS
    assert summary["status"] == "interrupted"
    assert summary["uplink_bytes"] == sum(row["uplink_bytes"] for row in folder.rounds.read())
    assert 200 > summary["rounds"] == len(folder.rounds.read()) > 0

    done = subprocess.run(resume, env=environment(tmp_path), capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder.path)
    assert [row["round"] for row in folder.rounds.read()] == list(range(1, 201))
    again = subprocess.run(resume, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (0, f"{folder.path}\n")
    assert "complete" in again.stderr
