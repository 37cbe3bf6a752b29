"""`fedmetanas compare` through real Flower processes: killed outright in the middle, and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

TABLE = """
methods = ["random_search", "perfedrlnas"]
seeds = [0]

[settings]
num_clients = 4
clients_per_round = 2
num_rounds = 2
local_epochs = 1
init_channels = 2
num_cells = 3
num_nodes = 2
evaluate_every = 1

[[dataset]]
name = "digits"

[[partition]]
name = "evenly"
partition = "iid"
"""
LONGEST_S = 240


def start(tmp_path: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "FLWR_HOME": str(tmp_path / "flwr"), "FEDMETANAS_RUNS": str(tmp_path / "runs")}
    code = "import sys; from fedmetanas_core.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "compare", "table.toml"]
    return subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_table_survives_sigkill(tmp_path: Path) -> None:
    (tmp_path / "table.toml").write_text(TABLE)
    rows = tmp_path / "results/table/rows"
    first, deadline = start(tmp_path), time.monotonic() + LONGEST_S
    while not (rows.is_dir() and list(rows.glob("*.json"))):
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.5)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    kept = {path.name: path.read_bytes() for path in rows.glob("*.json")}
    second = start(tmp_path)
    out, said = second.communicate(timeout=LONGEST_S)
    assert second.returncode == 0, said
    assert f"2 runs, {len(kept)} of them are there" in said
    assert out.strip() == str(tmp_path / "results/table/table.md")
    assert {name: (rows / name).read_bytes() for name in kept} == kept
    found = {path.name: json.loads(path.read_text()) for path in rows.glob("*.json")}
    assert {row["method"] for row in found.values()} == {"random_search", "perfedrlnas"}
    for row in found.values():
        assert row["compute_seconds"] > 0
        assert [at["round"] for at in row["curve"]] == [1, 2]
        assert 0 <= row["test_accuracy"] <= 1
    page = (tmp_path / "results/table/table.md").read_text()
    assert "| perfedrlnas |" in page
