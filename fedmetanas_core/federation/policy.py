"""Who updates the alphas: the clients by averaging, the server by a gradient or by rewards, or nobody."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedmetanas_core.federation.averaging import Combine, weighted_mean
from fedmetanas_core.federation.update import ClientUpdate, Payload, RoundPlan, ServerState
from fedmetanas_core.seeds import torch_stream
from fedmetanas_core.space.architecture import Architecture, masked_softmax
from fedmetanas_core.space.budget import Budget
from fedmetanas_core.space.cost import edge_costs
from fedmetanas_core.space.fixed import Space
from fedmetanas_core.space.genotype import argmax_genotype
from fedmetanas_core.space.spec import SpaceSpec

Sent = Mapping[int, Payload]


class Architect(Protocol):
    """How alphas become what a client gets, and how its answer changes them."""

    @property
    def travels(self) -> bool:
        """Whether alphas go down to the clients and come back."""
        ...

    @property
    def takes_gradients(self) -> bool:
        """Whether gradients of the alphas come back in their place."""
        ...

    def begin(self, state: ServerState) -> None:
        """Put what it has to remember into a fresh state."""
        ...

    def assign(self, state: ServerState, client: int, plan: RoundPlan) -> Architecture:
        """The architecture that a client gets in this round: logits and masks; the state's own, if it is for all."""
        ...

    def final(self, state: ServerState, client: int) -> Architecture:
        """The architecture with which a client's own network begins, after the last round."""
        ...

    def learn(
        self,
        state: ServerState,
        sent: Sent,
        updates: Sequence[ClientUpdate],
        plan: RoundPlan,
        combine: Combine = weighted_mean,
    ) -> None:
        """Change the state's alphas, in place, by what came back from the accepted clients.

        ``combine`` makes one value of the clients' values.
        """
        ...


class Shared:
    """Everybody gets the same architecture."""

    takes_gradients = False

    def begin(self, state: ServerState) -> None:
        """Nothing."""

    def assign(self, state: ServerState, client: int, plan: RoundPlan) -> Architecture:
        """The state's."""
        return state.architecture

    def final(self, state: ServerState, client: int) -> Architecture:
        """The state's."""
        return state.architecture


@dataclass(frozen=True)
class NoAlphas(Shared):
    """Nothing is searched."""

    travels: bool = False

    def learn(
        self,
        state: ServerState,
        sent: Sent,
        updates: Sequence[ClientUpdate],
        plan: RoundPlan,
        combine: Combine = weighted_mean,
    ) -> None:
        """Nothing."""


@dataclass(frozen=True)
class AveragedAlphas(Shared):
    """Clients learn the logits; the server averages them by N_k, the geometric mean of their distributions.

    ``by_holder``: each entry over those clients alone that have its operation.
    """

    by_holder: bool = False
    travels: bool = True

    def learn(
        self,
        state: ServerState,
        sent: Sent,
        updates: Sequence[ClientUpdate],
        plan: RoundPlan,
        combine: Combine = weighted_mean,
    ) -> None:
        """See the class."""
        _copy_in(state.architecture, mean_alphas(state.architecture, updates, self.by_holder, combine))
        if self.by_holder:
            state.architecture.centre()  # clients that hold different entries cannot


def mean_alphas(
    architecture: Architecture,
    updates: Sequence[ClientUpdate],
    by_holder: bool = False,
    combine: Combine = weighted_mean,
) -> tuple[Tensor, Tensor]:
    """What the updates hold of operation and input logits, combined."""
    sizes = [float(update.num_examples) for update in updates]
    operations = [update.operation_logits for update in updates if update.operation_logits is not None]
    pairs = [update.input_logits for update in updates if update.input_logits is not None]
    masks = [update.touched if by_holder else None for update in updates]
    means = []
    for values, (logits, _), held in (
        (operations, architecture.rows()[0], masks),
        (pairs, architecture.rows()[1], [_held_pairs(architecture, mask) for mask in masks]),
    ):
        # Where nodes read all their inputs there are no pairs, and nothing of them travels.
        before = logits.detach()
        means.append(_combined_where_held(values, sizes, held, before, combine) if values else before)
    return means[0], means[1]


def _held_pairs(architecture: Architecture, mask: Tensor | None) -> Tensor | None:
    """The input pairs both of whose edges have an operation in the mask."""
    if mask is None:
        return None
    edges = mask.any(-1).to(architecture.incidence.dtype)
    return torch.einsum("ge,npe->gnp", edges, architecture.incidence) == 2.0


def _combined_where_held(
    values: Sequence[Tensor],
    sizes: Sequence[float],
    masks: Sequence[Tensor | None],
    before: Tensor,
    combine: Combine,
) -> Tensor:
    held = [None if mask is None else mask.flatten().nonzero().flatten() for mask in masks]
    parts = [value if mask is None else value[mask] for value, mask in zip(values, masks, strict=True)]
    return combine(parts, sizes, held, before)


