"""What half of the multiply-adds cost in accuracy, over several searches.

    python benchmarks/budget.py [--share 0.5] [--seeds 0 1 2] [--runs-dir runs] [KEY=VALUE ...]

For each seed a search without a budget (free0, free1, ...) and one with `max_macs` at this share of what the network of
the first needs (half0, ...); one that is complete is not run again. Prints both, and means.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fedmetanas_core.cli import main as fedmetanas
from fedmetanas_core.runs import is_complete


def searched(run: Path, keys: list[str]) -> dict[str, Any]:
    """The summary of this run, made if it is not there."""
    words = ["search", *keys, f"run_name={run.name}", f"runs_dir={run.parent}"]
    if not ((run / "config.yaml").exists() and is_complete(run)) and fedmetanas(words):
        sys.exit(1)
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs-dir", default="runs")
    given, search = parser.parse_known_args()
    folder = Path(given.runs_dir).absolute()
    pairs = []
    for seed in given.seeds:
        free = searched(folder / f"free{seed}", [*search, f"seed={seed}"])
        limit = int(given.share * free["macs"])
        half = searched(folder / f"half{seed}", [*search, f"seed={seed}", f"max_macs={limit}"])
        assert half["budget"]["max_macs"]["met"]
        pairs.append((free["test_accuracy"], half["test_accuracy"]))
        print(
            f"seed {seed}: {free['macs']:,} multiply-adds, accuracy {free['test_accuracy']:.4f}; max_macs={limit:,}: "
            f"{half['macs']:,}, accuracy {half['test_accuracy']:.4f}",
            flush=True,
        )
    names = ("free", "within the budget", "difference")
    for name, values in zip(names, (*zip(*pairs, strict=True), [half - free for free, half in pairs]), strict=True):
        spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
        print(f"{name}: {100 * fmean(values):.1f}{spread}")


if __name__ == "__main__":
    main()
