"""The best genotype that a compute budget allows (Meta-DNAS)."""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.genotype import Genotype, Node, pairwise_genotype
from fedmetanas_core.space.spec import NONE, PRIMITIVES, SpaceSpec


class _Option(NamedTuple):
    """One way to fill a node: its choices, their log-probability, and their multiply-adds over all cells."""

    choices: Node
    score: float
    cost: float


def budgeted_genotype(architecture: Architecture, costs: Tensor, budget: float) -> Genotype:
    """The pairwise genotype, made cheaper until its edges cost at most ``budget`` multiply-adds an image.

    ``costs`` (cells, edges, 8) as space.cost.edge_costs. As long as the budget is exceeded, that node is refilled
    which loses least log-probability for each multiply-add it saves. A budget below the cheapest network gives that.
    """
    spec = architecture.spec
    assert isinstance(spec, SpaceSpec)
    by_group = torch.zeros(len(spec.groups), spec.num_edges, len(PRIMITIVES), dtype=torch.float64)
    for cell, table in zip(spec.cells, costs, strict=True):
        by_group[cell.group] += table
    groups = pairwise_genotype(architecture).groups()
    options = {
        (name, node): _options(architecture, by_group, group, node)
        for group, name in enumerate(groups)
        for node in range(spec.num_nodes)
    }
    chosen = {
        (name, node): next(option for option in options[name, node] if option.choices == groups[name][node])
        for name, node in options
    }
    while sum(option.cost for option in chosen.values()) > budget:
        swaps = [
            ((chosen[place].score - other.score) / (chosen[place].cost - other.cost), place, other)
            for place, others in options.items()
            for other in others
            if other.cost < chosen[place].cost
        ]
        if not swaps:
            break
        _, place, other = min(swaps, key=lambda swap: (swap[0], swap[1], swap[2].choices))
        chosen[place] = other
    return Genotype.of({name: tuple(chosen[name, node].choices for node in range(spec.num_nodes)) for name in groups})


def _options(architecture: Architecture, costs: Tensor, group: int, node: int) -> list[_Option]:
    spec = architecture.spec
    assert isinstance(spec, SpaceSpec)
    operation_mask = architecture.operation_mask[group].clone()
    operation_mask[:, NONE] = False
    operations = _log_chances(architecture.operation_logits[group], operation_mask)
    pairs = _log_chances(architecture.input_logits[group], architecture.input_mask[group])
    options = []
    for index, sources in enumerate(spec.pairs(node)):
        if not architecture.input_mask[group, node, index]:
            continue
        edges = [spec.edge(node, source) for source in sources]
        alive = [operation_mask[edge].nonzero().flatten().tolist() for edge in edges]
        for names in product(*alive):
            score = float(pairs[node, index] + sum(operations[e, o] for e, o in zip(edges, names, strict=True)))
            cost = float(sum(costs[group, e, o] for e, o in zip(edges, names, strict=True)))
            choices = tuple((PRIMITIVES[o], source) for o, source in zip(names, sources, strict=True))
            options.append(_Option(choices, score, cost))
    return options


def _log_chances(logits: Tensor, mask: Tensor) -> Tensor:
    return torch.log_softmax(logits.detach().double().masked_fill(~mask, -torch.inf), dim=-1)
