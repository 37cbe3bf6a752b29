"""Soft pruning of operations and of input pairs (paper, section 4.4), decided by the server on averaged logits."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from fedmetanas_core.space.architecture import Architecture, masked_softmax
from fedmetanas_core.space.spec import NONE, SKIP

Weigh = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class PruneReport:
    """What one event removed.

    ``voluntary``: below the threshold, or voted down. ``forced``: over the cap. ``none``: that operation, dropped by
    policy at the first event. ``stranded``: operations on edges whose last pair went.
    """

    voluntary: int = 0
    forced: int = 0
    stranded: int = 0
    none: int = 0

    def __add__(self, other: "PruneReport") -> "PruneReport":
        return PruneReport(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    @property
    def total(self) -> int:
        """Everything removed."""
        return sum(astuple(self))


@dataclass(frozen=True)
class PruneRule:
    """``threshold`` on noise-free weights; ``none_policy`` is ``drop_first``, ``absent`` or ``legal``.

    ``weigh`` makes these weights of logits, mask and temperature, as the model does where it is evaluated.
    ``skip_cap``: how many edges of a cell may keep skip_connect, those where it is strongest; None for any number.
    """

    threshold: float = 0.01
    none_policy: str = "drop_first"
    skip_cap: int | None = None
    weigh: Weigh = masked_softmax


def _ranks(weights: Tensor) -> Tensor:
    """Position of every entry in its row, 0 for the largest; ties go to the lower index."""
    order = torch.argsort(weights, dim=-1, descending=True, stable=True)
    return torch.argsort(order, dim=-1, stable=True)


def keep_bits(
    logits: Tensor,
    mask: Tensor,
    temperature: float,
    rule: PruneRule,
    caps: Tensor,
    scores: Tensor | None = None,
    favoured: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Which alive entries stay, and which entries reach the threshold; both of the shape of ``logits``.

    Those stay whose weight is at least the rule's threshold and whose rank is within the row's cap; the best always.
    ``caps`` broadcasts against the rows (..., 1). The weights are those with which the model is evaluated; they rank
    the entries as well, unless ``scores`` do. What is ``favoured`` ranks first in its row.
    """
    weights = rule.weigh(logits.detach().double(), mask, temperature)
    # A masked entry must rank behind an alive one whose weight underflowed to the same 0.
    order = weights if scores is None else scores.double()
    if favoured is not None:
        order = order.masked_fill(favoured, torch.inf)
    ranks = _ranks(order.masked_fill(~mask, -torch.inf))
    best = mask & (ranks == 0)
    above = weights >= rule.threshold
    return (mask & above & (ranks < caps)) | best, above


def removed(mask: Tensor, keep: Tensor, above: Tensor) -> PruneReport:
    """What going from ``mask`` to ``keep`` removes, told apart by whether it reached the threshold."""
    gone = mask & ~keep
    return PruneReport(voluntary=int((gone & ~above).sum()), forced=int((gone & above).sum()))


def propose(
    architecture: Architecture,
    temperature: float,
    rule: PruneRule,
    operation_cap: int | None = None,
    pair_caps: Sequence[int] | None = None,
    scores: Tensor | None = None,
    favoured: tuple[Tensor, Tensor] | None = None,
) -> tuple[tuple[Tensor, Tensor], PruneReport]:
    """Keep bits (operations, pairs) by this rule, without applying them. No cap means full width.

    ``scores`` (groups, edges, 8) rank the operations in place of their weights. ``favoured`` (operations, pairs), at
    most one of each row, are kept in any case.
    """
    (operation_logits, operation_mask), (input_logits, input_mask) = architecture.rows()
    kept_operations, kept_pairs = favoured or (None, None)
    full_width = [input_logits.shape[-1]] * input_logits.shape[1]
    widths = torch.tensor(pair_caps or full_width, device=input_logits.device).view(1, -1, 1)
    pairs, pairs_above = keep_bits(input_logits, input_mask, temperature, rule, widths, favoured=kept_pairs)
    trial = architecture.clone()
    trial.restrict(operation_mask, pairs)  # edges without a pair lose their operations first
    dead = int(operation_mask.sum() - trial.operation_mask.sum())
    before_none = trial.alive_operations()
    if rule.none_policy == "drop_first" or operation_cap == 1:  # ``none`` cannot be all that an edge is left with
        trial.without_none()
    dropped = before_none - trial.alive_operations()
    before_skips = trial.alive_operations()
    if rule.skip_cap is not None:
        kept = _without_surplus_skips(trial, rule, rule.skip_cap)
        trial.restrict(kept if kept_operations is None else kept | kept_operations, trial.input_mask)
    surplus = before_skips - trial.alive_operations()
    cap = torch.tensor(operation_cap or operation_logits.shape[-1], device=operation_logits.device)
    operations, above = keep_bits(
        operation_logits,
        trial.operation_mask,
        temperature,
        rule,
        cap,
        scores,
        None if favoured is None else favoured[0],
    )
    operations = _keep_a_real_one(operations, trial)
    report = removed(input_mask, pairs, pairs_above) + removed(trial.operation_mask, operations, above)
    report += PruneReport(none=dropped, stranded=dead, forced=surplus)
    return (operations, pairs), report


