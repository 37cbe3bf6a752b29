"""How one client trains in one round: the only training loop there is (paper, Algorithm 1, Client Search)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from statistics import fmean

import torch
from torch import Tensor

from fedmetanas_core.federation.update import ClientUpdate, Payload, RoundPlan
from fedmetanas_core.search.evaluation import accuracy, refresh_statistics
from fedmetanas_core.search.local_data import LocalData, draw_steps, hold_out, task_size
from fedmetanas_core.search.penalties import ComputeBudgets
from fedmetanas_core.search.perturbation import perturbation_scores
from fedmetanas_core.search.pruning import PruneRule, propose
from fedmetanas_core.search.schedule import cosine_learning_rate
from fedmetanas_core.search.steps import Fomaml, StepRule
from fedmetanas_core.search.tasks import OuterOptions, TaskKind, TaskRunner, borrow_runner
from fedmetanas_core.seeds import derive_seed, torch_stream
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.fixed import FixedSpec
from fedmetanas_core.space.spec import SpaceSpec


@dataclass(frozen=True)
class Phase:
    """Epochs of one kind of step, with optimisers of their own."""

    rule: StepRule
    epochs: int


@dataclass(frozen=True)
class HeldOut:
    """A fixed part of a client's training images that its plain batches never hold.

    It is there for ``validation`` (a batch of it beside each training batch), for the ``query`` gradient of the alphas
    after all steps, or for the ``reward``, the accuracy on it after training.
    """

    role: str
    fraction: float


@dataclass(frozen=True)
class LocalOptions:
    """What a client needs to know beside the plan. Rates are per step; ``batch_size`` is B, epochs sum to E."""

    phases: tuple[Phase, ...] = field(default_factory=lambda: (Phase(Fomaml(), 5),))
    batch_size: int = 32
    single_task: bool = False  # one step per epoch, Algorithm 1 read literally
    outer: OuterOptions = field(default_factory=OuterOptions)
    weight_rate: float = 0.025
    weight_rate_end: float = 0.001
    restarts: bool = False  # the cosine runs over the epochs of a round, not of the run
    held_out: HeldOut | None = None
    budgets: ComputeBudgets | None = None  # what a client's network may cost, as a penalty
    vote: PruneRule | None = None  # set where clients vote on pruning, at the end of every epoch
    vote_temperature: float | None = None  # None: the current one
    centres: bool = True  # rows of alphas to a mean of 0, where all clients have the same entries
    scores: bool = False  # try at prune events what each operation is worth (DARTS-PT)
    running_statistics: bool = False  # train with those that came, and leave them as they are
    returns_touched: bool = False  # an update of the operations alone that were sampled
    seed: int = 0  # of the run, for what stays the same in all rounds
    purpose: str = "local search"

    @property
    def epochs(self) -> int:
        """Epochs of one round (E)."""
        return sum(phase.epochs for phase in self.phases)


@contextmanager
def kept_generators(draws: bool) -> Iterator[None]:
    """Torch's global generators as they were, after all that ``draws`` from them: dropout, for one, takes no other."""
    if not draws:
        yield
        return
    with torch.random.fork_rng():
        yield


def _draws(payload: Payload, options: LocalOptions) -> bool:
    """Whether training draws from the global generators."""
    fixed = isinstance(payload.architecture.spec, FixedSpec)
    return fixed or options.outer.drop_path > 0 or options.outer.relaxation.kind == "dirichlet"


def local_search(payload: Payload, client: int, data: LocalData, options: LocalOptions) -> ClientUpdate:
    """Train on one client's data and return what came of it. Pure: nothing of ``payload`` is changed.

    Raises ValueError for a client without data.
    """
    if len(data) == 0:
        raise ValueError(f"client {client} has no training data")
    parts = _parts(data, options, client)
    touched = torch.zeros_like(payload.architecture.operation_mask)
    runner, losses = _run_phases(payload, client, parts, options, touched)
    votes = _taken_back(runner.architecture, payload.architecture) if options.vote is not None else None
    gradient = _query_gradient(runner, parts[1]) if _queries(runner, options) else None
    metrics, scores = _finish(runner, payload.plan, parts, options)
    architecture, network = runner.architecture, runner.network
    return ClientUpdate(
        client=client,
        round=payload.plan.round,
        mask_version=payload.architecture.version,
        num_examples=len(data),
        weights=network.weights.detach().clone().cpu(),
        statistics=network.statistics.clone().cpu(),
        operation_logits=architecture.operation_logits.detach().clone().cpu(),
        input_logits=architecture.input_logits.detach().clone().cpu(),
        alpha_gradient=gradient,
        votes=votes,
        scores=scores,
        touched=touched.cpu() if options.returns_touched else None,
        metrics={**_mean_losses(losses), **metrics},
    )


