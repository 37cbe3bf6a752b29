"""A genotype: the discrete architecture that a search ends with, as an immutable value."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedmetanas_core.errors import FedMetaNASError
from fedmetanas_core.space.architecture import Architecture, masked_softmax
from fedmetanas_core.space.spec import CELL_KINDS, NONE, PRIMITIVES, SpaceSpec

Choice = tuple[str, int]  # (operation, source); sources 0 and 1 are the cell's inputs, 2 + i is node i
Node = tuple[Choice, ...]
Nodes = tuple[Node, ...]

CONCAT = "concat"  # beside the groups: which nodes a cell's output concatenates


@dataclass(frozen=True)
class Genotype:
    """(operation, source) choices of each node of the normal and of the reduction cell.

    Two a node where nodes choose a pair of inputs; otherwise as many as it has edges with an operation. ``personal``
    are the further groups of a space that has them, by name.
    """

    normal: Nodes
    reduce: Nodes
    personal: tuple[tuple[str, Nodes], ...] = ()

    def __post_init__(self) -> None:
        if not self.normal or any(len(nodes) != len(self.normal) for nodes in self.groups().values()):
            raise FedMetaNASError("genotype: all cells must have the same number of nodes, at least one")
        for nodes in self.groups().values():
            for index, node in enumerate(nodes):
                if len({source for _, source in node}) != len(node):
                    raise FedMetaNASError(f"genotype: node {index} must have different sources")
                for operation, source in node:
                    if operation not in PRIMITIVES[1:] or not 0 <= source < 2 + index:
                        raise FedMetaNASError(f"genotype: node {index} has an unknown choice ({operation}, {source})")

    @property
    def num_nodes(self) -> int:
        """Intermediate nodes per cell."""
        return len(self.normal)

    def groups(self) -> dict[str, Nodes]:
        """The nodes of every group, in the order of SpaceSpec.groups."""
        return {"normal": self.normal, "reduce": self.reduce, **dict(self.personal)}

    @classmethod
    def of(cls, groups: Mapping[str, Nodes]) -> "Genotype":
        """The inverse of ``groups``."""
        personal = tuple((name, nodes) for name, nodes in groups.items() if name not in CELL_KINDS)
        return cls(groups["normal"], groups["reduce"], personal)

    def to_dict(self) -> dict[str, Any]:
        """Lists and strings only; ``concat`` names the nodes whose outputs a cell concatenates (all of them)."""
        cells = {name: [[list(choice) for choice in node] for node in nodes] for name, nodes in self.groups().items()}
        return {**cells, CONCAT: list(range(2, 2 + self.num_nodes))}

    def to_json(self) -> str:
        """The value as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Genotype":
        """The inverse of ``to_dict``; raises FedMetaNASError for anything that is not a genotype."""
        try:
            groups = {
                name: tuple(tuple((str(operation), int(source)) for operation, source in node) for node in nodes)
                for name, nodes in value.items()
                if name != CONCAT
            }
            return cls.of(groups)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FedMetaNASError(f"genotype: not a genotype: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> "Genotype":
        """The inverse of ``to_json``."""
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise FedMetaNASError(f"genotype: not JSON: {error}") from error
        return cls.from_dict(value)

    def masks(self, spec: SpaceSpec) -> tuple[Tensor, Tensor]:
        """The one-hot masks that describe this genotype: operations (groups, edges, 8), pairs (groups, nodes, pairs).

        Where nodes read all inputs, ``none`` marks the edges that the genotype leaves out. FedMetaNASError if it does
        not belong to this space.
        """
        if tuple(self.groups()) != spec.groups or self.num_nodes != spec.num_nodes:
            raise FedMetaNASError(
                f"genotype: cells {', '.join(self.groups())} of {self.num_nodes} nodes do not fit a space with "
                f"{', '.join(spec.groups)} of {spec.num_nodes}"
            )
        operations = torch.zeros(len(spec.groups), spec.num_edges, len(PRIMITIVES), dtype=torch.bool)
        pairs = torch.zeros(len(spec.groups), spec.num_nodes, spec.max_pairs, dtype=torch.bool)
        for group, nodes in enumerate(self.groups().values()):
            for node, choices in enumerate(nodes):
                sources = tuple(sorted(source for _, source in choices))
                if spec.inputs == "pair":
                    if len(sources) != 2:
                        raise FedMetaNASError(f"genotype: node {node} must have two different sources")
                    pairs[group, node, spec.pairs(node).index((sources[0], sources[1]))] = True
                for name, source in choices:
                    operations[group, spec.edge(node, source), PRIMITIVES.index(name)] = True
        if spec.inputs == "all":
            operations[..., NONE] = ~operations.any(-1)
        return operations, pairs


def _strongest(architecture: Architecture) -> Tensor:
    """(groups, edges): per edge the index of the alive operation with the largest logit, ``none`` only if alone."""
    scores = architecture.operation_logits.detach().masked_fill(~architecture.operation_mask, -torch.inf)
    scores = scores.clone()
    scores[..., NONE] = torch.where(architecture.operation_mask[..., NONE + 1 :].any(-1), -torch.inf, scores[..., NONE])
    return scores.argmax(-1)


def pairwise_genotype(architecture: Architecture) -> Genotype:
    """The alive pair of largest logit at each node, and the strongest operation on its two edges.

    Loses nothing when the masks are one-hot (``Architecture.is_one_hot``).
    """
    spec = _searched(architecture)
    operations = _strongest(architecture)
    pairs = architecture.input_logits.detach().masked_fill(~architecture.input_mask, -torch.inf).argmax(-1)

    def node_of(group: int, node: int) -> Node:
        sources = spec.pairs(node)[int(pairs[group, node])]
        return tuple(_choice(operations, group, spec, node, source) for source in sources)

    return _by_node(spec, node_of)


def darts_genotype(architecture: Architecture) -> Genotype:
    """The rule of DARTS and FedNAS: per node the two edges with the largest non-``none`` operation weight.

    It ignores the input pairs and everything but the winner of each edge, so a network cut out this way computes
    something else than the supernet did. An edge with nothing but ``none`` left is no candidate.
    """
    spec = _searched(architecture)
    weights = masked_softmax(architecture.operation_logits.detach(), architecture.operation_mask)
    possible = architecture.operation_mask[..., NONE + 1 :].any(-1)
    strength = weights[..., NONE + 1 :].max(-1).values.masked_fill(~possible, -1.0)
    operations = _strongest(architecture)

    def node_of(group: int, node: int) -> Node:
        first = spec.first_edge(node)
        ranked = torch.argsort(strength[group, first : first + 2 + node], descending=True, stable=True)
        sources = sorted(source for source in ranked[:2].tolist() if possible[group, first + source])
        return tuple(_choice(operations, group, spec, node, source) for source in sources)

    return _by_node(spec, node_of)


def argmax_genotype(architecture: Architecture) -> Genotype:
    """The alive operation of largest logit on every edge; where that is ``none``, the edge is left out (DSNAS)."""
    spec = _searched(architecture)
    best = architecture.operation_logits.detach().masked_fill(~architecture.operation_mask, -torch.inf).argmax(-1)

    def node_of(group: int, node: int) -> Node:
        chosen = [(int(best[group, spec.edge(node, source)]), source) for source in range(2 + node)]
        return tuple((PRIMITIVES[operation], source) for operation, source in chosen if operation != NONE)

    return _by_node(spec, node_of)


def random_genotype(spec: SpaceSpec, generator: torch.Generator) -> Genotype:
    """A pair of inputs for every node and a real operation on each of its edges, all equally likely.

    Where nodes read all their inputs, every edge has an operation.
    """

    def node_of(group: int, node: int) -> Node:
        sources: Sequence[int] = range(2 + node)
        if spec.inputs == "pair":
            pairs = spec.pairs(node)
            sources = pairs[int(torch.randint(len(pairs), (), generator=generator))]
        return tuple(
            (PRIMITIVES[int(torch.randint(NONE + 1, len(PRIMITIVES), (), generator=generator))], source)
            for source in sources
        )

    return _by_node(spec, node_of)


def _searched(architecture: Architecture) -> SpaceSpec:
    if not isinstance(architecture.spec, SpaceSpec):
        raise FedMetaNASError(f"{architecture.spec.name} is a fixed model and has no genotype")
    return architecture.spec


def _by_node(spec: SpaceSpec, node_of: Callable[[int, int], Node]) -> Genotype:
    return Genotype.of(
        {name: tuple(node_of(group, node) for node in range(spec.num_nodes)) for group, name in enumerate(spec.groups)}
    )


def _choice(operations: Tensor, group: int, spec: SpaceSpec, node: int, source: int) -> Choice:
    index = int(operations[group, spec.edge(node, source)])
    if index == NONE:
        raise FedMetaNASError(f"no operation but none is left on the edge from {source} into node {node}")
    return PRIMITIVES[index], source