def _without_surplus_skips(architecture: Architecture, rule: PruneRule, most: int) -> Tensor:
    """The operation mask without skip_connect on all edges of a cell but those where it weighs most.

    An edge that has no other real operation keeps it.
    """
    mask = architecture.operation_mask.clone()
    weights = rule.weigh(architecture.operation_logits.detach().double(), mask, 1.0)[..., SKIP]
    others = mask[..., NONE + 1 :].sum(-1) > 1
    surplus = mask[..., SKIP] & others & (_ranks(weights.masked_fill(~mask[..., SKIP], -1.0)) >= most)
    mask[..., SKIP] &= ~surplus
    return mask


def _keep_a_real_one(operations: Tensor, architecture: Architecture) -> Tensor:
    """Where ``none`` alone would stay, keep the strongest real operation too: a genotype needs one on each edge."""
    only_none = operations[..., NONE] & ~operations[..., NONE + 1 :].any(-1)
    scores = architecture.operation_logits.detach().masked_fill(~architecture.operation_mask, -torch.inf).clone()
    scores[..., NONE] = -torch.inf
    strongest = torch.nn.functional.one_hot(scores.argmax(-1), operations.shape[-1]).bool()
    return operations | (strongest & architecture.operation_mask & only_none.unsqueeze(-1))


def tally(
    votes: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[float],
    architecture: Architecture,
    favoured: tuple[Tensor, Tensor] | None = None,
) -> PruneReport:
    """Merge clients' keep bits into the architecture: an entry stays if half of the weight voted for it.

    A row in which nothing got half keeps the entry with most votes, the larger logit breaking ties. What is
    ``favoured`` stays in any case.
    """
    total = sum(weights)
    kept = []
    for index, (logits, mask) in enumerate(architecture.rows()):
        share = sum(vote[index].double() * weight for vote, weight in zip(votes, weights, strict=True)) / total
        keep = mask & (share >= 0.5)
        # Votes first, logits only among equals: they are squeezed into less than the smallest step of a share.
        score = share + 1e-9 * masked_softmax(logits.detach().double(), mask)
        score = torch.where(mask, score, -torch.ones_like(score))
        best = torch.nn.functional.one_hot(score.argmax(-1), mask.shape[-1]).bool() & mask
        keep = torch.where(keep.any(-1, keepdim=True), keep, best)
        kept.append(keep if favoured is None else keep | (mask & favoured[index]))
    operations, pairs = kept
    # An edge kept alive by its pair keeps a real operation even if its row was voted down to ``none``.
    operations = _keep_a_real_one(operations, architecture)
    pairs_gone = int((architecture.input_mask & ~pairs).sum())
    trial = architecture.clone()
    trial.restrict(architecture.operation_mask, pairs)  # edges without a pair lose their operations first
    stranded = architecture.alive_operations() - trial.alive_operations()
    voted_down = int((trial.operation_mask & ~operations).sum())
    architecture.restrict(operations, pairs)
    return PruneReport(voluntary=pairs_gone + voted_down, stranded=stranded)