def _run_phases(
    payload: Payload, client: int, parts: tuple[LocalData, LocalData], options: LocalOptions, touched: Tensor
) -> tuple[TaskRunner, list[Tensor]]:
    """All phases, one after the other; what the last one has left, and the losses of every step."""
    plan, losses, done = payload.plan, list[Tensor](), 0
    generator = torch_stream(plan.seed, options.purpose, client)
    dropout, draws = derive_seed(plan.seed, f"{options.purpose}, dropout", client), _draws(payload, options)
    runner: TaskRunner | None = None
    with kept_generators(draws):
        for phase in options.phases:
            payload = payload if runner is None else _carried(payload, runner)
            runner = _runner(payload, parts, phase, options, client)
            if draws:
                torch.manual_seed(dropout + done)  # only now: making a recording has drawn as well
            losses += _train(runner, parts, plan, phase, done, options, generator, touched)
            done += phase.epochs
    assert runner is not None, "local options without a phase"
    return runner, losses


def _taken_back(architecture: Architecture, sent: Architecture) -> tuple[Tensor, Tensor]:
    """The masks that the client's own prunes have left, as its vote; the architecture gets back those that were sent.

    Otherwise the client would return logits and statistics of an architecture that nobody has decided on.
    """
    votes = (architecture.operation_mask.clone().cpu(), architecture.input_mask.clone().cpu())
    architecture.operation_mask.copy_(sent.operation_mask)
    architecture.input_mask.copy_(sent.input_mask)
    return votes


def _finish(
    runner: TaskRunner, plan: RoundPlan, parts: tuple[LocalData, LocalData], options: LocalOptions
) -> tuple[dict[str, float], Tensor | None]:
    """After the last step: centred alphas, statistics of the weights as they are; reward and scores, if asked for."""
    network, architecture = runner.network, runner.architecture
    if options.centres:
        architecture.centre()
    if len(parts[0]) > 1 and not options.running_statistics:
        with torch.no_grad():
            expected = options.outer.relaxation.expected(architecture, plan.temperature)
            refresh_statistics(network, parts[0], None if expected is None else replace(expected, path=None))
    scores = None
    if options.scores and plan.prunes:
        scores = perturbation_scores(network, architecture, parts[0], plan.temperature, options.outer.relaxation).cpu()
    if options.held_out is not None and options.held_out.role == "reward":
        return {"reward": _accuracy(runner, parts[1], plan, options)}, scores
    return {}, scores


def _parts(data: LocalData, options: LocalOptions, client: int) -> tuple[LocalData, LocalData]:
    """What is trained on, and what is held out of it (everything, where nothing is)."""
    if options.held_out is None:
        return data, data
    stream = torch_stream(options.seed, f"held out for {options.held_out.role}", client)
    return hold_out(data, options.held_out.fraction, stream)


def _validates(options: LocalOptions) -> bool:
    return options.held_out is not None and options.held_out.role == "validation"


