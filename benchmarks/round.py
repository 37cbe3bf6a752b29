"""Where the time of a round goes: the clients' search, Flower and Ray, averaging, evaluation, saving.

python benchmarks/round.py [--scale tiny|small|paper] [--rounds 12] [KEY=VALUE ...]

Runs `fedmetanas search` with its real processes on images of noise (tiny: the digits), every round with the full
supernet. The search's part of the exchange is the clients' own seconds, shared out over the workers; the rest of the
exchange is Flower and Ray, which includes the wait for the slower worker. Prints seconds a round and percent for each
part, without the first round, in which the workers start; the last line is the share of Flower and Ray.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.setting import SCALES

IMAGES_EACH = 192
CLIENTS = 4  # as many for every worker
TINY = "tiny"


def noise(path: Path, scale: str) -> None:
    """Images of the scale's shape, enough for every client; 200 test images."""
    spec, draw = SCALES[scale], np.random.default_rng(0)
    shape = (spec.height, spec.width, spec.in_channels)
    train, test = (draw.integers(0, 256, (count, *shape), dtype=np.uint8) for count in (2000, 200))
    labels = [np.arange(count) % spec.num_classes for count in (2000, 200)]
    np.savez(path, x_train=train, y_train=labels[0], x_test=test, y_test=labels[1])


def settings(scale: str, folder: Path) -> list[str]:
    """What makes the search that of the scale."""
    if scale == TINY:
        return []
    noise(folder / "noise.npz", scale)
    spec = SCALES[scale]
    size = [f"init_channels={spec.init_channels}", f"num_cells={spec.num_cells}", f"num_nodes={spec.num_nodes}"]
    return [f"dataset={folder / 'noise.npz'}", f"samples_per_client={IMAGES_EACH}", "local_epochs=1", *size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error("--rounds must be at least 2: the first one is not counted")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pairs = [*settings(given.scale, folder), f"num_rounds={given.rounds}", f"workers={given.workers}"]
        pairs += [f"clients_per_round={CLIENTS}", "num_clients=20"]
        # Nothing is pruned in these rounds, and nothing measured but at the end.
        pairs += ["prune_cap=off", "prune_threshold=0", "none_policy=legal", f"evaluate_every={given.rounds}"]
        entry = "from fedmetanas_core.cli import entry_point; entry_point()"
        command = [sys.executable, "-c", entry, "search", *pairs, f"runs_dir={folder}", "run_name=run"]
        subprocess.run([*command, *given.settings], check=True, cwd=Path(__file__).resolve().parents[1])
        summary = json.loads((folder / "run" / "summary.json").read_text())
    report(summary["seconds_by_part"], given.rounds - 1, given.workers)


def report(parts: dict[str, float], rounds: int, workers: int) -> None:
    """Seconds a round and percent of each part."""
    search = parts["clients"] / workers
    rest = {name: parts[name] for name in ("averaging", "evaluation", "saving", "other")}
    shares = {"search": search, "Flower and Ray": parts["exchange"] - search, **rest}
    whole = sum(shares.values())
    print(f"{rounds} rounds of {CLIENTS} clients on {workers} workers, {whole / rounds:.3f} s each")
    for name, seconds in shares.items():
        print(f"{name:15} {seconds / rounds:8.3f} s a round {100 * seconds / whole:6.1f} %")
    print(f"Flower and Ray take {100 * shares['Flower and Ray'] / whole:.1f} % of a round")


if __name__ == "__main__":
    main()
