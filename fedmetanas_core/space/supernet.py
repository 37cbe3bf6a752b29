"""The supernet: every alive operation on every alive edge, mixed by weights given with each forward pass."""

from collections.abc import Sequence
from ctypes import CDLL
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmetanas_core.space.flat import FlatModule, Layout
from fedmetanas_core.space.native import build
from fedmetanas_core.space.native.execution import Program, execute
from fedmetanas_core.space.operations import (
    BatchNorm,
    FactorizedReduce,
    Pooling,
    Preprocess,
    WeightedOperation,
    make_weighted_operation,
)
from fedmetanas_core.space.spec import CELL_KINDS, PRIMITIVES, STEM_STRIDE, CellGeometry, SpaceSpec

POOLS = ("max_pool_3x3", "avg_pool_3x3")
COMPILED_TYPES = (torch.float32, torch.float64)

Masks = tuple[tuple[tuple[bool, ...], ...], ...]


@dataclass(frozen=True)
class EdgeWeights:
    """Mixture weights: ``operations`` (groups, edges, 8) and input marginals ``inputs`` (groups, edges).

    A group is a cell type (2 groups, index as in CELL_KINDS) or, with ``per_cell``, a cell. The marginal of an edge
    is the summed weight of the pairs that contain it; the marginals of a node sum to 2.
    """

    operations: Tensor
    inputs: Tensor
    per_cell: bool = False

    def coefficients(self) -> list[tuple[Tensor, ...]]:
        """Per group, the products of both weights as scalars in the order (edge, operation)."""
        return [group.flatten().unbind() for group in self._products().unbind()]

    def of_cells(self, spec: SpaceSpec) -> Tensor:
        """Those products for every cell: (cells, edges, 8)."""
        products = self._products()
        return products if self.per_cell else products[[CELL_KINDS.index(cell.kind) for cell in spec.cells]]

    def _products(self) -> Tensor:
        return self.operations * self.inputs.unsqueeze(-1)


@dataclass(frozen=True)
class Task:
    """One operation out of one source: the nodes it feeds, where its coefficients lie, and its modules, if weighted."""

    name: str
    nodes: list[int]
    positions: list[int]
    modules: list[WeightedOperation]


