"""What a search step costs once operations are pruned, against the step of the full supernet in the same process.

python benchmarks/pruned_step.py --scale tiny|small|paper [--turns 5] [--masks 3]

A task is that of supernet_step.py, the product's alone, float32, one thread. For every share of operations kept there
are some masks drawn at random; each turn times all of them and the full supernet. One line a share: median, range
and number of the ratios to the full step of the same turn.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.setting import BATCH, GENOTYPE, SCALES, Clock, architecture_of, interleave, median_and_range
from benchmarks.supernet_step import make_product_alone
from fedmetanas_core.space.native import build

SHARES = ("1.0", "0.75", "0.5", "0.25", "0.125", GENOTYPE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--masks", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"compiled code: {build.prepare() or 'yes'}; torch {torch.__version__}, 1 thread")
    spec = SCALES[given.scale]
    parts = {"full": make_product_alone(architecture_of(spec, "1.0"), BATCH, "cpu")}
    for share in SHARES:
        for mask in range(given.masks if share != "1.0" else 1):
            parts[f"{share} {mask}"] = make_product_alone(architecture_of(spec, share, mask), BATCH, "cpu")
    seconds = interleave(parts, given.turns, Clock("cpu"))
    for share in SHARES:
        names = [name for name in parts if name.split()[0] == share]
        ratios = [own / full for name in names for own, full in zip(seconds[name], seconds["full"], strict=True)]
        print(f"{share}: {median_and_range(ratios)}")


if __name__ == "__main__":
    main()
