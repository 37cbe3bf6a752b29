"""What a network costs: multiply-adds per image, parameters, and bytes of the payload."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch
from torch import Tensor, nn

from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.edge_weights import EdgeWeights
from fedmetanas_core.space.fixed import FixedSpec, Space
from fedmetanas_core.space.models import build
from fedmetanas_core.space.network import Network
from fedmetanas_core.space.spec import PRIMITIVES, SpaceSpec
from fedmetanas_core.space.supernet import Cell, Stem, Supernet

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """``macs`` per image (convolutions and the classifier), ``parameters``, and floats of running statistics."""

    macs: int
    parameters: int
    statistics: int

    @property
    def payload_bytes(self) -> int:
        """Weights and statistics as float32, without the architecture's few logits."""
        return FLOAT_BYTES * (self.parameters + self.statistics)


def measure_cost(spec: Space, operation_mask: Tensor) -> Cost:
    """The cost of one pass through the network with these operations alive, from shapes alone.

    Every weight of a convolution is counted once for each pixel that the convolution puts out, borders included, as is
    usual, even where a kernel reaches beyond the map.
    """
    if isinstance(spec, FixedSpec):
        network = build(spec, operation_mask, device="meta")
        return Cost(_fixed_macs(network, spec), network.weights.numel(), network.statistics.numel())
    return Cost(*_supernet_cost(spec, operation_mask))


def network_cost(network: Network) -> Cost:
    """The cost of a network that was cut out."""
    return measure_cost(network.spec, network.genotype.masks(network.spec)[0])


def _supernet_cost(spec: SpaceSpec, operation_mask: Tensor) -> tuple[int, int, int]:
    supernet = Supernet(spec, operation_mask, device="meta")
    height, width, macs = spec.height, spec.width, 0
    for layer in supernet.stem:
        if isinstance(layer, nn.Conv2d):
            height, width = ceil(height / layer.stride[0]), ceil(width / layer.stride[1])
            macs += _weights(layer) * height * width
    for cell, geometry in zip(supernet.cells, spec.cells, strict=True):
        assert isinstance(cell, Cell)
        macs += (_weights(cell.preprocess0) + _weights(cell.preprocess1)) * height * width
        if geometry.kind == "reduce":
            height, width = ceil(height / 2), ceil(width / 2)
        macs += _weights(cell.edges) * height * width
    macs += supernet.classifier.weight.numel()
    return macs, supernet.weights.numel(), supernet.statistics.numel()


def _fixed_macs(network: TrainableNetwork, spec: FixedSpec) -> int:
    """Multiply-adds of all convolutions and linear layers, by the shapes of what they put out."""
    macs = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        macs.append(weight.numel() * (out.shape[-2:].numel() if out.dim() == 4 else 1))

    layers = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    network.eval()
    network(torch.empty(1, spec.in_channels, spec.height, spec.width, device="meta"))
    for handle in handles:
        handle.remove()
    return sum(macs)


# By kind of cost: what a network costs of it.
COSTS: dict[str, Callable[[Cost], float]] = {
    "macs": lambda cost: cost.macs,
    "parameters": lambda cost: cost.parameters,
    "payload_bytes": lambda cost: cost.payload_bytes,
}


@lru_cache(maxsize=8)
def edge_costs(spec: SpaceSpec, kind: str = "macs") -> Tensor:
    """What every operation on every edge of every cell costs, of one kind of COSTS: float64 (cells, edges, 8).

    Poolings, identities and ``none`` have no multiply-adds, as in ``measure_cost``. The norm of a pooling
    counts on every edge, though edges out of one source share them: a sum is never less than what it costs.
    """
    full = torch.ones(len(spec.groups), spec.num_edges, len(PRIMITIVES), dtype=torch.bool)
    supernet = Supernet(spec, full, device="meta")
    table = torch.zeros(len(spec.cells), spec.num_edges, len(PRIMITIVES), dtype=torch.float64)
    pixels = [height * width for height, width in sides_after_cells(spec)]
    for index, cell in enumerate(supernet.cells):
        assert isinstance(cell, Cell)
        for edge, operations in cell.edges.items():
            assert isinstance(operations, nn.ModuleDict)
            for name, module in operations.items():
                own = Cost(_weights(module) * pixels[index], *_sizes(module))
                table[index, int(edge), PRIMITIVES.index(name)] = COSTS[kind](own)
        for source, pools in cell.pools.items():
            assert isinstance(pools, nn.ModuleDict)
            for name, module in pools.items():
                edges = [spec.edge(node, int(source)) for node in range(max(0, int(source) - 1), spec.num_nodes)]
                table[index, edges, PRIMITIVES.index(name)] = COSTS[kind](Cost(0, *_sizes(module)))
    return table


def by_group(spec: SpaceSpec, table: Tensor) -> Tensor:
    """Costs (cells, edges, 8) summed over the cells that share their alphas: (groups, edges, 8)."""
    found = torch.zeros(len(spec.groups), spec.num_edges, len(PRIMITIVES), dtype=torch.float64)
    for cell, costs in zip(spec.cells, table, strict=True):
        found[cell.group] += costs
    return found


def expected_macs(spec: SpaceSpec, weights: EdgeWeights, table: Tensor) -> Tensor:
    """The cost of the edges under these mixture weights: sum of q_e p_eo cost_o, differentiable in the weights."""
    return (weights.of_cells(spec).double() * table).sum()


def sides_after_cells(spec: SpaceSpec) -> list[tuple[int, int]]:
    """Height and width of what each cell puts out."""
    height, width, sides = spec.height, spec.width, []
    for layer in Stem(spec):
        if isinstance(layer, nn.Conv2d):
            height, width = ceil(height / layer.stride[0]), ceil(width / layer.stride[1])
    for geometry in spec.cells:
        if geometry.kind == "reduce":
            height, width = ceil(height / 2), ceil(width / 2)
        sides.append((height, width))
    return sides


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Parameters, and floats of running statistics."""
    return sum(each.numel() for each in module.parameters()), sum(each.numel() for each in module.buffers())


def _weights(module: nn.Module) -> int:
    """Weights of convolutions; those of norms cost no multiply-adds worth counting."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)
