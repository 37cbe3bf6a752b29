"""How one client searches in one round: the only training loop there is (paper, Algorithm 1, Client Search)."""

from dataclasses import dataclass, field
from statistics import fmean

import torch

from fedmetanas_core.federation.update import ClientUpdate, Payload, RoundPlan
from fedmetanas_core.search.evaluation import refresh_statistics
from fedmetanas_core.search.local_data import LocalData, draw_tasks, task_size
from fedmetanas_core.search.pruning import PruneRule, propose
from fedmetanas_core.search.relaxation import mixture
from fedmetanas_core.search.schedule import cosine_learning_rate
from fedmetanas_core.search.steps import TaskLearner
from fedmetanas_core.search.tasks import OuterOptions, TaskKind, TaskRunner, borrow_runner
from fedmetanas_core.seeds import torch_stream


@dataclass(frozen=True)
class SearchOptions:
    """What a client needs to know beside the plan. Rates are per step; ``local_epochs`` is E, ``batch_size`` B."""

    local_epochs: int = 5
    batch_size: int = 32
    single_task: bool = False  # one (support, query) task per epoch, Algorithm 1 read literally
    learner: TaskLearner = field(default_factory=TaskLearner)
    outer: OuterOptions = field(default_factory=OuterOptions)
    meta_weight_rate: float = 0.025
    meta_weight_rate_end: float = 0.001
    vote: PruneRule | None = None  # set where clients vote on pruning, at the end of every epoch
    vote_temperature: float | None = None  # None: the current one


def local_search(payload: Payload, client: int, data: LocalData, options: SearchOptions) -> ClientUpdate:
    """Search on one client's data and return what it learned. Pure: nothing of ``payload`` is changed.

    Raises ValueError for a client without data.
    """
    if len(data) == 0:
        raise ValueError(f"client {client} has no training data")
    plan = payload.plan
    kind = _task_kind(payload, len(data), options)
    tasks = options.local_epochs * (1 if options.single_task else max(1, len(data) // kind.size // 2))
    runner = borrow_runner(payload, kind, data.images.device, tasks)
    supernet, architecture = runner.supernet, runner.architecture
    metrics = _train(runner, data, plan, options, torch_stream(plan.seed, "local search", client))
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
        operation_logits=architecture.operation_logits.detach().clone().cpu(),
        input_logits=architecture.input_logits.detach().clone().cpu(),
        votes=votes,
        metrics=metrics,
    )


def _task_kind(payload: Payload, count: int, options: SearchOptions) -> TaskKind:
    """The tasks of a client with this many images. Once the server's masks are one-hot, nothing is mixed."""
    plan, size = payload.plan, task_size(count, options.batch_size)
    return TaskKind(
        size=size,
        # A single image has no moments worth the name: it is normalised with the running statistics that came.
        trains=size > 1,
        mixes=not payload.architecture.is_one_hot(),
        adapts=plan.adapts_architecture,
        alpha_weight_decay=plan.alpha_weight_decay,
        learner=options.learner,
        outer=options.outer,
    )


def _train(
    runner: TaskRunner, data: LocalData, plan: RoundPlan, options: SearchOptions, generator: torch.Generator
) -> dict[str, float]:
    """All epochs, in place; the mean losses. Voting clients prune for themselves at the end of each epoch."""
    losses = []
    for epoch in range(options.local_epochs):
        runner.set_rate(_weight_rate(plan, epoch, options))
        for support, query in draw_tasks(len(data), options.batch_size, generator, options.single_task):
            batches = [data.batch(batch, generator) for batch in (support, query)]
            losses.append(runner(batches[0], batches[1], generator))
        if options.vote is not None and plan.phase != "warm-up":
            kept, _ = propose(runner.architecture, options.vote_temperature or plan.temperature, options.vote)
            runner.architecture.restrict(*kept)
    support_losses, query_losses = zip(*torch.stack(losses).tolist(), strict=True)
    return {"train_loss": fmean(query_losses), "support_loss": fmean(support_losses)}


def _weight_rate(plan: RoundPlan, epoch: int, options: SearchOptions) -> float:
    """The cosine runs over all local epochs of all rounds, so a client joining late continues it."""
    step, steps = (plan.round - 1) * options.local_epochs + epoch, plan.num_rounds * options.local_epochs
    return cosine_learning_rate(step, steps, options.meta_weight_rate, options.meta_weight_rate_end)
