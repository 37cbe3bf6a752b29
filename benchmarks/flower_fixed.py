"""What Flower and Ray take of time and memory whatever is searched: the constants of fedmetanas_core/estimate/fixed.py.

    python benchmarks/flower_fixed.py [--repeats 3] [--rounds 12]

Runs `fedmetanas search` on the digits with three loads in turn: few small messages a round, many small ones, few large
ones (MobileNetV3-Large). Each has two workers and at least as many cores are wanted. Of the rounds after the first, the
exchange less the clients' own seconds shared out over the workers is

    seconds a round + seconds a message x messages + seconds a byte x bytes,

and three loads give the three numbers. The end is what follows after the summary is written, the start the rest of the
command's wall time that the server did not count as the run's own. Memory is what /proc says, four times a second: the
largest of the server, of a worker, and of all else together. Less what `fedmetanas estimate` measures of a plain
process that does the same, these are what Flower and Ray add.
Prints every repeat's numbers and their medians. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fedmetanas_core.run.processes import processes

WORKERS = 2
SMALL = ["init_channels=2", "num_nodes=2", "local_epochs=1"]
LOADS = {
    "few": [*SMALL, "clients_per_round=2"],
    "many": [*SMALL, "clients_per_round=12"],
    "large": ["method=fedavg", "local_epochs=1", "clients_per_round=2"],
}
NUM_CLIENTS = 20
ENTRY = "from fedmetanas_core.cli import entry_point; entry_point()"


def descendants(root: int) -> set[int]:
    """All that a process has started, as far as it is alive."""
    table, found = processes(), {root}
    while more := {each.pid for each in table if each.parent in found} - found:
        found |= more
    return found - {root}


def facts_of(pid: int) -> tuple[str, int]:
    """What a process is called, and the bytes that it holds now; nothing of one that has ended."""
    try:
        name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return "", 0
    return name, next((1024 * int(line.split()[1]) for line in status if line.startswith("VmRSS")), 0)


def kind_of(name: str) -> str:
    """Server, worker, or one of the others."""
    if name.startswith("ray::") and "IDLE" not in name:
        return "worker"
    return "server" if "flwr-simulation" in name else "others"


def watch(process: subprocess.Popen[bytes]) -> dict[str, int]:
    """The largest sizes of each kind while this process lives: of one server or worker, of all others together."""
    largest = dict.fromkeys(("server", "worker", "others"), 0)
    while process.poll() is None:
        others = 0
        for pid in descendants(process.pid):
            name, held = facts_of(pid)
            kind = kind_of(name)
            others += held if kind == "others" else 0
            if kind != "others":
                largest[kind] = max(largest[kind], held)
        largest["others"] = max(largest["others"], others)
        time.sleep(0.25)
    return largest


def measure(keys: list[str], rounds: int) -> dict[str, Any]:
    """One run: exchange beyond the clients' work, messages and bytes a round, start, memory."""
    with tempfile.TemporaryDirectory() as place:
        pairs = [*keys, f"num_clients={NUM_CLIENTS}", f"num_rounds={rounds}", f"workers={WORKERS}"]
        pairs += [f"evaluate_every={rounds}", f"runs_dir={place}", "run_name=run"]
        started = time.perf_counter()
        with (Path(place) / "log").open("wb") as log:
            command = [sys.executable, "-c", ENTRY, "search", *pairs]
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).resolve().parents[1])
            memory = watch(process)
        wall = time.perf_counter() - started
        written = Path(place) / "run" / "summary.json"
        end, summary = time.time() - written.stat().st_mtime, json.loads(written.read_text())
        rows = [json.loads(line) for line in (Path(place) / "run" / "rounds.jsonl").read_text().splitlines()][1:]
    parts = summary["seconds_by_part"]
    beyond = (parts["exchange"] - parts["clients"] / WORKERS) / len(rows)
    travelled = sum(row["uplink_bytes"] + row["downlink_bytes"] for row in rows) / len(rows)
    messages = sum(len(row["clients"]) for row in rows) / len(rows)
    return {
        "beyond": beyond,
        "messages": messages,
        "bytes": travelled,
        "start": wall - summary["seconds"] - end,
        "end": end,
        "peak": summary["peak_memory_bytes"],
        **memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=12, choices=range(2, 1000), metavar="2...")
    given = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in LOADS}
    for _ in range(given.repeats):
        for name, keys in LOADS.items():
            found[name].append(measure(keys, given.rounds))
            print(name, {key: float(f"{value:.4g}") for key, value in found[name][-1].items()}, flush=True)
    middle = {name: {key: median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    loads = np.array([[1.0, each["messages"], each["bytes"]] for each in middle.values()])
    solved = np.linalg.solve(loads, [each["beyond"] for each in middle.values()])
    print(f"seconds a round {solved[0]:.4f}, a message {solved[1]:.4f}, a gigabyte {solved[2] * 1e9:.2f}")
    for part in ("start", "end"):
        seconds = sorted(run[part] for runs in found.values() for run in runs)
        print(f"{part}: {median(seconds):.1f} s, {seconds[0]:.1f} to {seconds[-1]:.1f}")
    for kind in ("server", "worker", "others"):
        print(f"{kind}: {middle['few'][kind] / 1e6:.0f} MB with few messages, {middle['large'][kind] / 1e6:.0f} large")


if __name__ == "__main__":
    main()
