"""Memory of the search step: its peak above that after the imports, and whether it grows.

python benchmarks/memory.py --scale tiny|small|paper [--steps 200]

Takes so many tasks of batch 32, as supernet_step.py. Prints the resident memory after the imports and the peak, in
MB, and what the last half of the steps added to it. Linux only.
"""

import argparse
import resource
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.setting import BATCH, SCALES, architecture_of
from benchmarks.supernet_step import make_product_alone
from fedmetanas_core.space.native import build


def resident() -> float:
    """Resident memory of this process now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"compiled code: {build.prepare() or 'yes'}; torch {torch.__version__}, 1 thread")
    at_first = resident()
    task = make_product_alone(architecture_of(SCALES[given.scale], "1.0"), BATCH, "cpu")
    held = []
    for _ in range(given.steps):
        task()
        held.append(resident())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(f"after the imports {at_first:.0f} MB, peak {peak:.0f} MB: {peak - at_first:.0f} MB above")
    print(f"the last {given.steps - given.steps // 2} steps added {held[-1] - held[given.steps // 2 - 1]:.1f} MB")


if __name__ == "__main__":
    main()