class Stem(nn.Sequential):
    """Image (batch, in_channels, height, width) to (batch, 3 * init_channels, ...), batch-normalised."""

    def __init__(self, spec: SpaceSpec) -> None:
        if spec.stem != "imagenet":
            convolution = self._convolution(spec.in_channels, spec.stem_channels, STEM_STRIDE[spec.stem])
            layers = [convolution, BatchNorm(spec.stem_channels, True)]
        else:
            half = spec.stem_channels // 2
            layers, channels = [], spec.in_channels
            for wanted in (half, spec.stem_channels, spec.stem_channels):
                layers += [nn.ReLU()] if layers else []
                layers += [self._convolution(channels, wanted, 2), BatchNorm(wanted, True)]
                channels = wanted
        super().__init__(*layers)

    @staticmethod
    def _convolution(in_channels: int, out_channels: int, stride: int) -> nn.Module:
        return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class Cell(nn.Module):
    """One cell, holding the alive operations only.

    Work is arranged by source: its ReLU and its two poolings are computed once, whatever number of edges read them, and
    operations of one kind on those edges run side by side.
    """

    def __init__(self, geometry: CellGeometry, spec: SpaceSpec, mask: Sequence[Sequence[bool]]) -> None:
        super().__init__()
        channels = geometry.channels
        self.num_nodes = spec.num_nodes
        if geometry.after_reduction:
            self.preprocess0: nn.Module = FactorizedReduce(geometry.channels_before_previous, channels)
        else:
            self.preprocess0 = Preprocess(geometry.channels_before_previous, channels)
        self.preprocess1 = Preprocess(geometry.channels_previous, channels)
        self.edges = nn.ModuleDict()  # "edge" -> operation name -> module with weights
        self.pools = nn.ModuleDict()  # "source" -> pooling name -> module, shared by the edges out of that source
        self.work = [
            self._add_source(source, 2 if geometry.kind == "reduce" and source < 2 else 1, channels, spec, mask)
            for source in range(spec.num_nodes + 1)
        ]

    def _add_source(
        self, source: int, stride: int, channels: int, spec: SpaceSpec, mask: Sequence[Sequence[bool]]
    ) -> list[Task]:
        tasks, pools = [], nn.ModuleDict()
        for index, name in enumerate(PRIMITIVES[1:], start=1):
            nodes = [n for n in range(max(0, source - 1), spec.num_nodes) if mask[spec.edge(n, source)][index]]
            modules = []
            for node in nodes:
                module = make_weighted_operation(name, channels, stride)
                if module is not None:
                    edge = str(spec.edge(node, source))
                    if edge not in self.edges:
                        self.edges[edge] = nn.ModuleDict()
                    cast(nn.ModuleDict, self.edges[edge])[name] = module
                    modules.append(module)
            if nodes and name in POOLS:
                pools[name] = Pooling(name, channels, stride)
            if nodes:
                positions = [spec.edge(node, source) * len(PRIMITIVES) + index for node in nodes]
                tasks.append(Task(name, nodes, positions, modules))
        if pools:
            self.pools[str(source)] = pools
        return tasks

    def forward(self, s0: Tensor, s1: Tensor, coefficients: Sequence[Tensor] | None) -> Tensor:
        """Outputs of all nodes, concatenated: (batch, nodes * channels, height, width).

        ``coefficients`` has one scalar per (edge, operation); None stands for ones.
        """
        states = [self.preprocess0(F.relu(s0)), self.preprocess1(F.relu(s1))]
        sums: list[Tensor | None] = [None] * self.num_nodes
        for source in range(len(self.work)):
            if source >= 2:
                states.append(self._finished(sums, source - 2))
            self._run_source(source, states[source], sums, coefficients)
        states.append(self._finished(sums, self.num_nodes - 1))
        return torch.cat(states[2:], dim=1)

    def _run_source(
        self, source: int, x: Tensor, sums: list[Tensor | None], coefficients: Sequence[Tensor] | None
    ) -> None:
        """Add to the nodes' sums what the operations on the edges out of this source give."""
        rectified = F.relu(x).permute(0, 2, 3, 1)
        copies: dict[int, Tensor] = {}
        side_by_side: dict[tuple[int, ...], Tensor] = {}
        pools = cast(nn.ModuleDict, self.pools[str(source)] if str(source) in self.pools else nn.ModuleDict())
        for task in self.work[source]:
            scales = None if coefficients is None else [coefficients[position] for position in task.positions]
            if task.modules:
                count = len(task.modules)
                if count not in copies:
                    copies[count] = rectified.repeat(1, 1, 1, count).permute(0, 3, 1, 2)
                out = task.modules[0].together(task.modules, copies[count], scales)
                nodes = tuple(task.nodes)
                side_by_side[nodes] = side_by_side[nodes] + out if nodes in side_by_side else out
                continue
            value = pools[task.name](x) if task.name in pools else x
            for position, node in enumerate(task.nodes):
                self._add(sums, node, value if scales is None else value * scales[position])
        for nodes, out in side_by_side.items():
            for node, part in zip(nodes, torch.split(out, x.shape[1], dim=1), strict=True):
                self._add(sums, node, part)

    @staticmethod
    def _add(sums: list[Tensor | None], node: int, term: Tensor) -> None:
        so_far = sums[node]
        sums[node] = term if so_far is None else so_far + term

    @staticmethod
    def _finished(sums: list[Tensor | None], node: int) -> Tensor:
        total = sums[node]
        if total is None:
            raise RuntimeError(f"node {node} has no operation left; masks must keep one on each edge of an alive pair")
        return total


