"""A genotype: the discrete architecture that a search ends with, as an immutable value."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedmetanas_core.errors import FedMetaNASError
from fedmetanas_core.space.architecture import Architecture, masked_softmax
from fedmetanas_core.space.spec import NONE, PRIMITIVES, SpaceSpec

Choice = tuple[str, int]  # (operation, source); sources 0 and 1 are the cell's inputs, 2 + i is node i
Node = tuple[Choice, Choice]


@dataclass(frozen=True)
class Genotype:
    """Two (operation, source) choices for each node of the normal and of the reduction cell."""

    normal: tuple[Node, ...]
    reduce: tuple[Node, ...]

    def __post_init__(self) -> None:
        if len(self.normal) != len(self.reduce) or not self.normal:
            raise FedMetaNASError("genotype: both cells must have the same number of nodes, at least one")
        for nodes in (self.normal, self.reduce):
            for index, node in enumerate(nodes):
                if len(node) != 2 or node[0][1] == node[1][1]:
                    raise FedMetaNASError(f"genotype: node {index} must have two different sources")
                for operation, source in node:
                    if operation not in PRIMITIVES[1:] or not 0 <= source < 2 + index:
                        raise FedMetaNASError(f"genotype: node {index} has an unknown choice ({operation}, {source})")

    @property
    def num_nodes(self) -> int:
        """Intermediate nodes per cell."""
        return len(self.normal)

    def to_dict(self) -> dict[str, Any]:
        """Lists and strings only; ``concat`` names the nodes whose outputs a cell concatenates (all of them)."""
        return {
            "normal": [[list(choice) for choice in node] for node in self.normal],
            "reduce": [[list(choice) for choice in node] for node in self.reduce],
            "concat": list(range(2, 2 + self.num_nodes)),
        }

    def to_json(self) -> str:
        """The value as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Genotype":
        """The inverse of ``to_dict``; raises FedMetaNASError for anything that is not a genotype."""
        try:
            cells = [
                tuple(tuple((str(name), int(source)) for name, source in node) for node in value[kind])
                for kind in ("normal", "reduce")
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise FedMetaNASError(f"genotype: not a genotype: {error}") from error
        return cls(*cells)  # type: ignore[arg-type]

    @classmethod
    def from_json(cls, text: str) -> "Genotype":
        """The inverse of ``to_json``."""
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise FedMetaNASError(f"genotype: not JSON: {error}") from error
        return cls.from_dict(value)

    def masks(self, spec: SpaceSpec) -> tuple[Tensor, Tensor]:
        """The one-hot masks that describe this genotype: operations (2, edges, 8) and pairs (2, nodes, max pairs)."""
        operations = torch.zeros(2, spec.num_edges, len(PRIMITIVES), dtype=torch.bool)
        pairs = torch.zeros(2, spec.num_nodes, spec.max_pairs, dtype=torch.bool)
        for kind, nodes in enumerate((self.normal, self.reduce)):
            for node, choices in enumerate(nodes):
                first, second = sorted(source for _, source in choices)
                pairs[kind, node, spec.pairs(node).index((first, second))] = True
                for name, source in choices:
                    operations[kind, spec.edge(node, source), PRIMITIVES.index(name)] = True
        return operations, pairs


def _strongest(architecture: Architecture) -> Tensor:
    """(2, edges): per edge the index of the alive operation with the largest logit, ``none`` only if alone."""
    scores = architecture.operation_logits.detach().masked_fill(~architecture.operation_mask, -torch.inf)
    scores = scores.clone()
    scores[..., NONE] = torch.where(architecture.operation_mask[..., NONE + 1 :].any(-1), -torch.inf, scores[..., NONE])
    return scores.argmax(-1)


def pairwise_genotype(architecture: Architecture) -> Genotype:
    """The alive pair of largest logit at each node, and the strongest operation on its two edges.

    Loses nothing when the masks are one-hot (``Architecture.is_one_hot``).
    """
    spec = architecture.spec
    operations = _strongest(architecture)
    pairs = architecture.input_logits.detach().masked_fill(~architecture.input_mask, -torch.inf).argmax(-1)
    cells = []
    for kind in range(2):
        nodes = []
        for node in range(spec.num_nodes):
            sources = spec.pairs(node)[int(pairs[kind, node])]
            nodes.append(tuple(_choice(operations, kind, spec, node, source) for source in sources))
        cells.append(tuple(nodes))
    return Genotype(*cells)  # type: ignore[arg-type]


def darts_genotype(architecture: Architecture) -> Genotype:
    """The rule of DARTS and FedNAS: per node the two edges with the largest non-``none`` operation weight.

    It ignores the input pairs and everything but the winner of each edge, so a network cut out this way computes
    something else than the supernet did.
    """
    spec = architecture.spec
    weights = masked_softmax(architecture.operation_logits.detach(), architecture.operation_mask)
    strength = weights[..., NONE + 1 :].max(-1).values
    operations = _strongest(architecture)
    cells = []
    for kind in range(2):
        nodes = []
        for node in range(spec.num_nodes):
            first = spec.first_edge(node)
            ranked = torch.argsort(strength[kind, first : first + 2 + node], descending=True, stable=True)
            sources = sorted(int(source) for source in ranked[:2])
            nodes.append(tuple(_choice(operations, kind, spec, node, source) for source in sources))
        cells.append(tuple(nodes))
    return Genotype(*cells)  # type: ignore[arg-type]


def _choice(operations: Tensor, kind: int, spec: SpaceSpec, node: int, source: int) -> Choice:
    index = int(operations[kind, spec.edge(node, source)])
    if index == NONE:
        raise FedMetaNASError(f"no operation but none is left on the edge from {source} into node {node}")
    return PRIMITIVES[index], source
