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

from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.edge_weights import EdgeWeights, Masks, as_tuples
from fedmetanas_core.space.native import build
from fedmetanas_core.space.native.execution import COMPILED_OPERATIONS, Program, execute
from fedmetanas_core.space.operations import (
    FactorizedReduce,
    Pooling,
    Preprocess,
    WeightedOperation,
    make_norm,
    make_weighted_operation,
)
from fedmetanas_core.space.spec import PRIMITIVES, STEM_STRIDE, CellGeometry, SpaceSpec

POOLS = ("max_pool_3x3", "avg_pool_3x3")
COMPILED_TYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Task:
    """One operation out of one source: the nodes it feeds, where its coefficients lie, and its modules, if weighted."""

    name: str
    nodes: list[int]
    positions: list[int]
    modules: list[WeightedOperation]

    def along(self, path: Sequence[bool]) -> "Task | None":
        """The part that lies on a path, given by position; None if none of it does."""
        chosen = [index for index, position in enumerate(self.positions) if path[position]]
        if len(chosen) == len(self.positions):
            return self
        if not chosen:
            return None
        modules = [self.modules[index] for index in chosen] if self.modules else []
        return Task(self.name, [self.nodes[i] for i in chosen], [self.positions[i] for i in chosen], modules)


Work = list[list[Task]]


def _along(work: Work, path: Sequence[Sequence[bool]]) -> Work:
    """What of a cell's work lies on the path (edges, operations)."""
    flat = [alive for edge in path for alive in edge]
    return [[part for task in tasks if (part := task.along(flat)) is not None] for tasks in work]


