"""Networks by their space: made, lent, and described by their layouts."""

from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.edge_weights import Masks, as_tuples
from fedmetanas_core.space.fixed import FixedNetwork, FixedSpec, Space
from fedmetanas_core.space.flat import Layout
from fedmetanas_core.space.spec import PRIMITIVES, SpaceSpec
from fedmetanas_core.space.supernet import POOLS, Supernet

Entry = tuple[str, tuple[int, ...]]
Place = tuple[str, ...]
CellMask = tuple[tuple[bool, ...], ...]


def build(
    spec: Space, operation_mask: Tensor, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TrainableNetwork:
    """The network of the operations that the mask leaves alive, with weights of zero."""
    if isinstance(spec, FixedSpec):
        return FixedNetwork(spec, device, dtype)
    return Supernet(spec, operation_mask, device, dtype)


def borrow(
    spec: Space, operation_mask: Tensor, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TrainableNetwork:
    """A network of this structure with any weights, for use by one caller at a time: its modules are made only once.

    Making them takes as long as several passes. Whoever borrows loads weights and statistics first, and copies what it
    gives away: the next borrower gets the same tensors.
    """
    network = _network(spec, as_tuples(operation_mask), str(device), dtype)
    if network.moments is not None:
        network.drop_moments()
    network.weights.grad.zero_()  # type: ignore[union-attr]
    return network


def layouts(spec: Space, operation_mask: Tensor) -> tuple[Layout, Layout]:
    """How the weights and the statistics of a network of this structure lie in their flat tensors."""
    return _layouts(spec, as_tuples(operation_mask))


@lru_cache(maxsize=2)
def _network(spec: Space, masks: Masks, device: str, dtype: torch.dtype) -> TrainableNetwork:
    return build(spec, torch.tensor(masks), device, dtype)


@lru_cache(maxsize=32)  # where every client of a round has a network of its own
def _layouts(spec: Space, masks: Masks) -> tuple[Layout, Layout]:
    whole = _whole_layouts(spec)
    if isinstance(spec, FixedSpec):
        return whole
    weights, statistics = (Layout(tuple(_alive(spec, masks, layout))) for layout in whole)
    return weights, statistics


@lru_cache(maxsize=4)
def _whole_layouts(spec: Space) -> tuple[Layout, Layout]:
    everything = torch.ones(len(spec.groups), spec.num_edges, len(PRIMITIVES), dtype=torch.bool)
    network = build(spec, everything, "meta")
    return network.weight_layout, network.statistic_layout


def _alive(spec: SpaceSpec, masks: Masks, layout: Layout) -> Iterator[Entry]:
    """What of the whole supernet's layout a pruned one has, in the order in which it makes its modules.

    Making the modules to ask them takes a hundred times as long.
    """
    entries: dict[Place, list[Entry]] = {}
    for entry in layout.entries:
        parts = tuple(entry[0].split("."))
        # cells.<index>.<edges or pools>.<edge or source>.<operation>; what is shorter is there in any case
        in_cell = parts[0] == "cells" and parts[2] in ("edges", "pools")
        entries.setdefault(parts[:5] if in_cell else parts[:3], []).append(entry)
    done = set()
    for place in entries:
        if len(place) < 5:
            yield from entries[place]
        elif place[:3] not in done:
            done.add(place[:3])
            mask = masks[spec.cells[int(place[1])].group]
            order = _edges(spec, mask, place[:3], entries) if place[2] == "edges" else _pools(spec, mask, place[:3])
            for alive in order:
                yield from entries.get(alive, ())


def _edges(spec: SpaceSpec, mask: CellMask, cell: Place, entries: Mapping[Place, object]) -> Iterator[Place]:
    """The alive operations with weights: edges as the cell comes upon them, an edge's operations as they are listed."""
    found: dict[int, None] = {}
    for source in range(spec.num_nodes + 1):
        for index, name in enumerate(PRIMITIVES):
            for node in range(max(0, source - 1), spec.num_nodes):
                edge = spec.edge(node, source)
                if mask[edge][index] and (*cell, str(edge), name) in entries:
                    found.setdefault(edge)
    for edge in found:
        yield from ((*cell, str(edge), name) for index, name in enumerate(PRIMITIVES) if mask[edge][index])


def _pools(spec: SpaceSpec, mask: CellMask, cell: Place) -> Iterator[Place]:
    """The poolings that an alive edge reads, by source."""
    for source in range(spec.num_nodes + 1):
        edges = [spec.edge(node, source) for node in range(max(0, source - 1), spec.num_nodes)]
        for name in POOLS:
            if any(mask[edge][PRIMITIVES.index(name)] for edge in edges):
                yield (*cell, str(source), name)
