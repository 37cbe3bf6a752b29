"""Nodes that have no business in a run, cannot be heard, or die at work: real SuperNodes over TLS."""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from deployment import ROOT, Federation, digit_folders, wait

pytestmark = pytest.mark.e2e

QUICK = "local_epochs=1 init_channels=2 num_nodes=2"
LONG = "local_epochs=100 init_channels=2 num_nodes=2"


def digits_archive(path: Path, side: int) -> Path:
    images, labels = np.zeros((20, side, side), np.uint8), np.arange(20) % 10
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return path


def test_nodes_that_do_not_fit_are_named_and_a_run_without_enough_nodes_ends(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    places = {
        "fits": digit_folders(tmp_path / "fits", 0, 4),
        "empty": tmp_path / "empty",
        "letters": digit_folders(tmp_path / "letters", 1, 4),
        "large": digits_archive(tmp_path / "large.npz", 16),
    }
    (places["letters"] / "9").rename(places["letters"] / "x")
    with Federation(
        tmp_path / "federation", {name: f"name='{name}' data-path='{path}'" for name, path in places.items()}
    ) as federation:
        federation.begin()
        wait(lambda: federation.states_of_nodes() == ["online"] * 4, 120, "all nodes")
        run = federation.submit(
            "dataset='nodes' class_names='0,1,2,3,4,5,6,7,8,9' image_shape='1x8x8' num_clients=4 clients_per_round=2 "
            f"min_clients=2 node_timeout_s=3 {QUICK} run_name='never'"
        )
        status, details = federation.finish(run, 180)
    assert status == "finished:failed"
    assert "1 of the 2 nodes that the run waits for can take part, no more came within node_timeout_s=3" in details
    assert f"empty: {tmp_path / 'empty'} has no class folders" in details
    assert "has class folders that training does not know: x" in details
    assert "large: its images are 1x16x16, those of the run 1x8x8" in details
    assert not federation.run_folder("never").path.exists()


def log_says(federation: Federation, site: str, *words: str) -> bool:
    log = federation.logs / f"supernode-{site}.log"
    return log.exists() and all(word in log.read_text(errors="replace") for word in words)


def test_a_node_without_a_registered_key_or_of_another_authority_stays_outside(tmp_path: Path) -> None:
    sites = {"known": "partition-id=0", "unknown": "partition-id=1", "elsewhere": "partition-id=2"}
    with Federation(tmp_path / "federation", sites) as federation:
        federation.begin(["known"])
        wait(lambda: federation.is_healthy("supernode:known"), 60, "the node that is known")
        federation.start("supernode:unknown")
        wait(lambda: log_says(federation, "unknown", "Failed to activate SuperNode"), 60, "its refusal")
        # Another SuperLink's authority: the node does not trust this one, and says nothing to it.
        other = tmp_path / "other"
        subprocess.run([ROOT / "docker" / "certificates.sh", other, "localhost"], check=True, capture_output=True)
        federation.authority_of["elsewhere"] = other / "ca.crt"
        federation.register(["elsewhere"])
        federation.start("supernode:elsewhere")
        wait(lambda: log_says(federation, "elsewhere", "CERTIFICATE_VERIFY_FAILED"), 60, "its refusal")
        assert federation.states_of_nodes() == ["online", "registered"]


def test_an_expired_certificate_is_not_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAYS", "0")
    with Federation(tmp_path / "federation", {"known": "partition-id=0"}) as federation:
        federation.start("superlink")
        wait(lambda: federation.is_healthy("superlink"), 60, "the SuperLink")
        federation.start("supernode:known")
        wait(lambda: log_says(federation, "known", "certificate has expired"), 60, "the node's refusal")
        assert federation.flwr("supernode", "list", "lab")["success"] is False


def maps_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def test_a_cut_link_and_a_killed_client_cost_a_round_and_no_more(tmp_path: Path) -> None:
    sites = {f"site-{number}": f"name='site-{number}' partition-id={number}" for number in range(3)}
    with Federation(tmp_path / "federation", sites) as federation:
        if not federation.in_namespaces:
            pytest.skip("needs the right to make network namespaces")
        federation.begin()
        run = federation.submit(
            f"num_clients=4 min_clients=3 clients_per_round=4 num_rounds=5 {LONG} run_name='cut' round_timeout_s=300"
        )
        folder = federation.run_folder("cut")

        def rounds() -> int:
            return len(folder.rounds.read()) if folder.rounds.path.exists() else 0

        def trains() -> set[int]:
            """Those of site-1's processes that have loaded the kernels of the search."""
            return {pid for pid in federation.descendants("clientapp:site-1") if "/native-" in maps_of(pid)}

        wait(trains, 150, "a client in training")
        first = trains()
        wait(lambda: rounds() >= 1 and trains() - first, 150, "a client in training in the second round")
        federation.cut("site-0")
        for pid in trains() - first:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait(lambda: rounds() >= 2, 150, "the round that lost two clients")
        federation.mend("site-0")
        assert federation.finish(run, 240)[0] == "finished:completed", federation.tail("serverapp")
    rows = folder.rounds.read()
    reasons = {each["client"]: each["reason"] for each in rows[1]["excluded"]}
    assert reasons[0] == "its node went away"
    assert reasons[1] == "its client process died"
    assert "usable, but more than half of the others were not" in reasons[2]
    assert rows[1]["seconds"] > 50
    assert rows[-1]["clients"] == [0, 1, 2]
    assert rows[-1]["excluded"] == []
    events = [each["note"] for row in rows for each in row["notes"]]
    assert "site-0 is connected again" in events


def test_a_node_without_its_client_program_costs_one_deadline_and_is_back_with_it(tmp_path: Path) -> None:
    sites = {f"site-{number}": f"name='site-{number}' partition-id={number}" for number in range(2)}
    with Federation(tmp_path / "federation", sites) as federation:
        federation.begin()
        federation.submit(
            f"num_clients=2 clients_per_round=2 num_rounds=500 {QUICK} run_name='away' round_timeout_s=30"
        )
        folder = federation.run_folder("away")

        def told(client: int | None, what: str) -> bool:
            rows = folder.rounds.read() if folder.rounds.path.exists() else []
            notes = [note for row in rows for note in row["notes"]]
            return any(note["client"] == client and what in note["note"] for note in notes)

        wait(lambda: folder.rounds.path.exists() and folder.rounds.read(), 150, "the first round")
        federation.kill("clientapp:site-1")
        wait(lambda: told(None, "site-1 cannot take part: it left a message unanswered"), 200, "its message's end")
        missed = [row for row in folder.rounds.read() if row["excluded"]]
        assert [each["reason"] for row in missed for each in row["excluded"]] == ["no reply before the deadline"]
        federation.start("clientapp:site-1")
        wait(lambda: told(1, "site-1 is connected again"), 150, "its return")
