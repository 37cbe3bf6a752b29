"""A search on a Ray cluster that was there before: two Ray nodes on this machine, one of which dies on the way."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from fedmetanas_core.run.folder import RunFolder

pytestmark = pytest.mark.e2e

FEDMETANAS = str(Path(sys.executable).with_name("fedmetanas"))
KEYS = ["num_clients=4", "clients_per_round=4", "num_rounds=15", "local_epochs=1", "init_channels=2", "num_nodes=2"]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head with one core."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


def test_a_search_goes_on_when_a_machine_of_its_cluster_dies(cluster: Cluster, tmp_path: Path) -> None:
    other = cluster.add_node(num_cpus=1)
    environment = {**os.environ, "FLWR_HOME": str(tmp_path / "flower")}
    words = [FEDMETANAS, "search", *KEYS, "run_name=spread", f"ray_address={cluster.address}"]
    folder = RunFolder(tmp_path / "runs" / "spread")
    with subprocess.Popen(
        words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 240
        while not (folder.rounds.path.exists() and len(folder.rounds.read()) >= 2) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        cluster.remove_node(other, allow_graceful=False)
        out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert out.splitlines()[-1] == str(folder.path)
    assert "restart 1 of 3" in err
    summary = folder.read_summary() or {}
    assert len(summary["resumed_after"]) == 1
    assert 2 <= summary["resumed_after"][0] < 15

    subprocess.run(
        [FEDMETANAS, "search", *KEYS, "run_name=here"], cwd=tmp_path, env=environment, check=True, capture_output=True
    )
    weights = [tmp_path / "runs" / name / "model" / "weights.safetensors" for name in ("spread", "here")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_an_address_at_which_nobody_answers_is_refused(tmp_path: Path) -> None:
    for address in ("127.0.0.1:1", "nowhere"):
        done = subprocess.run(
            [FEDMETANAS, "search", *KEYS, f"ray_address={address}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert f"no Ray cluster answers at '{address}'" in done.stderr
        assert not list((tmp_path / "runs").glob("*"))
