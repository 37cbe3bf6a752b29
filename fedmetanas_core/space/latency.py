"""How long one image takes: measured, operation by operation, on the machine that will run the network."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from fedmetanas_core.errors import RefusalError
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.cost import sides_after_cells
from fedmetanas_core.space.genotype import Genotype, pairwise_genotype, random_genotype
from fedmetanas_core.space.network import Network
from fedmetanas_core.space.operations import Pooling, make_weighted_operation
from fedmetanas_core.space.spec import PRIMITIVES, CellGeometry, SpaceSpec
from fedmetanas_core.space.supernet import POOLS

WHOLE_NETWORKS = 8
WARM_UPS, PASSES = 3, 20  # of everything that is timed; the fastest counts, since what disturbs only adds


@dataclass(frozen=True)
class Latencies:
    """Milliseconds of one image on one core: ``base`` of what every network has, and of each operation.

    ``operations`` (cells, 2, 8): of every cell's width, with stride 1 and with stride 2 (0 where a cell has none).
    """

    base: float
    operations: tuple[tuple[tuple[float, ...], ...], ...]

    def to_text(self) -> str:
        """In microseconds: base; then the cells, 16 numbers each."""
        cells = (",".join(f"{1000 * value:.4g}" for row in cell for value in row) for cell in self.operations)
        return ";".join([f"{1000 * self.base:.4g}", *cells])

    @classmethod
    def from_text(cls, text: str, spec: SpaceSpec) -> "Latencies":
        """The inverse; RefusalError for anything else."""
        try:
            base, *cells = [[float(word) / 1000 for word in part.split(",")] for part in text.split(";")]
            (first,), size = base, len(PRIMITIVES)
            fits = len(cells) == spec.num_cells and all(len(cell) == 2 * size for cell in cells)
            values = [first, *(value for cell in cells for value in cell)]
            if not fits or not all(0.0 <= value < math.inf for value in values):
                raise ValueError("another number of values than this space has, or one that is no time")
        except ValueError as error:
            raise RefusalError(f"latency_table: it cannot be read: {error}", "leave it at auto") from error
        return cls(first, tuple((tuple(cell[:size]), tuple(cell[size:])) for cell in cells))

    def slower(self, other: "Latencies") -> "Latencies":
        """What neither machine exceeds, entry by entry."""
        operations = tuple(
            tuple(tuple(map(max, *rows)) for rows in zip(*cells, strict=True))
            for cells in zip(self.operations, other.operations, strict=True)
        )
        return Latencies(max(self.base, other.base), operations)

    def table(self, spec: SpaceSpec) -> Tensor:
        """(cells, edges, 8), float64: edges out of a reduction cell's inputs have stride 2."""
        found = torch.zeros(spec.num_cells, spec.num_edges, len(PRIMITIVES), dtype=torch.float64)
        for index, geometry in enumerate(spec.cells):
            for node in range(spec.num_nodes):
                for source in range(2 + node):
                    row = self.operations[index][_strides(geometry, source) - 1]
                    found[index, spec.edge(node, source)] = torch.tensor(row, dtype=torch.float64)
        return found


def _strides(geometry: CellGeometry, source: int) -> int:
    return 2 if geometry.kind == "reduce" and source < 2 else 1


def measure_latencies(spec: SpaceSpec) -> Latencies:
    """By torch's own operations on one core, as exported networks run them; takes a second or a few.

    Alone an operation takes less than within a network, whose sums and copies it causes; so whole random networks are
    timed as well, and a straight line through them gives what every network has and by how much operations count more.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            alone = Latencies(0.0, _measure_operations(spec))
            generator = torch.Generator().manual_seed(0)
            genotypes = [pairwise_genotype(Architecture(replace(spec, inputs="pair")))]
            genotypes += [random_genotype(replace(spec, inputs="pair"), generator) for _ in range(WHOLE_NETWORKS - 1)]
            whole = [_whole_network(genotype, spec) for genotype in genotypes]
    finally:
        torch.set_num_threads(threads)
    parts = [edges_ms(alone.table(spec), genotype, spec) for genotype in genotypes]
    slope, base = _line(parts, whole)
    # As if none were faster than the slowest beside its line: a limit is to be kept, not met on average.
    slowest = max(each / (base + slope * part) for part, each in zip(parts, whole, strict=True))
    slope, base = slope * slowest, base * slowest
    scaled = tuple(tuple(tuple(slope * value for value in row) for row in cell) for cell in alone.operations)
    return Latencies(base, scaled)


def edges_ms(table: Tensor, genotype: Genotype, spec: SpaceSpec) -> float:
    """What the edges of a genotype take by a table (cells, edges, 8)."""
    masks = genotype.masks(replace(spec, inputs="pair"))[0]
    return sum(float(table[index][masks[cell.group]].sum()) for index, cell in enumerate(spec.cells))


def _line(parts: Sequence[float], whole: Sequence[float]) -> tuple[float, float]:
    """Slope and start of whole over parts by least squares; operations never count less than alone."""
    mean_part, mean_whole = fmean(parts), fmean(whole)
    spread = sum((part - mean_part) ** 2 for part in parts)
    joint = sum((part - mean_part) * (each - mean_whole) for part, each in zip(parts, whole, strict=True))
    slope = max(1.0, joint / spread) if spread > 0 else 1.0
    slope = min(slope, mean_whole / mean_part) if mean_part > 0 else slope  # nothing takes less than no time
    return slope, max(0.0, mean_whole - slope * mean_part)


def _whole_network(genotype: Genotype, spec: SpaceSpec) -> float:
    network = Network(genotype, replace(spec, inputs="pair")).eval()
    image = torch.zeros(1, spec.in_channels, spec.height, spec.width)
    return _milliseconds(lambda: network.forward_by_modules(image))


def _measure_operations(spec: SpaceSpec) -> tuple[tuple[tuple[float, ...], ...], ...]:
    found = []
    for geometry, (height, width) in zip(spec.cells, sides_after_cells(spec), strict=True):
        rows = []
        for stride in (1, 2):
            exists = stride == 1 or geometry.kind == "reduce"
            # Its own output's size, before a stride of 2.
            x = torch.zeros(1, geometry.channels, stride * height, stride * width)
            x = x.contiguous(memory_format=torch.channels_last)
            operations = [_operation(name, geometry.channels, stride, spec.norm) for name in PRIMITIVES]
            rows.append(tuple(_milliseconds(each, x) if each and exists else 0.0 for each in operations))
        found.append((rows[0], rows[1]))
    return tuple(found)


def _operation(name: str, channels: int, stride: int, norm: str) -> Callable[[Tensor], Tensor] | None:
    """What an edge computes, None where that is nothing."""
    if name in POOLS:
        return Pooling(name, channels, stride, norm).eval()
    module = make_weighted_operation(name, channels, stride, norm)
    if module is None:
        return None
    module.eval()
    return lambda x: type(module).together([module], x, None)


def _milliseconds(run: Callable[..., Tensor], *inputs: Tensor) -> float:
    """The fastest of several passes."""
    for _ in range(WARM_UPS):
        run(*inputs)
    times = []
    for _ in range(PASSES):
        started = time.perf_counter()
        run(*inputs)
        times.append(time.perf_counter() - started)
    return 1000 * min(times)
