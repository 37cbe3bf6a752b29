"""What the server prunes after a round, by rule."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fedmetanas_core.federation.averaging import weighted_mean
from fedmetanas_core.federation.update import ClientUpdate, RoundPlan, ServerState
from fedmetanas_core.search.pruning import PruneReport, PruneRule, propose, tally
from fedmetanas_core.space.architecture import Architecture, masked_softmax
from fedmetanas_core.space.budget import Budget
from fedmetanas_core.space.genotype import argmax_genotype, pairwise_genotype
from fedmetanas_core.space.spec import NONE


class Pruning(Protocol):
    """Prunes a state in place if it is time; what was removed, or None if nothing was."""

    def __call__(self, state: ServerState, updates: Sequence[ClientUpdate], plan: RoundPlan) -> PruneReport | None: ...


@dataclass(frozen=True)
class SoftPruning:
    """FedMetaNAS (paper, section 4.4): by threshold and cap on the averaged logits, or by the clients' votes.

    ``temperature``: of the threshold, None for the current one. ``caps``: whether the plan's caps hold. ``groups``: how
    many of the first groups of alphas are pruned, None for all; the others are their clients' affair. ``budget``: the
    likeliest network that it allows always stays, and is what stays at the end.
    """

    rule: PruneRule
    votes: bool = False
    caps: bool = True
    temperature: float | None = None
    groups: int | None = None
    budget: Budget | None = None

    def __call__(self, state: ServerState, updates: Sequence[ClientUpdate], plan: RoundPlan) -> PruneReport | None:
        """See Pruning."""
        trial = state.architecture.clone()
        if self.groups is not None:
            _settle(trial, self.groups)
        caps = plan.operation_cap, plan.pair_caps
        report, due = PruneReport(), plan.prunes or (self.votes and plan.phase != "warm-up")
        favoured = self._favoured(trial) if due else None
        if self.votes:
            voting = [update for update in updates if update.votes is not None]
            if voting and plan.phase != "warm-up":
                sizes = [float(update.num_examples) for update in voting]
                report = tally([update.votes for update in voting if update.votes], sizes, trial, favoured)
            if plan.prunes and self.caps:
                capped = replace(self.rule, threshold=0.0)
                kept, forced = propose(trial, plan.temperature, capped, *caps, favoured=favoured)
                trial.restrict(*kept)
                report += forced
        elif plan.prunes:
            temperature = self.temperature or plan.temperature
            kept, report = propose(trial, temperature, self.rule, *caps, mean_scores(updates), favoured)
            trial.restrict(*kept)
        if not report.total:
            return None
        if self.groups is not None:
            trial.operation_mask[self.groups :] = state.architecture.operation_mask[self.groups :]
            trial.input_mask[self.groups :] = state.architecture.input_mask[self.groups :]
        state.restrict(trial.operation_mask, trial.input_mask)
        state.architecture.centre()
        return report

    def _favoured(self, architecture: Architecture) -> tuple[Tensor, Tensor] | None:
        """The masks of the network that must not become impossible, if there is a budget."""
        if self.budget is None:
            return None
        return self.budget.within(architecture, pairwise_genotype).masks(self.budget.spec)


def _settle(architecture: Architecture, first: int) -> None:
    """Leave nothing to choose in the groups from ``first`` on, so that a rule finds nothing to remove there."""
    real = architecture.operation_mask.clone()
    real[..., NONE] &= ~real[..., NONE + 1 :].any(-1)
    for mask, alive in ((architecture.input_mask, architecture.input_mask), (architecture.operation_mask, real)):
        best = torch.nn.functional.one_hot(alive[first:].int().argmax(-1), mask.shape[-1]).bool()
        mask[first:] = best & alive[first:]
    edges = architecture.edge_alive()[first:].unsqueeze(-1)
    architecture.operation_mask[first:] &= edges


def mean_scores(updates: Sequence[ClientUpdate]) -> Tensor | None:
    """The weighted mean of what the clients lose without each operation; None if they did not try."""
    scored = [update for update in updates if update.scores is not None]
    if not scored:
        return None
    sizes = [float(update.num_examples) for update in scored]
    return weighted_mean([update.scores for update in scored if update.scores is not None], sizes)


@dataclass(frozen=True)
class EarlyFix:
    """DSNAS' ``early_fix_arch``: an edge whose best operation leads by this much in probability keeps it alone.

    Under a ``budget`` they are fixed one by one, the largest lead first; an edge stays open if no network within the
    budget would be left once it is fixed.
    """

    gap: float = 0.3
    budget: Budget | None = None

    def __call__(self, state: ServerState, updates: Sequence[ClientUpdate], plan: RoundPlan) -> PruneReport | None:
        """See Pruning."""
        architecture = state.architecture
        chances = masked_softmax(architecture.operation_logits.detach().double(), architecture.operation_mask)
        best = chances.topk(2, dim=-1)
        lead = best.values[..., 0] - best.values[..., 1]
        winner = torch.nn.functional.one_hot(best.indices[..., 0], chances.shape[-1]).bool()
        before, kept = architecture.alive_operations(), (lead < self.gap).unsqueeze(-1) | winner
        if not self._affordable(architecture, kept):
            kept = self._edge_by_edge(architecture, kept, lead)
        state.restrict(kept, architecture.input_mask)
        removed = before - architecture.alive_operations()
        return PruneReport(voluntary=removed) if removed else None

    def _affordable(self, architecture: Architecture, kept: Tensor) -> bool:
        trial = architecture.clone()
        trial.restrict(kept, architecture.input_mask)
        return self.budget is None or self.budget.affordable(trial, argmax_genotype)

    def _edge_by_edge(self, architecture: Architecture, wanted: Tensor, lead: Tensor) -> Tensor:
        """What stays of the operations if only those edges are settled that the budget allows, the surest first."""
        kept, loses = torch.ones_like(wanted), (architecture.operation_mask & ~wanted).any(-1)
        for place in lead.flatten().argsort(descending=True, stable=True).tolist():
            edge = divmod(place, lead.shape[1])
            if not loses[edge]:
                continue
            kept[edge] = wanted[edge]
            if not self._affordable(architecture, kept):
                kept[edge] = True
        return kept


@dataclass(frozen=True)
class PolicyPruning:
    """Every client's policy loses the operations that it hardly draws any more, for good (meta-PerFedRLNAS).

    A client loses none where no network within the ``budget`` would be left for it.
    """

    threshold: float = 0.01
    budget: Budget | None = None

    def __call__(self, state: ServerState, updates: Sequence[ClientUpdate], plan: RoundPlan) -> PruneReport | None:
        """See Pruning. The supernet keeps what any policy keeps."""
        if not plan.prunes:
            return None
        policy, mask = state.memory["policy"], state.memory["policy_mask"]
        chances = masked_softmax(policy.double(), mask, plan.temperature)
        best = torch.nn.functional.one_hot(chances.argmax(-1), mask.shape[-1]).bool()
        kept = mask & ((chances >= self.threshold) | best)
        if self.budget is not None:
            trial = state.architecture.clone()
            for client in (kept != mask).flatten(1).any(1).nonzero().flatten().tolist():
                trial.operation_mask.copy_(kept[client])
                if not self.budget.affordable(trial, argmax_genotype):
                    kept[client] = mask[client]
        state.memory["policy_mask"] = kept
        removed = int(mask.sum() - kept.sum())
        state.restrict(kept.any(0), state.architecture.input_mask)
        return PruneReport(voluntary=removed) if removed else None
