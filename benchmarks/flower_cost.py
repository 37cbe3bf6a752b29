"""What a round costs in a simulation and in a deployment, and how much of that is Flower's.

    python benchmarks/flower_cost.py [--repeats 3] [--rounds 8] [--clients 2] [KEY=VALUE ...]

The same search runs in turn on virtual clients (`fedmetanas search`) and on as many SuperNodes over TLS with node keys
and process isolation, all on this machine. Of the rounds after the first: their wall time, what a client works on its
message, and the server's own work (averaging, pruning, evaluation, saving). What is left is Flower's: messages,
waiting, and in a deployment the start of a process for every message, torch's import included. Prints medians over the
runs.
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Cost:
    """Seconds a round, means over one run without its first round; ``walls`` are those of the single rounds."""

    walls: list[float]
    whole: float
    clients: float  # the mean client, from the message it was handed to the answer that it hands back
    server: float

    @classmethod
    def of(cls, folder: RunFolder) -> "Cost":
        """What the run has measured of itself."""
        summary, rows = folder.read_summary() or {}, folder.rounds.read()[1:]
        parts = {part: value / len(rows) for part, value in summary["seconds_by_part"].items() if part != "clients"}
        messages = sum(len(row["clients"]) - len(row["excluded"]) for row in rows)
        clients, whole = summary["seconds_by_part"]["clients"] / messages, sum(parts.values())
        return cls([row["seconds"] for row in rows], whole, clients, whole - parts["exchange"])

    @property
    def flower(self) -> float:
        """What is left."""
        return self.whole - self.clients - self.server


def main() -> None:
    """Run in turn, print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8, choices=range(2, 1000), metavar="2...")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    keys = [f"{name}={given.clients}" for name in ("num_clients", "clients_per_round")]
    keys += [f"num_rounds={given.rounds}", *given.keys]
    found: dict[str, list[Cost]] = {"simulation": [], "deployment": []}
    for _ in range(given.repeats):
        for kind, costs in found.items():
            with tempfile.TemporaryDirectory() as directory:
                place = Path(directory)
                costs.append(
                    Cost.of(simulate(place, keys) if kind == "simulation" else deploy(place, keys, given.clients))
                )
    for kind, costs in found.items():
        walls = [wall for cost in costs for wall in cost.walls]
        shares = [cost.flower / cost.whole for cost in costs]
        whole, clients, server, flower = (
            median(getattr(cost, part) for cost in costs) for part in ("whole", "clients", "server", "flower")
        )
        print(
            f"{kind}: {whole:.2f} s a round, single ones {min(walls):.2f} to {max(walls):.2f}; "
            f"a client {clients:.2f} s, server {server:.2f} s, Flower {flower:.2f} s "
            f"({min(shares):.0%} to {max(shares):.0%}); {len(costs)} runs of {given.rounds} rounds"
        )


if __name__ == "__main__":
    main()