def _copy_in(architecture: Architecture, logits: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        for (own, _), value in zip(architecture.rows(), logits, strict=True):
            own.copy_(value)


@dataclass(frozen=True)
class Adam:
    """Kingma and Ba's rule on tensors that lie in a state's memory between rounds; rows may have steps of their own."""

    rate: float
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = 0.0
    epsilon: float = 1e-8

    def begin(self, memory: dict[str, Tensor], name: str, like: Tensor) -> None:
        """Zero moments for a tensor of this shape."""
        memory[f"{name}/first"], memory[f"{name}/second"] = torch.zeros_like(like), torch.zeros_like(like)
        memory[f"{name}/steps"] = torch.zeros(len(like), dtype=torch.int64)

    def step(self, memory: dict[str, Tensor], name: str, value: Tensor, gradient: Tensor, row: int | None) -> Tensor:
        """The value after one step; ``row`` is the only row that steps, None for all."""
        rows = slice(None) if row is None else slice(row, row + 1)
        first, second, steps = (memory[f"{name}/{kind}"].clone() for kind in ("first", "second", "steps"))
        gradient = gradient + self.weight_decay * value
        steps[rows] += 1
        first[rows] = self.betas[0] * first[rows] + (1 - self.betas[0]) * gradient[rows]
        second[rows] = self.betas[1] * second[rows] + (1 - self.betas[1]) * gradient[rows].square()
        count = steps[rows].view(-1, *[1] * (value.dim() - 1)).to(value.dtype)
        step = first[rows] / (1 - self.betas[0] ** count)
        scale = (second[rows] / (1 - self.betas[1] ** count)).sqrt() + self.epsilon
        result = value.clone()
        result[rows] -= self.rate * step / scale
        memory.update({f"{name}/first": first, f"{name}/second": second, f"{name}/steps": steps})
        return result


@dataclass(frozen=True)
class MetaGradient(Shared):
    """Clients send the gradient of the alphas at their adapted values; the server takes Adam's step (Meta-DNAS)."""

    adam: Adam = Adam(1e-3)
    travels: bool = True
    takes_gradients: bool = True

    def begin(self, state: ServerState) -> None:
        """Zero moments."""
        for name, (logits, _) in zip(("operations", "inputs"), state.architecture.rows(), strict=True):
            self.adam.begin(state.memory, name, logits.detach())

    def learn(
        self,
        state: ServerState,
        sent: Sent,
        updates: Sequence[ClientUpdate],
        plan: RoundPlan,
        combine: Combine = weighted_mean,
    ) -> None:
        """One step along the mean gradient, weighted by N_k."""
        if not plan.adapts_architecture:
            return
        gradients = mean_alphas(state.architecture, updates, combine=combine)
        stepped = [
            self.adam.step(state.memory, name, logits.detach(), gradient, None)
            for name, (logits, _), gradient in zip(
                ("operations", "inputs"), state.architecture.rows(), gradients, strict=True
            )
        ]
        _copy_in(state.architecture, (stepped[0], stepped[1]))
        state.architecture.centre()


@dataclass(frozen=True)
class Reinforce:
    """The server samples a subnet for each client and learns from the accuracy that it reports (FedRLNAS).

    One operation for every edge, drawn from softmax(a / temperature). With ``per_client`` (PerFedRLNAS) every client
    has a policy of its own, and the reward is its accuracy less the mean best accuracy so far, less ``time_weight``
    times the extra compute of its subnet. ``explore`` is the probability of a uniform draw instead.
    """

    adam: Adam
    seed: int
    num_clients: int
    per_client: bool = False
    baseline_decay: float = 0.99
    time_weight: float = 0.001
    explore: float = 0.0
    anneals: bool = False
    travels: bool = False
    takes_gradients: bool = False
    budget: Budget | None = None

    def begin(self, state: ServerState) -> None:
        """Equal chances for all operations, and no reward yet."""
        logits = state.architecture.operation_logits.detach()
        policies = self.num_clients if self.per_client else 1
        state.memory["policy"] = logits.unsqueeze(0).repeat(policies, 1, 1, 1)
        state.memory["policy_mask"] = state.architecture.operation_mask.unsqueeze(0).repeat(policies, 1, 1, 1)
        self.adam.begin(state.memory, "policy", state.memory["policy"])
        state.memory["baseline"] = torch.full((1,), 1.0 / state.spec.num_classes, dtype=torch.float64)
        state.memory["best"] = torch.full((self.num_clients,), torch.nan, dtype=torch.float64)

    def policy(self, state: ServerState, client: int) -> tuple[Tensor, Tensor]:
        """(logits, mask) of a client's policy, (groups, edges, 8)."""
        row = client if self.per_client else 0
        return state.memory["policy"][row], state.memory["policy_mask"][row]

    def assign(self, state: ServerState, client: int, plan: RoundPlan) -> Architecture:
        """A one-hot architecture, drawn from the client's policy."""
        logits, mask = self.policy(state, client)
        chances = masked_softmax(logits.double(), mask, self._temperature(plan))
        generator = torch_stream(self.seed, "subnet", plan.round, client)
        if self.explore > 0 and float(torch.rand((), generator=generator)) < self.explore:
            chances = mask.double() / mask.sum(-1, keepdim=True)
        rows = chances.reshape(-1, chances.shape[-1])
        drawn = torch.multinomial(rows, 1, generator=generator).view(chances.shape[:-1])
        return _only(state.architecture, drawn)

    def final(self, state: ServerState, client: int) -> Architecture:
        """The likeliest operation of every edge of the client's policy, within the budget if there is one."""
        logits, mask = self.policy(state, client)
        own = state.architecture.clone()
        with torch.no_grad():
            own.operation_logits.copy_(logits)
            own.operation_mask.copy_(mask)
        if self.budget is not None and isinstance(own.spec, SpaceSpec):
            own.operation_mask.copy_(self.budget.within(own, argmax_genotype).masks(own.spec)[0])
        return _only(state.architecture, logits.masked_fill(~own.operation_mask, -torch.inf).argmax(-1))

    def learn(
        self,
        state: ServerState,
        sent: Sent,
        updates: Sequence[ClientUpdate],
        plan: RoundPlan,
        combine: Combine = weighted_mean,
    ) -> None:
        """Score-function gradient: the mean over clients of reward times (softmax(a) - what was drawn)."""
        rewards, temperature = self._rewards(state, sent, updates), self._temperature(plan)
        gradients = []
        for update, reward in zip(updates, rewards, strict=True):
            logits, mask = self.policy(state, update.client)
            drawn = sent[update.client].architecture.operation_mask
            chances = masked_softmax(logits.double(), mask, temperature)
            gradients.append(reward / temperature * (chances - drawn.double()))
        if not self.per_client:
            self._step(state, torch.stack(gradients).mean(0).unsqueeze(0), None)
        else:
            for update, gradient in zip(updates, gradients, strict=True):
                full = torch.zeros_like(state.memory["policy"])
                full[update.client] = gradient
                self._step(state, full, update.client)
        _copy_in(state.architecture, (state.memory["policy"].mean(0), state.architecture.input_logits.detach()))

    def _temperature(self, plan: RoundPlan) -> float:
        return plan.temperature if self.anneals else 1.0

    def _step(self, state: ServerState, gradient: Tensor, row: int | None) -> None:
        policy = state.memory["policy"]
        state.memory["policy"] = self.adam.step(state.memory, "policy", policy, gradient.to(policy.dtype), row)

    def _rewards(self, state: ServerState, sent: Sent, updates: Sequence[ClientUpdate]) -> list[float]:
        accuracies = [update.metrics["reward"] for update in updates]
        if not self.per_client:
            baseline = float(state.memory["baseline"])
            baseline += self.baseline_decay * (sum(accuracies) / len(accuracies) - baseline)
            state.memory["baseline"] = torch.tensor([baseline], dtype=torch.float64)
            return [accuracy - baseline for accuracy in accuracies]
        best = state.memory["best"].clone()
        for update, accuracy in zip(updates, accuracies, strict=True):
            best[update.client] = max(accuracy, float(best[update.client].nan_to_num(0.0)))
        state.memory["best"] = best
        level = float(best.nanmean())
        # Compute instead of seconds: these differ from one run to the next, and no run could then be repeated.
        work = [_edge_macs(state.spec, sent[update.client].architecture.operation_mask) for update in updates]
        mean = max(1.0, sum(work) / len(work))  # the least may be 0: a subnet of skips and poolings alone
        extra = [(macs - min(work)) / mean for macs in work]
        return [accuracy - level - self.time_weight * more for accuracy, more in zip(accuracies, extra, strict=True)]


def _edge_macs(spec: Space, operation_mask: Tensor) -> float:
    """Multiply-adds of the operations on the edges of a one-hot architecture."""
    assert isinstance(spec, SpaceSpec)
    table = edge_costs(spec)
    alive = torch.stack([operation_mask[cell.group] for cell in spec.cells])
    return float((table * alive).sum())


def _only(architecture: Architecture, chosen: Tensor) -> Architecture:
    """This architecture with one operation on every edge."""
    copy = architecture.clone()
    mask = torch.nn.functional.one_hot(chosen, copy.operation_mask.shape[-1]).bool()
    copy.operation_mask.copy_(mask)
    return copy
