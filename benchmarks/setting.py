"""The three sizes at which everything is measured, networks of them with fewer operations, and paired timing."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.spec import CELL_KINDS, NONE, SpaceSpec

SCALES = {
    "tiny": SpaceSpec(init_channels=4, num_cells=3, num_nodes=3, in_channels=1, num_classes=10, height=8, width=8),
    "small": SpaceSpec(init_channels=8, num_cells=5, num_nodes=4, in_channels=3, num_classes=10, height=32, width=32),
    "paper": SpaceSpec(init_channels=16, num_cells=8, num_nodes=4, in_channels=3, num_classes=10, height=32, width=32),
}
BATCH = 32
GENOTYPE = "genotype"

Batch = tuple[Tensor, Tensor]


def architecture_of(spec: SpaceSpec, kept: str, seed: int = 0) -> Architecture:
    """Initial logits; masks with a share of all operations drawn at random, or with one random genotype.

    ``kept`` is "genotype" or a number in (0, 1]. Every edge keeps at least one operation, and all input pairs stay,
    so that 0.125 means one operation on each edge.
    """
    architecture = Architecture(spec).initialise(torch.Generator().manual_seed(seed))
    draw = random.Random(seed)
    operations, pairs = torch.zeros_like(architecture.operation_mask), architecture.input_mask.clone()
    if kept == GENOTYPE:
        pairs.zero_()
        for kind in range(len(CELL_KINDS)):
            for node in range(spec.num_nodes):
                pairs[kind, node, draw.randrange(len(spec.pairs(node)))] = True
            for edge in range(spec.num_edges):
                operations[kind, edge, draw.randrange(NONE + 1, operations.shape[-1])] = True
    else:
        rows = operations.flatten(0, 1)
        for row in rows:
            row[draw.randrange(len(row))] = True
        others = [place for place, is_kept in enumerate(rows.flatten().tolist()) if not is_kept]
        missing = round(float(kept) * rows.numel()) - len(rows)
        rows.view(-1)[draw.sample(others, max(0, missing))] = True
    architecture.restrict(operations, pairs)
    return architecture


def random_batch(spec: SpaceSpec, images: int, generator: torch.Generator, like: Tensor) -> Batch:
    """Standard normal images and labels drawn evenly, on the device of ``like`` and in its type."""
    drawn = torch.randn(images, spec.in_channels, spec.height, spec.width, generator=generator, dtype=torch.float64)
    labels = torch.randint(spec.num_classes, (images,), generator=generator)
    return drawn.to(like.device, like.dtype), labels.to(like.device)


@dataclass(frozen=True)
class Clock:
    """Seconds: of this process on a processor, whatever else runs there; of the wall on a GPU, when it is done."""

    device: str

    def __call__(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def interleave(parts: dict[str, Callable[[], object]], times: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of each part, taken in turn ``times`` times after one unmeasured turn."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(times + 1):
        for name, part in parts.items():
            started = clock()
            part()
            if turn:
                seconds[name].append(clock() - started)
    return seconds


def median_and_range(values: list[float]) -> str:
    """``MEDIAN [MIN-MAX] n=COUNT``."""
    return f"{median(values):.2f} [{min(values):.2f}-{max(values):.2f}] n={len(values)}"
