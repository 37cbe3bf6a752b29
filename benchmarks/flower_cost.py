"""What a round costs in a simulation and in a deployment, and how much of that is Flower's.

    python benchmarks/flower_cost.py [--repeats 3] [--rounds 8] [--clients 2] [KEY=VALUE ...]

The same search runs in turn on virtual clients (`fedmetanas search`) and on as many SuperNodes over TLS with node keys
and process isolation, all on this machine. Of every round after the first: its wall time, the longest training of a
client, and the server's own work (averaging, pruning, evaluation, saving). What is left is Flower's: messages, waiting,
and in a deployment the start of a process for every message, torch's import included. Prints median and range over all
rounds.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from fedmetanas_core.run.folder import RunFolder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from deployment import SCRIPTS, Federation


def simulate(place: Path, keys: list[str]) -> RunFolder:
    """One run on virtual clients."""
    subprocess.run(
        [SCRIPTS / "fedmetanas", "search", *keys, "run_name=run"], cwd=place, check=True, capture_output=True
    )
    return RunFolder(place / "runs" / "run")


def deploy(place: Path, keys: list[str], clients: int) -> RunFolder:
    """One run on SuperNodes."""
    sites = {f"site-{number}": f"partition-id={number}" for number in range(clients)}
    with Federation(place / "federation", sites) as federation:
        federation.begin()
        status = federation.finish(federation.submit(" ".join([*keys, "run_name='run'"])), 1800)
        if status[0] != "finished:completed":
            raise RuntimeError(str(status))
    return federation.run_folder("run")


def parts(folder: RunFolder) -> list[tuple[float, float, float]]:
    """(wall, longest training, the server's own work) of every round after the first, in seconds."""
    summary = folder.read_summary() or {}
    rows = folder.read_rounds()[1:]
    by_part = summary["seconds_by_part"]
    own = sum(value for part, value in by_part.items() if part not in ("clients", "exchange")) / len(rows)
    return [(row["seconds"], row["longest_compute_seconds"], own) for row in rows]


def main() -> None:
    """Run in turn, print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    keys = [f"{name}={given.clients}" for name in ("num_clients", "clients_per_round")]
    keys += [f"num_rounds={given.rounds}", *given.keys]
    found: dict[str, list[tuple[float, float, float]]] = {"simulation": [], "deployment": []}
    for _ in range(given.repeats):
        for kind, rows in found.items():
            with tempfile.TemporaryDirectory() as directory:
                place = Path(directory)
                folder = simulate(place, keys) if kind == "simulation" else deploy(place, keys, given.clients)
                rows += parts(folder)
    for kind, rows in found.items():
        walls = [wall for wall, _, _ in rows]
        training, own = median(longest for _, longest, _ in rows), median(own for _, _, own in rows)
        share = median((wall - longest - work) / wall for wall, longest, work in rows)
        print(
            f"{kind}: {median(walls):.2f} s a round [{min(walls):.2f}-{max(walls):.2f}] n={len(walls)}; "
            f"training {training:.2f} s, server {own:.2f} s, Flower's share {share:.0%}"
        )
    ratio = median(wall for wall, _, _ in found["deployment"]) / median(wall for wall, _, _ in found["simulation"])
    print(f"a round of the deployment takes {ratio:.1f} times as long as one of the simulation")


if __name__ == "__main__":
    main()
