"""The best genotype that a budget allows: what a network may cost, and which choices give way first (Meta-DNAS)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from typing import NamedTuple

import torch
from torch import Tensor

from fedmetanas_core.space.architecture import Architecture, masked_softmax
from fedmetanas_core.space.cost import COSTS, by_group, edge_costs, measure_cost
from fedmetanas_core.space.genotype import (
    Choice,
    Genotype,
    Node,
    argmax_genotype,
    darts_genotype,
    pairwise_genotype,
)
from fedmetanas_core.space.latency import Latencies
from fedmetanas_core.space.spec import NONE, PRIMITIVES, SpaceSpec

LATENCY = "latency_ms"
UNITS = {LATENCY: 1e-3}

Derive = Callable[[Architecture], Genotype]


class Demand(NamedTuple):
    """``costs`` (groups, edges, 8) of one kind, over all cells of a group, must stay within ``room`` in all.

    ``least``: what is too little to count, in which savings are told where there is no room.
    """

    costs: Tensor
    room: float
    least: float = 1.0


@dataclass(frozen=True)
class Budget:
    """What a network of ``spec`` may cost at most, by kind of cost: those of space.cost.COSTS, and LATENCY.

    ``latencies`` are those of the machine that will run it, where LATENCY is limited.
    """

    spec: SpaceSpec
    limits: tuple[tuple[str, float], ...]
    latencies: Latencies | None = None

    def table(self, kind: str) -> Tensor:
        """What the operations cost of one kind, (cells, edges, 8)."""
        if kind != LATENCY:
            return edge_costs(self.spec, kind)
        assert self.latencies is not None
        return self.latencies.table(self.spec)

    def room(self, kind: str, limit: float) -> float:
        """What is left of a limit for the edges, once everything that all networks have is paid for."""
        if kind == LATENCY:
            return limit - (self.latencies.base if self.latencies is not None else 0.0)
        nothing = torch.zeros(len(self.spec.groups), self.spec.num_edges, len(PRIMITIVES), dtype=torch.bool)
        return limit - COSTS[kind](measure_cost(self.spec, nothing))

    def demands(self) -> list[Demand]:
        """What the edges may cost, by kind."""
        return _demands(self)

    def spent(self, genotype: Genotype) -> dict[str, float]:
        """What the network of a genotype costs at most, of every kind that is limited, by the tables."""
        masks = genotype.masks(self.spec)[0]
        return {
            kind: limit - demand.room + float((demand.costs * masks).sum())
            for (kind, limit), demand in zip(self.limits, self.demands(), strict=True)
        }

    def measured(self, genotype: Genotype) -> dict[str, float]:
        """The same, exactly: poolings share their norms, which the tables count on every edge."""
        cost = measure_cost(self.spec, genotype.masks(self.spec)[0])
        return {kind: COSTS[kind](cost) if kind in COSTS else most for kind, most in self.spent(genotype).items()}

    def allows(self, genotype: Genotype) -> bool:
        """Whether the network of a genotype keeps within all limits."""
        spent = self.spent(genotype)
        return all(spent[kind] <= limit for kind, limit in self.limits)

    def affordable(self, architecture: Architecture, rule: Derive) -> bool:
        """Whether any network is left that keeps within all limits."""
        return self.allows(self.within(architecture, rule))

    def within(self, architecture: Architecture, rule: Derive) -> Genotype:
        """The genotype by this rule, made cheaper until it keeps within all limits; see budgeted_genotype."""
        genotype = rule(architecture)
        if self.allows(genotype):
            return genotype
        return budgeted_genotype(architecture, self.demands(), rule, spends=True)


@lru_cache(maxsize=32)
def _demands(budget: Budget) -> list[Demand]:
    return [
        Demand(by_group(budget.spec, budget.table(kind)), budget.room(kind, limit), UNITS.get(kind, 1.0))
        for kind, limit in budget.limits
    ]


class _Option(NamedTuple):
    """One way to fill a place: its choices, their log-probability, and their cost of each kind over all cells."""

    choices: Node
    score: float
    costs: tuple[float, ...]


Place = tuple[str, int, int]  # group, node, edge; the edge is -1 where a node's inputs are chosen together


def budgeted_genotype(
    architecture: Architecture, demands: Sequence[Demand], rule: Derive = pairwise_genotype, spends: bool = False
) -> Genotype:
    """The genotype by this rule, made cheaper until every demand is met.

    As long as one is not, that place is refilled which loses least log-probability for what it saves of the demands
    that are exceeded, each in units of its room. Where nothing can become cheaper, what is there comes back. What was
    saved beyond need then goes back to the likeliest choices that it pays for, if it ``spends``.
    """
    spec = architecture.spec
    assert isinstance(spec, SpaceSpec)
    groups = rule(architecture).groups()
    options = dict(_PLACES[rule](architecture, [demand.costs for demand in demands]))
    chosen = {place: _as_chosen(groups, place, spec, options[place]) for place in options}
    over: dict[int, float] = {}  # what was ever exceeded counts until the end, or two demands might take turns for ever
    while exceeded := _exceeded(chosen.values(), demands):
        over |= exceeded
        swaps = [
            ((chosen[place].score - other.score) / saved, place, other)
            for place, others in options.items()
            for other in others
            if (saved := _saved(chosen[place], other, over)) > 0
        ]
        if not swaps:
            break
        _, place, other = min(swaps, key=lambda swap: (swap[0], swap[1], swap[2].choices))
        chosen[place] = other
    if spends:
        _spend(chosen, options, demands)
    found: dict[str, list[Node]] = {name: [()] * spec.num_nodes for name in groups}
    for (name, node, _), option in sorted(chosen.items(), key=lambda item: item[0]):
        found[name][node] += option.choices
    return Genotype.of({name: tuple(nodes) for name, nodes in found.items()})


def _spend(chosen: dict[Place, _Option], options: Mapping[Place, Sequence[_Option]], demands: Sequence[Demand]) -> None:
    """Refill places with likelier choices for as long as every demand stays met, the largest gain first."""
    while True:
        totals = _totals(chosen.values())
        better = [
            (other.score - chosen[place].score, place, other)
            for place, others in options.items()
            for other in others
            if other.score > chosen[place].score
            and all(
                total - now + then <= demand.room
                for total, now, then, demand in zip(totals, chosen[place].costs, other.costs, demands, strict=True)
            )
        ]
        if not better:
            return
        _, place, other = max(better, key=lambda swap: (swap[0], swap[1], swap[2].choices))
        chosen[place] = other


def _totals(chosen: Iterable[_Option]) -> list[float]:
    return [sum(each) for each in zip(*(option.costs for option in chosen), strict=True)]


def _exceeded(chosen: Iterable[_Option], demands: Sequence[Demand]) -> dict[int, float]:
    """Which demands are not met, each with the unit in which savings count."""
    return {
        index: _unit(demand)
        for index, (total, demand) in enumerate(zip(_totals(chosen), demands, strict=True))
        if total > demand.room
    }


def _unit(demand: Demand) -> float:
    """In which savings count: the room, or, where there is none, the dearest operation."""
    return demand.room if demand.room >= demand.least else max(demand.least, float(demand.costs.max()))


def _saved(now: _Option, other: _Option, over: Mapping[int, float]) -> float:
    return sum((now.costs[index] - other.costs[index]) / unit for index, unit in over.items())


def _as_chosen(
    groups: dict[str, tuple[Node, ...]], place: Place, spec: SpaceSpec, options: Sequence[_Option]
) -> _Option:
    name, node, edge = place
    own: Node = groups[name][node]
    if edge >= 0:
        own = tuple(choice for choice in own if spec.edge(node, choice[1]) == edge)
    return next(option for option in options if option.choices == own)


def _pair_options(architecture: Architecture, costs: Sequence[Tensor]) -> Iterator[tuple[Place, list[_Option]]]:
    """For every node its alive pairs of inputs, with any real operation that is alive on their edges."""
    spec, alive, chances = _alive(architecture)
    for group, name in enumerate(spec.groups):
        pairs = _log_chances(architecture.input_logits[group], architecture.input_mask[group])
        for node in range(spec.num_nodes):
            here = [
                option
                for index, sources in enumerate(spec.pairs(node))
                if architecture.input_mask[group, node, index]
                for option in _fillings(spec, group, node, sources, alive, chances, costs, float(pairs[node, index]))
            ]
            yield (name, node, -1), here


def _darts_options(architecture: Architecture, costs: Sequence[Tensor]) -> Iterator[tuple[Place, list[_Option]]]:
    """For every node any two of its inputs that have a real operation, or the one, with any of these."""
    spec, alive, _ = _alive(architecture)
    weights = masked_softmax(architecture.operation_logits.detach().double(), architecture.operation_mask)
    for group, name in enumerate(spec.groups):
        for node in range(spec.num_nodes):
            possible = [source for source in range(2 + node) if alive[group, spec.edge(node, source)].any()]
            two: list[tuple[int, ...]] = [*combinations(possible, 2)] or [tuple(possible)]
            here = [
                option
                for sources in two
                for option in _fillings(spec, group, node, sources, alive, weights.log(), costs, 0.0)
            ]
            yield (name, node, -1), here


def _edge_options(architecture: Architecture, costs: Sequence[Tensor]) -> Iterator[tuple[Place, list[_Option]]]:
    """For every edge its alive operations, ``none`` leaving it out."""
    spec = architecture.spec
    assert isinstance(spec, SpaceSpec)
    chances = _log_chances(architecture.operation_logits, architecture.operation_mask)
    for group, name in enumerate(spec.groups):
        for node in range(spec.num_nodes):
            for source in range(2 + node):
                edge = spec.edge(node, source)
                here = []
                for operation in architecture.operation_mask[group, edge].nonzero().flatten().tolist():
                    choice: tuple[Choice, ...] = () if operation == NONE else ((PRIMITIVES[operation], source),)
                    spent = tuple(float(table[group, edge, operation]) for table in costs)
                    here.append(_Option(choice, float(chances[group, edge, operation]), spent))
                yield (name, node, edge), here


_PLACES: dict[Derive, Callable[[Architecture, Sequence[Tensor]], Iterator[tuple[Place, list[_Option]]]]] = {
    pairwise_genotype: _pair_options,
    darts_genotype: _darts_options,
    argmax_genotype: _edge_options,
}


def _alive(architecture: Architecture) -> tuple[SpaceSpec, Tensor, Tensor]:
    """The space, the real operations that are alive, and their log-probabilities among themselves."""
    spec = architecture.spec
    assert isinstance(spec, SpaceSpec)
    alive = architecture.operation_mask.clone()
    alive[..., NONE] = False
    return spec, alive, _log_chances(architecture.operation_logits, alive)


def _fillings(
    spec: SpaceSpec,
    group: int,
    node: int,
    sources: Sequence[int],
    alive: Tensor,
    chances: Tensor,
    costs: Sequence[Tensor],
    score: float,
) -> Iterator[_Option]:
    """These inputs of a node with every combination of operations that are alive on their edges."""
    edges = [spec.edge(node, source) for source in sources]
    for names in product(*(alive[group, edge].nonzero().flatten().tolist() for edge in edges)):
        own = score + float(sum(chances[group, e, o] for e, o in zip(edges, names, strict=True)))
        spent = tuple(float(sum(table[group, e, o] for e, o in zip(edges, names, strict=True))) for table in costs)
        choices = tuple((PRIMITIVES[o], source) for o, source in zip(names, sources, strict=True))
        yield _Option(choices, own, spent)


def _log_chances(logits: Tensor, mask: Tensor) -> Tensor:
    return torch.log_softmax(logits.detach().double().masked_fill(~mask, -torch.inf), dim=-1)


def cheapest(budget: Budget) -> Genotype:
    """A network that costs as little as can be, of the kinds that are limited, all of them counting alike."""
    rule = pairwise_genotype if budget.spec.inputs == "pair" else argmax_genotype
    demands = [Demand(demand.costs, -torch.inf) for demand in budget.demands()]
    return budgeted_genotype(Architecture(budget.spec), demands, rule)
