"""The geometry of a DARTS search space: cells, nodes, edges, pairs, channels and map sizes."""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Literal

from fedmetanas_core.errors import RefusalError

CellKind = Literal["normal", "reduce"]
CELL_KINDS: tuple[CellKind, CellKind] = ("normal", "reduce")

# The order is part of the wire format (DARTS, genotypes.PRIMITIVES).
PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
NONE, SKIP = PRIMITIVES.index("none"), PRIMITIVES.index("skip_connect")

# Two reductions leave an 8x8 image a 2x2 map, the smallest on which batch norm of one image has a variance.
# Larger ones are typing errors, or files that want to exhaust a machine.
MOST_CHANNELS, MOST_CELLS, MOST_NODES = 512, 64, 16
SMALLEST_SIDE = 8
STEM_STRIDE = {"cifar": 1, "stride2": 2, "imagenet": 8}


@dataclass(frozen=True)
class CellGeometry:
    """One cell: its kind, its channels, and what it reads."""

    kind: CellKind
    group: int  # which row of the alphas is its own; see SpaceSpec.groups
    channels: int
    channels_before_previous: int  # channels of s0, the output of the cell before the previous one
    channels_previous: int  # channels of s1, the output of the previous cell
    after_reduction: bool  # the previous cell halved the map, so s0 is twice as wide and high as s1


@dataclass(frozen=True)
class SpaceSpec:
    """Everything that fixes the shapes of a supernet and of every network found in it.

    ``stem`` is ``cifar`` (one 3x3 convolution), ``stride2`` (the same with stride 2, a quarter of the work) or
    ``imagenet`` (three 3x3 convolutions of stride 2). ``inputs`` says what a node reads: one ``pair`` of its candidate
    inputs, itself searched, or ``all`` of them (DARTS). ``norm`` inside the cells is ``batch`` (without scale and
    shift), ``affine`` (batch norm with them) or ``group`` (group norm, which needs no statistics). The last
    ``personal_cells`` have alphas of their own; an ``auxiliary`` classifier reads what lies before them.
    Raises RefusalError when the image is too small for the cells, or a size is out of range.
    """

    init_channels: int
    num_cells: int
    num_nodes: int
    in_channels: int
    num_classes: int
    height: int
    width: int
    stem: str = "cifar"
    inputs: str = "pair"
    norm: str = "batch"
    personal_cells: int = 0
    auxiliary: bool = False

    def __post_init__(self) -> None:
        for name, most in (("init_channels", MOST_CHANNELS), ("num_cells", MOST_CELLS), ("num_nodes", MOST_NODES)):
            if not 1 <= getattr(self, name) <= most:
                raise RefusalError(f"{name}: {getattr(self, name)} is out of range", f"give 1 to {most}")
        smallest = SMALLEST_SIDE * STEM_STRIDE[self.stem]
        if min(self.height, self.width) < smallest:
            raise RefusalError(
                f"dataset: images of {self.height}x{self.width} are too small for the cells",
                f"give images of at least {smallest}x{smallest}"
                + (" or set stem=cifar" if self.stem != "cifar" else ""),
            )

    @property
    def num_edges(self) -> int:
        """Candidate edges of one cell: 2 + 3 + ... (14 for four nodes)."""
        return self.first_edge(self.num_nodes)

    @staticmethod
    def first_edge(node: int) -> int:
        """Index of the first edge into intermediate node ``node`` (0-based); edges are ordered node-major."""
        return node * (node + 3) // 2

    def edge(self, node: int, source: int) -> int:
        """Index of the edge from ``source`` (0 and 1 are the cell's inputs, 2 + i is node i) into ``node``."""
        return self.first_edge(node) + source

    @staticmethod
    def pairs(node: int) -> list[tuple[int, int]]:
        """The candidate input pairs of a node, in lexicographic order: C(2 + node, 2) of them."""
        return list(combinations(range(2 + node), 2))

    def candidate_pairs(self, node: int) -> list[tuple[int, int]]:
        """The pairs among which a node chooses: ``pairs``, or none at all where it reads every input."""
        return self.pairs(node) if self.inputs == "pair" else []

    @property
    def max_pairs(self) -> int:
        """Candidate pairs of the last node, which has most."""
        return len(self.candidate_pairs(self.num_nodes - 1))

    @property
    def first_personal_cell(self) -> int:
        """Index of the first cell with alphas of its own; ``num_cells`` if there is none."""
        return self.num_cells - self.personal_cells

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Names of the sets of alphas: of the normal and the reduction cells, then of the personal ones that exist."""
        last = range(self.first_personal_cell, self.num_cells)
        kinds = {index in self.reductions for index in last}
        return (*CELL_KINDS, *(f"personal_{CELL_KINDS[reduces]}" for reduces in sorted(kinds)))

    @cached_property
    def reductions(self) -> frozenset[int]:
        """Indices of the reduction cells: at one third and two thirds of the depth."""
        return frozenset((self.num_cells // 3, 2 * self.num_cells // 3))

    @property
    def stem_channels(self) -> int:
        """Channels after the stem (three times the initial ones, as in DARTS)."""
        return 3 * self.init_channels

    @cached_property
    def cells(self) -> tuple[CellGeometry, ...]:
        """The cells from the first to the last."""
        before_previous = previous = self.stem_channels
        channels, after_reduction, cells = self.init_channels, False, []
        for index in range(self.num_cells):
            reduces = index in self.reductions
            channels *= 2 if reduces else 1
            kind: CellKind = "reduce" if reduces else "normal"
            group = self.groups.index(kind if index < self.first_personal_cell else f"personal_{kind}")
            cells.append(CellGeometry(kind, group, channels, before_previous, previous, after_reduction))
            before_previous, previous, after_reduction = previous, self.num_nodes * channels, reduces
        return tuple(cells)

    @property
    def out_channels(self) -> int:
        """Channels that the classifier reads."""
        return self.num_nodes * self.cells[-1].channels

    @property
    def base_channels(self) -> int:
        """Channels that an auxiliary classifier reads: those of the last cell that is not personal."""
        return self.num_nodes * self.cells[self.first_personal_cell - 1].channels