class Stem(nn.Sequential):
    """Image (batch, in_channels, height, width) to (batch, 3 * init_channels, ...), batch-normalised."""

    def __init__(self, spec: SpaceSpec) -> None:
        if spec.stem != "imagenet":
            convolution = self._convolution(spec.in_channels, spec.stem_channels, STEM_STRIDE[spec.stem])
            layers = [convolution, make_norm(spec.stem_channels, spec.norm, affine=True)]
        else:
            half = spec.stem_channels // 2
            layers, channels = [], spec.in_channels
            for wanted in (half, spec.stem_channels, spec.stem_channels):
                layers += [nn.ReLU()] if layers else []
                layers += [self._convolution(channels, wanted, 2), make_norm(wanted, spec.norm, affine=True)]
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
        self.num_nodes, self.stride = spec.num_nodes, 2 if geometry.kind == "reduce" else 1
        if geometry.after_reduction:
            self.preprocess0: nn.Module = FactorizedReduce(geometry.channels_before_previous, channels, spec.norm)
        else:
            self.preprocess0 = Preprocess(geometry.channels_before_previous, channels, spec.norm)
        self.preprocess1 = Preprocess(geometry.channels_previous, channels, spec.norm)
        self.edges = nn.ModuleDict()  # "edge" -> operation name -> module with weights
        self.pools = nn.ModuleDict()  # "source" -> pooling name -> module, shared by the edges out of that source
        self.work: Work = [
            self._add_source(source, self.stride if source < 2 else 1, channels, spec, mask)
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
                module = make_weighted_operation(name, channels, stride, spec.norm)
                if module is not None:
                    edge = str(spec.edge(node, source))
                    if edge not in self.edges:
                        self.edges[edge] = nn.ModuleDict()
                    cast(nn.ModuleDict, self.edges[edge])[name] = module
                    modules.append(module)
            if nodes and name in POOLS:
                pools[name] = Pooling(name, channels, stride, spec.norm)
            if nodes:
                positions = [spec.edge(node, source) * len(PRIMITIVES) + index for node in nodes]
                tasks.append(Task(name, nodes, positions, modules))
        if pools:
            self.pools[str(source)] = pools
        return tasks

    def forward(
        self,
        s0: Tensor,
        s1: Tensor,
        coefficients: Sequence[Tensor] | None,
        path: Sequence[Sequence[bool]] | None = None,
        drop_path: float = 0.0,
    ) -> Tensor:
        """Outputs of all nodes, concatenated: (batch, nodes * channels, height, width).

        ``coefficients`` has one scalar per (edge, operation); None stands for ones. Only operations on the ``path``
        (edges, operations) are computed, if one is given. See Supernet for ``drop_path``.
        """
        states = [self.preprocess0(F.relu(s0)), self.preprocess1(F.relu(s1))]
        sums: list[Tensor | None] = [None] * self.num_nodes
        for source, tasks in enumerate(self.work if path is None else _along(self.work, path)):
            if source >= 2:
                states.append(self._finished(sums[source - 2], states[1]))
            self._run_source(source, tasks, states[source], sums, coefficients, drop_path)
        states.append(self._finished(sums[-1], states[1]))
        return torch.cat(states[2:], dim=1)

    def _run_source(
        self,
        source: int,
        tasks: Sequence[Task],
        x: Tensor,
        sums: list[Tensor | None],
        coefficients: Sequence[Tensor] | None,
        drop_path: float,
    ) -> None:
        """Add to the nodes' sums what the operations on the edges out of this source give."""
        rectified = F.relu(x).permute(0, 2, 3, 1)
        copies: dict[int, Tensor] = {}
        side_by_side: dict[tuple[int, ...], Tensor] = {}
        pools = cast(nn.ModuleDict, self.pools[str(source)] if str(source) in self.pools else nn.ModuleDict())
        for task in tasks:
            scales = None if coefficients is None else [coefficients[position] for position in task.positions]
            if task.modules:
                count = len(task.modules)
                if count not in copies:
                    copies[count] = rectified.repeat(1, 1, 1, count).permute(0, 3, 1, 2)
                out = task.modules[0].together(task.modules, copies[count], scales)
                if drop_path > 0:
                    out = _dropped(out, count, drop_path)
                nodes = tuple(task.nodes)
                side_by_side[nodes] = side_by_side[nodes] + out if nodes in side_by_side else out
                continue
            value = pools[task.name](x) if task.name in pools else x
            for position, node in enumerate(task.nodes):
                term = value if scales is None else value * scales[position]
                self._add(sums, node, _dropped(term, 1, drop_path) if drop_path > 0 and task.name in pools else term)
        for nodes, out in side_by_side.items():
            for node, part in zip(nodes, torch.split(out, x.shape[1], dim=1), strict=True):
                self._add(sums, node, part)

    @staticmethod
    def _add(sums: list[Tensor | None], node: int, term: Tensor) -> None:
        so_far = sums[node]
        sums[node] = term if so_far is None else so_far + term

    def _finished(self, total: Tensor | None, like: Tensor) -> Tensor:
        """A node's sum; zeros where every edge into it is without an operation."""
        if total is not None:
            return total
        batch, channels, height, width = like.shape
        return like.new_zeros(batch, channels, -(-height // self.stride), -(-width // self.stride))


def _dropped(x: Tensor, parts: int, share: float) -> Tensor:
    """Each image loses each of the operations side by side in ``x`` with this probability; the others make up for it.

    Drawn from torch's global generator.
    """
    kept = torch.rand(len(x), parts, 1, 1, device=x.device, dtype=x.dtype) >= share
    return x * (kept / (1.0 - share)).repeat_interleave(x.shape[1] // parts, dim=1)


class Supernet(TrainableNetwork):
    """Stem, cells, global average pooling and a linear classifier (DARTS, section 2; no auxiliary head).

    ``operation_mask`` (groups, edges, 8) says which operations exist. The weights are zeros until ``initialise`` or
    ``load``. The norms inside the cells are those of ``spec.norm``; the stem's has scale and shift. ``drop_path`` is
    the probability with which, in training, an image loses an operation other than the identity (DARTS, for the final
    network).
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
        self.drop_path = 0.0
        masks = operation_mask.tolist()
        self.structure = (spec, as_tuples(operation_mask))
        alive = {
            name for name, row in zip(PRIMITIVES, operation_mask.flatten(0, 1).any(0).tolist(), strict=True) if row
        }
        self.compilable = alive <= COMPILED_OPERATIONS
        with torch.device("meta"):
            self.stem = Stem(spec)
            self.cells = nn.ModuleList(Cell(geometry, spec, masks[geometry.group]) for geometry in spec.cells)
            self.classifier = nn.Linear(spec.out_channels, spec.num_classes)
            if spec.auxiliary:
                self.auxiliary = nn.Linear(spec.base_channels, spec.num_classes)
        self.allocate(device, dtype)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw convolutions and classifier as torch does by default; batch norm starts as the identity."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                linear = self.get_submodule(name.rpartition(".")[0])
                if parameter.dim() == 1 and not isinstance(linear, nn.Linear):  # a norm's scale or shift
                    parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                    continue
                fan_in = linear.in_features if isinstance(linear, nn.Linear) else parameter[0].numel()
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
                path = None if edge_weights is None else edge_weights.path
                program = _program(library, *self.structure) if path is None else self._program_along(library, path)
                return execute(program, x, self.weights, self.statistics, mix, self.training, moments)
        return self.forward_by_modules(x, edge_weights)

    @property
    def _drops_paths(self) -> bool:
        """In training, but not while moments are collected: these belong to the network as it is evaluated."""
        return self.drop_path > 0 and self.training and self.moments is None

    def _fits_compiled_code(self, x: Tensor, mix: Tensor | None) -> bool:
        """Compiled code looks at no shape and no device, and gives no gradient of the images."""
        spec = self.spec
        return (
            x.shape[1:] == (spec.in_channels, spec.height, spec.width)
            and spec.norm != "group"
            and self.compilable
            and not self._drops_paths
            and len(x) > 0
            and not x.requires_grad
            and x.dtype == self.weights.dtype in COMPILED_TYPES
            and all(tensor is None or tensor.device.type == "cpu" for tensor in (x, self.weights, mix))
            and (mix is None or mix.shape == (len(spec.cells), spec.num_edges, len(PRIMITIVES)))
        )

    def both_heads(self, x: Tensor, edge_weights: EdgeWeights | None = None) -> tuple[Tensor, Tensor]:
        """The logits, and those of the auxiliary classifier, which sees the cells before the personal ones."""
        library = build.library()
        if library is not None and x.device.type == "cpu":
            mix = None if edge_weights is None else edge_weights.of_cells(self.spec)
            if self._fits_compiled_code(x, mix) and (edge_weights is None or edge_weights.path is None):
                # The shared cells are computed twice, which takes less time than to compute them once by modules.
                base = _program(library, *self.structure, self.spec.first_personal_cell)
                return self(x, edge_weights), execute(base, x, self.weights, self.statistics, mix, self.training)
        return self._by_modules(x, edge_weights)

    def forward_by_modules(self, x: Tensor, edge_weights: EdgeWeights | None = None) -> Tensor:
        """The same by torch's own operations, on any device; what the compiled code has to agree with."""
        return self._by_modules(x, edge_weights)[0]

    def _by_modules(self, x: Tensor, edge_weights: EdgeWeights | None) -> tuple[Tensor, Tensor]:
        groups = None if edge_weights is None else edge_weights.coefficients()
        per_cell = edge_weights is not None and edge_weights.per_cell
        path = None if edge_weights is None else edge_weights.path
        drop_path = self.drop_path if self._drops_paths else 0.0
        s0 = s1 = self.stem(x.contiguous(memory_format=torch.channels_last))
        auxiliary = s1.new_empty(0)
        for index, (cell, geometry) in enumerate(zip(self.cells, self.spec.cells, strict=True)):
            group = index if per_cell else geometry.group
            chosen = None if path is None else path[group]
            s0, s1 = s1, cell(s0, s1, None if groups is None else groups[group], chosen, drop_path)
            if self.spec.auxiliary and index == self.spec.first_personal_cell - 1:
                auxiliary = self.auxiliary(s1.mean(dim=(2, 3)))
        return self.classifier(s1.mean(dim=(2, 3))), auxiliary

    def _program_along(self, library: CDLL, path: Masks) -> Program:
        """The compiled form of one path, in the flat tensors of the whole supernet."""
        work = [
            _along(cast(Cell, cell).work, path[geometry.group])
            for cell, geometry in zip(self.cells, self.spec.cells, strict=True)
        ]
        return Program(library, self.spec, self.stem, work, self.weight_layout, self.statistic_layout)


@lru_cache(maxsize=16)
def _program(library: CDLL, spec: SpaceSpec, masks: Masks, auxiliary_after: int | None = None) -> Program:
    """The compiled form of every supernet of this structure; or of its first cells, with the auxiliary classifier."""
    network = Supernet(spec, torch.tensor(masks), "meta")
    work = [cast(Cell, cell).work for cell in network.cells][:auxiliary_after]
    head = "classifier" if auxiliary_after is None else "auxiliary"
    return Program(library, spec, network.stem, work, network.weight_layout, network.statistic_layout, head)
