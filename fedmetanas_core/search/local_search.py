"""How one client searches in one round: the only training loop there is (paper, Algorithm 1, Client Search)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmetanas_core.federation.update import ClientUpdate, Payload, RoundPlan
from fedmetanas_core.search.evaluation import refresh_statistics
from fedmetanas_core.search.local_data import LocalData, draw_tasks, task_size
from fedmetanas_core.search.pruning import PruneRule, propose
from fedmetanas_core.search.relaxation import mixture, relax
from fedmetanas_core.search.schedule import cosine_learning_rate
from fedmetanas_core.search.steps import Loss, TaskLearner, meta_step
from fedmetanas_core.seeds import torch_stream
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.supernet import EdgeWeights, Supernet, borrow_supernet

Mix = Callable[[], EdgeWeights | None]


@dataclass(frozen=True)
class SearchOptions:
    """What a client needs to know beside the plan. Rates are per step; ``local_epochs`` is E, ``batch_size`` B."""

    local_epochs: int = 5
    batch_size: int = 32
    single_task: bool = False  # one (support, query) task per epoch, Algorithm 1 read literally
    learner: TaskLearner = field(default_factory=TaskLearner)
    meta_weight_rate: float = 0.025
    meta_weight_rate_end: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 3e-4
    meta_alpha_rate: float = 3e-4
    meta_alpha_optimizer: str = "adam"
    sample: str = "per_type"
    vote: PruneRule | None = None  # set where clients vote on pruning, at the end of every epoch
    vote_temperature: float | None = None  # None: the current one


def local_search(payload: Payload, client: int, data: LocalData, options: SearchOptions) -> ClientUpdate:
    """Search on one client's data and return what it learned. Pure: nothing of ``payload`` is changed.

    Raises ValueError for a client without data.
    """
    if len(data) == 0:
        raise ValueError(f"client {client} has no training data")
    plan, device = payload.plan, data.images.device
    generator = torch_stream(plan.seed, "local search", client)
    architecture = payload.architecture.clone().to(device)
    supernet = borrow_supernet(architecture.spec, architecture.operation_mask, device, payload.weights.dtype)
    supernet.load(payload.weights, payload.statistics)
    mix = _mixing(architecture, plan, options.sample, generator)
    metrics = _train(supernet, architecture, data, plan, options, generator, mix)
    votes = None
    if options.vote is not None:
        # A vote travels beside the logits. The masks go back to what the server sent, or the client would return
        # logits and statistics of an architecture that nobody has decided on.
        votes = (architecture.operation_mask.clone().cpu(), architecture.input_mask.clone().cpu())
        architecture.operation_mask.copy_(payload.architecture.operation_mask)
        architecture.input_mask.copy_(payload.architecture.input_mask)
    architecture.centre()
    if len(data) > 1:
        with torch.no_grad():
            refresh_statistics(supernet, data, mixture(architecture, plan.temperature))
    return ClientUpdate(
        client=client,
        round=plan.round,
        mask_version=payload.architecture.version,
        num_examples=len(data),
        weights=supernet.weights.detach().clone().cpu(),
        statistics=supernet.statistics.clone().cpu(),
        operation_logits=architecture.operation_logits.detach().cpu(),
        input_logits=architecture.input_logits.detach().cpu(),
        votes=votes,
        metrics=metrics,
    )


def _train(
    supernet: Supernet,
    architecture: Architecture,
    data: LocalData,
    plan: RoundPlan,
    options: SearchOptions,
    generator: torch.Generator,
    mix: Mix,
) -> dict[str, float]:
    """All epochs, in place; the mean losses. Voting clients prune for themselves at the end of each epoch."""
    # A single image has no moments worth the name: it is normalised with the running statistics that came.
    supernet.train(task_size(len(data), options.batch_size) > 1)
    weight_optimizer = torch.optim.SGD(
        [supernet.weights], options.meta_weight_rate, options.momentum, weight_decay=options.weight_decay
    )
    alpha_optimizer = _alpha_optimizer(architecture, plan, options)
    alphas = [architecture.operation_logits, architecture.input_logits]
    losses = []
    for epoch in range(options.local_epochs):
        weight_optimizer.param_groups[0]["lr"] = _weight_rate(plan, epoch, options)
        for support, query in draw_tasks(len(data), options.batch_size, generator, options.single_task):
            on_support, on_query = (_loss(supernet, data.batch(batch, generator), mix) for batch in (support, query))
            inner = [on_support] * options.learner.inner_steps
            losses.append(
                meta_step(supernet.weights, alphas, inner, on_query, options.learner, weight_optimizer, alpha_optimizer)
            )
        if options.vote is not None and plan.phase != "warm-up":
            kept, _ = propose(architecture, options.vote_temperature or plan.temperature, options.vote)
            architecture.restrict(*kept)
    support_losses, query_losses = zip(*losses, strict=True)
    return {"train_loss": fmean(query_losses), "support_loss": fmean(support_losses)}


def _mixing(architecture: Architecture, plan: RoundPlan, sample: str, generator: torch.Generator) -> Mix:
    """What gives the mixture weights of each pass: a fresh draw, or none at all once the server's masks are one-hot."""
    if architecture.is_one_hot():
        return lambda: None
    return lambda: relax(architecture, plan.temperature, plan.noise_scale, generator, sample)


def _alpha_optimizer(
    architecture: Architecture, plan: RoundPlan, options: SearchOptions
) -> torch.optim.Optimizer | None:
    """Fresh every round: momentum of another client's data, rounds ago, would point the first steps the wrong way."""
    if not plan.adapts_architecture:
        return None
    alphas: list[nn.Parameter] = [architecture.operation_logits, architecture.input_logits]
    if options.meta_alpha_optimizer == "adam":
        decay = plan.alpha_weight_decay
        return torch.optim.Adam(alphas, options.meta_alpha_rate, betas=(0.5, 0.999), weight_decay=decay)
    return torch.optim.SGD(alphas, options.meta_alpha_rate)


def _weight_rate(plan: RoundPlan, epoch: int, options: SearchOptions) -> float:
    """The cosine runs over all local epochs of all rounds, so a client joining late continues it."""
    step, steps = (plan.round - 1) * options.local_epochs + epoch, plan.num_rounds * options.local_epochs
    return cosine_learning_rate(step, steps, options.meta_weight_rate, options.meta_weight_rate_end)


def _loss(supernet: Supernet, batch: tuple[Tensor, Tensor], mix: Mix) -> Loss:
    """Cross-entropy of one batch at whatever values hold when it is called, with a fresh draw of Gumbel noise."""
    images, labels = batch
    return lambda: F.cross_entropy(supernet(images, mix()), labels)
