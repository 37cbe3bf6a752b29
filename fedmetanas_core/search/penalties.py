"""Terms that are added to the loss while alphas learn."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, cast

import torch
from torch import Tensor

from fedmetanas_core.search.relaxation import concentration, relax
from fedmetanas_core.seeds import torch_stream
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.budget import Budget
from fedmetanas_core.space.cost import by_group, edge_costs, expected_macs
from fedmetanas_core.space.spec import SpaceSpec


class Penalty(Protocol):
    """A value with ``__call__``; equal values do the same."""

    def __call__(self, architecture: Architecture, temperature: float | Tensor) -> Tensor: ...


@dataclass(frozen=True)
class BetaDecay:
    """``weight`` times the mean logsumexp of an edge's logits: a lead grows later (beta-DARTS, Ye et al. 2022)."""

    weight: float

    def __call__(self, architecture: Architecture, temperature: float | Tensor) -> Tensor:
        logits, mask = architecture.operation_logits, architecture.operation_mask
        rows = mask.any(-1)
        values = torch.logsumexp(logits[rows].masked_fill(~mask[rows], -torch.inf), dim=-1)
        return self.weight * values.mean()


@dataclass(frozen=True)
class DirichletPrior:
    """``weight`` times KL(Dirichlet(elu(a) + 1) || Dirichlet(1)), the mean over rows (DrNAS, Chen et al. 2021)."""

    weight: float = 1e-3

    def __call__(self, architecture: Architecture, temperature: float | Tensor) -> Tensor:
        rows = []
        for logits, mask in architecture.rows():
            flat, alive = logits.reshape(-1, logits.shape[-1]), mask.reshape(-1, mask.shape[-1])
            for row, keep in zip(flat, alive, strict=True):
                if int(keep.sum()) > 1:
                    own = concentration(row[keep])
                    rows.append(_divergence_from_uniform(own))
        return self.weight * torch.stack(rows).mean() if rows else architecture.operation_logits.new_zeros(())


def _divergence_from_uniform(own: Tensor) -> Tensor:
    flat = torch.distributions.Dirichlet(torch.ones_like(own))
    return torch.distributions.kl_divergence(torch.distributions.Dirichlet(own), flat)


@dataclass(frozen=True)
class ComputeBudget:
    """Meta-DNAS' complexity regulariser: over * relu(cost / budget - 1) + always * cost / most.

    The cost is the expected multiply-adds of the edges under the noise-free mixture; ``budget`` a client's own, and
    the scale ``most``, the largest cost that a discrete architecture can have, follows from the space.
    """

    budget: float
    over: float = 1.0
    always: float = 0.01

    def __call__(self, architecture: Architecture, temperature: float | Tensor) -> Tensor:
        spec = cast(SpaceSpec, architecture.spec)
        table = edge_costs(spec).to(architecture.operation_logits.device)
        cost = expected_macs(spec, relax(architecture, temperature), table)
        term = self.over * torch.relu(cost / self.budget - 1.0) + self.always * cost / largest_cost(spec)
        return term.to(architecture.operation_logits.dtype)


@dataclass(frozen=True)
class BudgetPenalty:
    """The same for budgets that are given: over * relu(cost / room - 1), summed over what is limited.

    What the edges may cost is what is left of a limit once everything that all networks have is paid for.
    """

    budget: Budget
    over: float

    def __call__(self, architecture: Architecture, temperature: float | Tensor) -> Tensor:
        spec, device = cast(SpaceSpec, architecture.spec), architecture.operation_logits.device
        weights, terms = relax(architecture, temperature), []
        for table, room in _tables(self.budget):
            cost = expected_macs(spec, weights, table.to(device))
            terms.append(self.over * torch.relu(cost / room - 1.0))
        return torch.stack(terms).sum().to(architecture.operation_logits.dtype)


@lru_cache(maxsize=4)
def _tables(budget: Budget) -> list[tuple[Tensor, float]]:
    rooms = (max(demand.room, demand.least) for demand in budget.demands())
    return [(budget.table(kind), room) for (kind, _), room in zip(budget.limits, rooms, strict=True)]


@dataclass(frozen=True)
class ComputeBudgets:
    """Each client's budget: one of these shares of the largest cost, drawn once for the run."""

    seed: int
    shares: tuple[float, ...] = (0.3, 0.6, 1.0)

    def of(self, client: int, spec: SpaceSpec) -> ComputeBudget:
        """The client's regulariser, with its budget in multiply-adds of the edges."""
        drawn = int(torch.randint(len(self.shares), (), generator=torch_stream(self.seed, "compute budget", client)))
        return ComputeBudget(self.shares[drawn] * largest_cost(spec))


@lru_cache(maxsize=4)
def largest_cost(spec: SpaceSpec) -> float:
    """Multiply-adds of the edges of the most expensive discrete architecture: per node its two dearest edges."""
    dearest, total = by_group(spec, edge_costs(spec)).max(-1).values, 0.0
    for node in range(spec.num_nodes):
        first = spec.first_edge(node)
        edges = dearest[:, first : first + 2 + node]
        total += float(edges.topk(2, dim=-1).values.sum() if spec.inputs == "pair" else edges.sum())
    return total