class Supernet(FlatModule):
    """Stem, cells, global average pooling and a linear classifier (DARTS, section 2; no auxiliary head).

    ``operation_mask`` (2, edges, 8) says which operations exist. The weights are zeros until ``initialise`` or
    ``load``. Batch norm inside the cells has no scale and shift; the stem's has.
    """

    def __init__(
        self,
        spec: SpaceSpec,
        operation_mask: Tensor,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.moments: Moments | None = None
        masks = operation_mask.tolist()
        self.structure = (spec, as_tuples(operation_mask))
        with torch.device("meta"):
            self.stem = Stem(spec)
            self.cells = nn.ModuleList(
                Cell(geometry, spec, masks[CELL_KINDS.index(geometry.kind)]) for geometry in spec.cells
            )
            self.classifier = nn.Linear(spec.out_channels, spec.num_classes)
        self.allocate(device, dtype)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw convolutions and classifier as torch does by default; batch norm starts as the identity."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("stem") and parameter.dim() == 1:
                    parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                    continue
                fan_in = self.spec.out_channels if name.startswith("classifier") else parameter[0].numel()
                # kaiming_uniform with a = sqrt(5), torch's default for convolutions and linear layers
                bound = 1.0 / sqrt(fan_in)
                draw = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_((2.0 * draw - 1.0) * bound)
            for name, buffer in self.named_buffers():
                buffer.fill_(1.0 if name.endswith("running_var") else 0.0)

    def forward(self, x: Tensor, edge_weights: EdgeWeights | None = None) -> Tensor:
        """Logits (batch, classes) of normalised images (batch, channels, height, width).

        Without edge weights every alive operation counts once, which is what a one-hot architecture means. Runs as
        compiled code where that has been prepared (space.native.build), by the modules otherwise: the same function
        of the images, the flat tensors and the edge weights. Hooks, replaced modules and gradients of single
        parameters are for ``forward_by_modules``.
        """
        if self.moments is not None and self.training:
            logits = self._forward(x, edge_weights, self.moments.batch)
            self.moments.add(len(x))
            return logits
        return self._forward(x, edge_weights, None)

    def _forward(self, x: Tensor, edge_weights: EdgeWeights | None, moments: Tensor | None) -> Tensor:
        library = build.library()
        if library is not None and x.device.type == "cpu":
            mix = None if edge_weights is None else edge_weights.of_cells(self.spec)
            if self._fits_compiled_code(x, mix):
                program = _program(library, *self.structure)
                return execute(program, x, self.weights, self.statistics, mix, self.training, moments)
        return self.forward_by_modules(x, edge_weights)

    def _fits_compiled_code(self, x: Tensor, mix: Tensor | None) -> bool:
        """Compiled code looks at no shape and no device, and gives no gradient of the images."""
        spec = self.spec
        return (
            x.shape[1:] == (spec.in_channels, spec.height, spec.width)
            and len(x) > 0
            and not x.requires_grad
            and x.dtype == self.weights.dtype in COMPILED_TYPES
            and all(tensor is None or tensor.device.type == "cpu" for tensor in (x, self.weights, mix))
            and (mix is None or mix.shape == (len(spec.cells), spec.num_edges, len(PRIMITIVES)))
        )

    def forward_by_modules(self, x: Tensor, edge_weights: EdgeWeights | None = None) -> Tensor:
        """The same by torch's own operations, on any device; what the compiled code has to agree with."""
        groups = None if edge_weights is None else edge_weights.coefficients()
        per_cell = edge_weights is not None and edge_weights.per_cell
        s0 = s1 = self.stem(x.contiguous(memory_format=torch.channels_last))
        for index, (cell, geometry) in enumerate(zip(self.cells, self.spec.cells, strict=True)):
            group = index if per_cell else CELL_KINDS.index(geometry.kind)
            s0, s1 = s1, cell(s0, s1, None if groups is None else groups[group])
        return self.classifier(s1.mean(dim=(2, 3)))

    def collect_moments(self) -> None:
        """From now on each training pass adds the moments of its batch, until ``store_moments``."""
        self.moments = Moments(self.statistic_layout, self.statistics.device)
        views = self.statistic_layout.views(self.moments.batch)
        for name, module in self.named_modules():
            if isinstance(module, BatchNorm):
                module.collector = views[f"{name}.running_mean"], views[f"{name}.running_var"]

    def store_moments(self) -> None:
        """Make what was collected the running statistics. Raises ValueError if nothing was."""
        if self.moments is None:
            raise ValueError("no moments are being collected")
        self.statistics.copy_(self.moments.statistics())
        self.drop_moments()

    def drop_moments(self) -> None:
        """Collect no more, and forget what was collected."""
        self.moments = None
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.collector = None


class Moments:
    """Mean and second moment of every channel of every batch norm, over batches of any size, in float64.

    ``batch`` is where a pass writes the means and variances of its batch, laid out as the running statistics.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.batch = torch.zeros(layout.size, dtype=torch.float64, device=device)
        is_mean = torch.zeros(layout.size, dtype=torch.bool)
        for name, view in layout.views(is_mean).items():
            view.fill_(name.endswith("running_mean"))
        # Both follow the order of the norms, so that the means and the variances of one channel stand at one place.
        self.mean_places, self.variance_places = is_mean.nonzero().flatten(), (~is_mean).nonzero().flatten()
        self.count = 0
        self.mean = torch.zeros(len(self.mean_places), dtype=torch.float64, device=device)
        self.square = torch.zeros_like(self.mean)

    def add(self, images: int) -> None:
        """Take in what a pass over so many images has written into ``batch``."""
        mean, variance = self.batch[self.mean_places], self.batch[self.variance_places]
        self.count += images
        fraction = images / self.count
        self.mean += fraction * (mean - self.mean)
        self.square += fraction * (variance + mean.square() - self.square)

    def statistics(self) -> Tensor:
        """Means and biased variances of everything added, of the whole population; ValueError if nothing was."""
        if not self.count:
            raise ValueError("no batch was added")
        result = torch.empty_like(self.batch)
        result[self.mean_places] = self.mean
        result[self.variance_places] = (self.square - self.mean.square()).clamp_min(0.0)
        return result


def borrow_supernet(
    spec: SpaceSpec, operation_mask: Tensor, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Supernet:
    """A supernet of this structure with any weights, for use by one caller at a time: its modules are made only once.

    Making them takes as long as several passes. Whoever borrows loads weights and statistics first, and copies what it
    gives away: the next borrower gets the same tensors.
    """
    network = _supernet(spec, as_tuples(operation_mask), str(device), dtype)
    network.drop_moments()
    network.weights.grad.zero_()  # type: ignore[union-attr]
    return network


def layouts(spec: SpaceSpec, operation_mask: Tensor) -> tuple[Layout, Layout]:
    """How the weights and the statistics of a supernet of this structure lie in their flat tensors."""
    return _layouts(spec, as_tuples(operation_mask))


def as_tuples(operation_mask: Tensor) -> Masks:
    """The mask as a value by which things can be kept."""
    return tuple(tuple(map(tuple, kind)) for kind in operation_mask.tolist())


@lru_cache(maxsize=2)
def _supernet(spec: SpaceSpec, masks: Masks, device: str, dtype: torch.dtype) -> Supernet:
    return Supernet(spec, torch.tensor(masks), device, dtype)


@lru_cache(maxsize=8)
def _layouts(spec: SpaceSpec, masks: Masks) -> tuple[Layout, Layout]:
    supernet = Supernet(spec, torch.tensor(masks), "meta")
    return supernet.weight_layout, supernet.statistic_layout


@lru_cache(maxsize=16)
def _program(library: CDLL, spec: SpaceSpec, masks: Masks) -> Program:
    """The compiled form of every supernet of this structure."""
    network = Supernet(spec, torch.tensor(masks), "meta")
    work = [cast(Cell, cell).work for cell in network.cells]
    return Program(library, spec, network.stem, work, network.weight_layout, network.statistic_layout)
