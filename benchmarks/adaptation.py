"""How fast clients that the search has not seen adapt the found network, over several searches.

    python benchmarks/adaptation.py --name digits [--seeds 0 1 2] [--unseen 20] [--runs-dir runs] [--picture FILE.svg]
                                    [--config FILE.toml] [KEY=VALUE ...]

Searches with `unseen_clients`, one run a seed (NAME0, NAME1, ...; one that is complete is not run again), then adapts
each network to its unseen clients by `fedmetanas adapt`. Prints accuracy on their evaluation images after each number
of steps, adapted and from scratch: mean and deviation over clients within a run, mean over runs.
"""

import argparse
import json
import sys
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev

from fedmetanas_core.cli import main as fedmetanas
from fedmetanas_core.output.adapted import NAMES, Curves, draw_adaptation
from fedmetanas_core.runs import is_complete


def curves_of(run: Path) -> Curves:
    """What the command wrote."""
    found = json.loads((run / "adapted" / "unseen" / "curve.json").read_text())
    own, scratch = ([tuple(each[kind]) for each in found["clients"]] for kind in NAMES)
    names = [f"{run.name}/{each['client']}" for each in found["clients"]]
    images = [tuple(each["images"]) for each in found["clients"]]
    return Curves(tuple(found["steps"]), tuple(names), tuple(own), tuple(scratch), tuple(images))


def together(curves: list[Curves]) -> Curves:
    """All clients of all runs."""
    parts = (chain(*(getattr(each, part) for each in curves)) for part in ("clients", *NAMES, "images"))
    return Curves(curves[0].steps, *map(tuple, parts))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="adaptation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--unseen", type=int, default=20)
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--picture", type=Path)
    given, search = parser.parse_known_args()
    curves = []
    for seed in given.seeds:
        run = Path(given.runs_dir).absolute() / f"{given.name}{seed}"
        keys = [f"unseen_clients={given.unseen}", f"seed={seed}", f"run_name={run.name}", f"runs_dir={run.parent}"]
        if not ((run / "config.yaml").exists() and is_complete(run)) and fedmetanas(["search", *search, *keys]):
            sys.exit(1)
        if fedmetanas(["adapt", str(run), "--unseen"]):
            sys.exit(1)
        curves.append(curves_of(run))
    for kind, name in NAMES.items():
        each = [f"{100 * fmean(values):.1f}" for values in zip(*(one.means(kind) for one in curves), strict=True)]
        between = [
            f"{100 * stdev(values):.1f}" if len(values) > 1 else "-"
            for values in zip(*(one.means(kind) for one in curves), strict=True)
        ]
        clients = [f"{100 * fmean(values):.1f}" for values in zip(*(one.spreads(kind) for one in curves), strict=True)]
        print(f"{name}: {', '.join(map('{} ± {} (clients {})'.format, each, between, clients))}")
    if given.picture is not None:
        given.picture.write_bytes(draw_adaptation(together(curves))["svg"])


if __name__ == "__main__":
    main()
