"""A search on SuperNodes with their own images, over TLS with node keys and process isolation, through many faults."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployment import SCRIPTS, Federation, digit_folders, wait
from PIL import Image

from fedmetanas_core.run.folder import RunFolder

pytestmark = pytest.mark.e2e

QUICK = "local_epochs=1 init_channels=2 num_nodes=2 search_fraction=0.7"


def rounds(folder: RunFolder) -> int:
    return len(folder.rounds.read()) if folder.rounds.path.exists() else 0


def told(folder: RunFolder) -> list[tuple[Any, str]]:
    """(client, what happened) of all rounds, notes and exclusions alike."""
    found = []
    for row in folder.rounds.read():
        found += [(each["client"], each["note"]) for each in row["notes"]]
        found += [(each["client"], each["reason"]) for each in row["excluded"]]
    return found


def test_a_search_outlives_a_killed_node_a_killed_superlink_and_takes_in_a_late_node(tmp_path: Path) -> None:
    sites = {
        name: f"name='{name}' data-path='{digit_folders(tmp_path / name, number, 4, without=[number])}'"
        for number, name in enumerate(("north", "east", "south", "west"))
    }
    started = time.monotonic()
    with Federation(tmp_path / "federation", sites) as federation:
        federation.begin(["north", "east", "south"])
        run = federation.submit(
            f"dataset='nodes' num_clients=4 min_clients=3 clients_per_round=4 num_rounds=8 compression='int8' {QUICK} "
            "run_name='night' round_timeout_s=120"
        )
        folder = federation.run_folder("night")
        wait(lambda: rounds(folder) >= 1, 150, "the first round")
        earlier = clients(federation, "north")
        wait(lambda: clients(federation, "north") - earlier, 60, "a client in training")
        federation.kill("node:north")
        time.sleep(5)
        federation.start("node:north")  # Flower lets it in again once its old self is taken to be gone
        wait(lambda: rounds(folder) >= 2, 150, "the round of the killed node")
        federation.kill("superlink")
        time.sleep(8)
        federation.start("superlink")
        before = rounds(folder)
        wait(lambda: rounds(folder) > before, 150, "a round after the SuperLink's return")
        federation.register(["west"])
        federation.start("node:west")
        assert federation.finish(run, 300)[0] == "finished:completed", federation.tail("serverapp")
        kept = list((tmp_path / "federation" / "state" / "north").rglob("*.safetensors"))
    print(f"{time.monotonic() - started:.0f} s, {'in' if federation.in_namespaces else 'without'} network namespaces")
    summary = folder.read_summary() or {}
    assert summary["status"] == "completed"
    assert summary["max_logit_difference"] <= 1e-5
    assert [node["name"] for node in summary["nodes"]] == ["east", "north", "south", "west"]
    assert {node["train"] + node["test"] for node in summary["nodes"]} == {180}
    assert summary["clients_evaluated"] == 4
    answers = zip(summary["client_accuracy"], summary["nodes"], strict=True)
    right = sum(round(accuracy * node["test"]) for accuracy, node in answers)
    assert summary["test_accuracy"] == pytest.approx(right / sum(node["test"] for node in summary["nodes"]))
    rows, events = folder.rounds.read(), told(folder)
    assert [row["round"] for row in rows] == list(range(1, 9))
    assert rows[0]["clients"] == [0, 1, 2]
    assert 3 in rows[-1]["clients"]
    assert 1 in rows[-1]["clients"]
    assert (1, "its node went away") in events
    assert 1 not in [each["client"] for each in rows[-1]["excluded"]], "it is back"
    assert (3, "west takes part") in events
    assert any(client is None and "the SuperLink did not answer for" in what for client, what in events)
    assert len({path.parent for path in kept}) == 1, "it found its own place again"
    assert max(int(path.stem) for path in kept) == 8
    secret_or_raw(tmp_path, folder)


def clients(federation: Federation, site: str) -> set[int]:
    """The processes in which this site's client works: one for each message."""
    running = federation.descendants(f"clientapp:{site}")
    return {pid for pid, command in running.items() if "flwr-clientapp" in command}


def secret_or_raw(tmp_path: Path, folder: RunFolder) -> None:
    """No key, secret or image is in any log, run folder, client's state or cache of Flower's."""
    federation = tmp_path / "federation"
    secrets = [path.read_bytes().strip() for path in federation.glob("*/*.secret")]
    keys = [path.read_bytes().splitlines()[2] for path in (federation / "keys").iterdir() if not path.suffix]
    keys.append((federation / "certificates" / "server.key").read_bytes().splitlines()[1])
    pixels = [np.asarray(Image.open(path)) for path in tmp_path.glob("*/*/*.png")]
    images = [path.read_bytes()[33:] for path in tmp_path.glob("*/*/*.png")]
    images += [kind for image in pixels for kind in (image.tobytes(), (image / 255).astype(np.float32).tobytes())]
    assert len(secrets) == 5
    assert len(images) == 3 * 720
    kept = [folder.path, *(federation / place for place in ("logs", "state", "homes"))]
    for path in (path for place in kept for path in place.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(part in content for part in (*secrets, *keys, *images)), path


def test_a_deployment_ends_in_the_weights_of_a_simulation(tmp_path: Path) -> None:
    keys = ["num_clients=3", "clients_per_round=2", "num_rounds=3", *QUICK.split(), "compression=int8", "run_name=same"]
    sites = {f"site-{number}": f"partition-id={number}" for number in range(3)}
    with Federation(tmp_path / "federation", sites) as federation:
        federation.begin()
        run = federation.submit(" ".join(keys).replace("int8", "'int8'").replace("=same", "='same'"))
        assert federation.finish(run, 240)[0] == "finished:completed", federation.tail("serverapp")
        deployed = federation.run_folder("same")
    subprocess.run([SCRIPTS / "fedmetanas", "search", *keys], cwd=tmp_path, check=True, capture_output=True)
    simulated = RunFolder(tmp_path / "runs" / "same")
    for name in ("weights.safetensors", "genotype.json"):
        assert (deployed.model_directory / name).read_bytes() == (simulated.model_directory / name).read_bytes()
    summaries = [json.loads(folder.summary_file.read_text()) for folder in (deployed, simulated)]
    for key in ("test_accuracy", "client_accuracy", "uplink_bytes", "downlink_bytes"):
        assert summaries[0][key] == summaries[1][key], key