def _runner(
    payload: Payload, parts: tuple[LocalData, LocalData], phase: Phase, options: LocalOptions, client: int
) -> TaskRunner:
    """For the steps of a client with these images. Once the server's masks are one-hot, nothing is mixed."""
    plan, count, batches, outer = payload.plan, len(parts[0]), phase.rule.batches, options.outer
    mixes, spec = not payload.architecture.is_one_hot(), payload.architecture.spec
    if options.budgets is not None and isinstance(spec, SpaceSpec):
        outer = replace(outer, penalties=(*outer.penalties, options.budgets.of(client, spec)))
    if _validates(options):
        count, batches = min(len(part) for part in parts), 1
    size = task_size(count, options.batch_size, batches)
    kind = TaskKind(
        size=size,
        # A single image has no moments worth the name: it is normalised with the running statistics that came.
        trains=size > 1 and not options.running_statistics,
        mixes=mixes,
        adapts=plan.adapts_architecture and mixes,
        alpha_weight_decay=plan.alpha_weight_decay,
        rule=phase.rule,
        outer=outer,
    )
    steps = phase.epochs * (1 if options.single_task else max(1, len(parts[0]) // size // batches))
    return borrow_runner(payload, kind, parts[0].images.device, steps)


def _carried(payload: Payload, runner: TaskRunner) -> Payload:
    """A payload that goes on where a phase has ended."""
    network = runner.network
    return replace(
        payload,
        weights=network.weights.detach().clone(),
        statistics=network.statistics.clone(),
        architecture=runner.architecture.clone(),
    )


def _train(
    runner: TaskRunner,
    parts: tuple[LocalData, LocalData],
    plan: RoundPlan,
    phase: Phase,
    done: int,
    options: LocalOptions,
    generator: torch.Generator,
    touched: Tensor,
) -> list[Tensor]:
    """A phase's epochs, in place; the losses of every step. Voting clients prune for themselves after each epoch."""
    losses = []
    for epoch in range(done, done + phase.epochs):
        runner.set_rate(_weight_rate(plan, epoch, options))
        for batches in _batches(runner, parts, options, generator):
            losses.append(runner(batches, generator))
            if options.returns_touched:
                touched |= runner.last_path.to(touched.device)
        if options.vote is not None and plan.phase != "warm-up":
            kept, _ = propose(runner.architecture, options.vote_temperature or plan.temperature, options.vote)
            runner.architecture.restrict(*kept)
    return losses


def _batches(
    runner: TaskRunner, parts: tuple[LocalData, LocalData], options: LocalOptions, generator: torch.Generator
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The batches of an epoch's steps, prepared."""
    size, count = runner.kind.size, len(parts[0])
    if not _validates(options):
        for step in draw_steps(count, size, generator, runner.kind.rule.batches, options.single_task):
            yield [parts[0].batch(indices, generator) for indices in step]
        return
    validation = cycle(draw_steps(len(parts[1]), size, generator, 1))
    for (train,), (held,) in zip(draw_steps(count, size, generator, 1, options.single_task), validation, strict=False):
        yield [parts[0].batch(train, generator), parts[1].batch(held, generator)]


def _mean_losses(losses: list[Tensor]) -> dict[str, float]:
    """``train_loss`` after what a step learns within itself, ``support_loss`` before; NaN if there was no step."""
    before, after = zip(*torch.stack(losses).tolist(), strict=True)
    return {"train_loss": fmean(after), "support_loss": fmean(before)}


def _queries(runner: TaskRunner, options: LocalOptions) -> bool:
    return options.held_out is not None and options.held_out.role == "query" and runner.kind.adapts


def _query_gradient(runner: TaskRunner, query: LocalData) -> tuple[Tensor, Tensor]:
    """The mean gradient of the alphas over batches of the query images, at the present values, noise-free."""
    totals = [torch.zeros_like(logits) for logits, _ in runner.architecture.rows()]
    steps = list(query.batches(runner.kind.size))
    for batch in steps:
        for total, gradient in zip(totals, runner.alpha_gradient(batch), strict=True):
            total += gradient * (len(batch[1]) / len(query))
    return totals[0].cpu(), totals[1].cpu()


def _accuracy(runner: TaskRunner, data: LocalData, plan: RoundPlan, options: LocalOptions) -> float:
    runner.network.eval()
    with torch.no_grad():
        weights = options.outer.relaxation.expected(runner.architecture, plan.temperature)
    return accuracy(lambda images: runner.network(images, weights), data)


def _weight_rate(plan: RoundPlan, epoch: int, options: LocalOptions) -> float:
    """The cosine runs over all local epochs of all rounds of a stage, so a client joining late continues it."""
    rounds_before, rounds = (0, 1) if options.restarts else (plan.stage_round - 1, plan.stage_rounds)
    step, steps = rounds_before * options.epochs + epoch, rounds * options.epochs
    return cosine_learning_rate(step, steps, options.weight_rate, options.weight_rate_end)


def returned_mask(update: ClientUpdate, architecture: Architecture) -> Tensor:
    """The operations whose weights an update holds."""
    return architecture.operation_mask if update.touched is None else update.touched & architecture.operation_mask
