"""A client's tasks of one round; on a GPU recorded once and replayed.

A task is thousands of small kernels, and starting one takes longer than running it. A CUDA graph starts all of them at
once, but with the same arguments every time: so everything that a task reads and changes lies in tensors that stay
where they are, and numbers that change from round to round (temperature, noise, rate of weights) are tensors as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import log, prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmetanas_core.federation.update import Payload
from fedmetanas_core.search.optimizers import Adam, Sgd
from fedmetanas_core.search.penalties import Penalty
from fedmetanas_core.search.relaxation import Noise, Relaxation, draw_noise, noise_shapes
from fedmetanas_core.search.steps import Bench, StepRule, alpha_optimizer, clear_gradients
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.edge_weights import as_tuples
from fedmetanas_core.space.models import borrow
from fedmetanas_core.space.parts import part_mask
from fedmetanas_core.space.spec import CELL_KINDS
from fedmetanas_core.space.supernet import Supernet

Work = Callable[[], None]
Batch = tuple[Tensor, Tensor]

WARM_UP = 3  # runs before recording, in which libraries choose their kernels and optimisers make their state
KEPT_SIZES = 2  # each recording holds the maps of a whole task; full batches and, now and then, a small client's
FOLLOWING = 0.5  # weight of the distance to the auxiliary classifier (FedPNAS)
MANY_WEIGHTS = 1_000_000  # 4 MB, about what a core's cache holds
WORTH_RECORDING = 10  # tasks of a client's round: making a recording takes as long as five or so


@dataclass(frozen=True)
class OuterOptions:
    """The outer steps: on weights SGD with momentum, or Adam; on alphas Adam or SGD; and how a pass is computed.

    ``relaxation`` turns alphas into the weights of a pass, ``penalties`` are added to its loss, ``drop_path`` is that
    of the final network (see Supernet). The network may have an ``auxiliary`` classifier: it ``learns`` by a loss of
    its own, or is ``followed``: the distance to its predictions is part of the loss.
    """

    momentum: float = 0.9
    weight_decay: float = 3e-4
    weight_optimizer: str = "sgd"
    alpha_rate: float = 3e-4
    alpha_optimizer: str = "adam"
    relaxation: Relaxation = field(default_factory=Relaxation)
    penalties: tuple[Penalty, ...] = ()
    drop_path: float = 0.0
    auxiliary: str = "none"
    samples: int = 1  # draws of the alphas whose predictions a pass averages, in probability
    precision: str = "float32"  # of the network's passes; weights, alphas and their gradients are float32 anyhow


@dataclass(frozen=True)
class TaskKind:
    """What is the same for all steps of a client's round, as values: steps of one kind can share a recording.

    ``size`` images in a batch. ``trains`` means batch norm by the batch's own moments; ``mixes`` that operations are
    mixed at all; ``adapts`` that alphas learn.
    """

    size: int
    trains: bool
    mixes: bool
    adapts: bool
    alpha_weight_decay: float
    rule: StepRule
    outer: OuterOptions

    @property
    def passes(self) -> int:
        """Forward passes of one step."""
        return self.rule.passes(self.adapts) * self.outer.samples

    @property
    def recordable(self) -> bool:
        """Whether every step does the same work, all of it on the device."""
        relaxes = self.outer.relaxation.recordable or not self.mixes
        return relaxes and self.rule.recordable and not (self.adapts and self.outer.penalties)


class TaskRunner:
    """Runs steps of one kind on one network; ``begin`` starts a round.

    ``record`` turns work into what repeats it, and may run it meanwhile; without one nothing is recorded.
    """

    def __init__(
        self,
        network: TrainableNetwork,
        architecture: Architecture,
        kind: TaskKind,
        record: Callable[[Work], Work] | None = None,
    ) -> None:
        self.network, self.architecture, self.kind = network, architecture, kind
        like, spec = network.weights.detach(), architecture.spec
        shape, batches = (kind.size, spec.in_channels, spec.height, spec.width), kind.rule.batches
        self._images = [torch.zeros(shape, device=like.device, dtype=like.dtype) for _ in range(batches)]
        self._labels = [torch.zeros(kind.size, device=like.device, dtype=torch.long) for _ in range(batches)]
        shapes = noise_shapes(architecture, kind.outer.relaxation.sample)
        sizes = [prod(shape) for shape in shapes]
        self._noise = architecture.operation_logits.detach().new_zeros(kind.passes * sum(sizes))
        places = [torch.split(place, sizes) for place in self._noise.view(kind.passes, sum(sizes))]
        self._noises: list[Noise] = [(one.view(shapes[0]), other.view(shapes[1])) for one, other in places]
        self._temperature = like.new_ones(())
        self._noise_scale = 0.0
        self._losses = like.new_zeros(2)
        self.last_path = architecture.operation_mask  # the operations that the last pass computed
        self._make_optimizers(record is not None)
        self._set_mode()
        self._run = self._work if record is None else record(self._work)

    def _make_optimizers(self, recorded: bool) -> None:
        outer, weights = self.kind.outer, self.network.weights
        # A recording reads the rate from where it lies; torch's fused SGD is the one that can. It also goes through
        # memory once, which is most of what the optimiser's step takes where weights do not fit into the cache.
        fused = recorded or weights.numel() >= MANY_WEIGHTS
        rate: float | Tensor = torch.zeros((), device=weights.device) if recorded else 0.0
        self.weight_optimizer: Adam | Sgd
        if outer.weight_optimizer == "adam":
            self.weight_optimizer = Adam(
                [weights], rate, weight_decay=outer.weight_decay, capturable=weights.device.type != "cpu"
            )
        else:
            self.weight_optimizer = Sgd([weights], rate, outer.momentum, outer.weight_decay, fused or None)
        self.alpha_optimizer: Adam | Sgd | None = None
        if self.kind.adapts:
            decay = {"betas": (0.5, 0.999), "weight_decay": self.kind.alpha_weight_decay}
            alphas = [logits for logits, _ in self.architecture.rows()]
            self.alpha_optimizer = alpha_optimizer(outer.alpha_optimizer, alphas, outer.alpha_rate, **decay)

    def _set_mode(self) -> None:
        if self.network.training != self.kind.trains:  # asking all modules takes as long as a pass of a small network
            self.network.train(self.kind.trains)
        if isinstance(self.network, Supernet):
            self.network.drop_path = self.kind.outer.drop_path

    def begin(self, payload: Payload) -> None:
        """Take in what the server sent, and forget the last client: its momentum would point the wrong way."""
        self.network.load(payload.weights, payload.statistics)
        self._set_mode()
        self.architecture.load_state_dict(payload.architecture.state_dict())
        self.architecture.version = payload.architecture.version
        self.last_path = self.architecture.operation_mask
        self._temperature.fill_(payload.plan.temperature)
        self._noise_scale = payload.plan.noise_scale
        self._noise.zero_()
        for optimizer in (self.weight_optimizer, self.alpha_optimizer):
            if optimizer is not None:
                optimizer.forget()

    def set_rate(self, rate: float) -> None:
        """The outer rate of weights from now on."""
        if isinstance(self.weight_optimizer.rate, Tensor):
            self.weight_optimizer.rate.fill_(rate)
        else:
            self.weight_optimizer.rate = rate

    def __call__(self, batches: Sequence[Batch], generator: torch.Generator) -> Tensor:
        """One step on batches of the kind's size: the rule's two losses, on the device."""
        for index, (images, labels) in enumerate(batches):
            self._images[index].copy_(images)
            self._labels[index].copy_(labels)
        if self.kind.mixes and self._noise_scale > 0 and self.kind.outer.relaxation.noisy:
            self._draw(generator)
        self._run()
        return self._losses.clone()

    def _draw(self, generator: torch.Generator) -> None:
        """The noise of all passes, in one copy for which the processor does not wait."""
        arguments = self.architecture, self._noise_scale, generator, self.kind.outer.relaxation.sample
        drawn = torch.cat([part.flatten() for _ in range(self.kind.passes) for part in draw_noise(*arguments)])
        self._noise.copy_(drawn.pin_memory() if self._noise.is_cuda else drawn, non_blocking=True)

    def _work(self) -> None:
        noises = iter(self._noises)
        bench = Bench(
            weights=self.network.weights,
            alphas=[logits for logits, _ in self.architecture.rows()],
            weight_optimizer=self.weight_optimizer,
            alpha_optimizer=self.alpha_optimizer,
            loss=lambda batch: self._loss(
                self._images[batch], self._labels[batch], [next(noises) for _ in range(self.kind.outer.samples)]
            ),
            part=self._part,
        )
        self._losses.copy_(torch.stack(self.kind.rule(bench)))

    def _part(self, part: str) -> tuple[Tensor, int]:
        """See Bench."""
        mask = part_mask(self.network.weight_layout, part, self.architecture.spec)
        return mask.to(self.network.weights.device), len(CELL_KINDS) if part == "personal" else 0

    def alpha_gradient(self, batch: Batch) -> list[Tensor]:
        """The gradient of the loss by the alphas at the present values, without noise, over a batch of any size."""
        alphas = [logits for logits, _ in self.architecture.rows()]
        clear_gradients([self.network.weights, *alphas])
        self._loss(*batch, [None]).backward()  # type: ignore[no-untyped-call]
        return [torch.zeros_like(logits) if logits.grad is None else logits.grad.clone() for logits in alphas]

    def _loss(self, images: Tensor, labels: Tensor, noises: Sequence[Noise | None]) -> Tensor:
        """The loss at the present values, with these draws of noise or without any, and the penalties."""
        outer = self.kind.outer
        with torch.autocast(images.device.type, torch.bfloat16, enabled=outer.precision == "bfloat16"):
            predicted = [self._predict(images, noise) for noise in noises]
            if len(predicted) == 1 and outer.auxiliary == "none":
                loss = F.cross_entropy(predicted[0][0], labels)
            else:
                loss = self._loss_of_samples(predicted, labels)
        if self.kind.adapts:
            for penalty in outer.penalties:
                loss = loss + penalty(self.architecture, self._temperature)
        return loss

    def _predict(self, images: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor | None]:
        """Logits, and those of the auxiliary classifier where there is one."""
        weights, outer = None, self.kind.outer
        if self.kind.mixes:
            weights = outer.relaxation.sampled(self.architecture, self._temperature, noise)
            if weights.path is not None:
                self.last_path = weights.operations.detach() > 0
        if outer.auxiliary == "none":
            return self.network(images, weights), None
        return cast(Supernet, self.network).both_heads(images, weights)

    def _loss_of_samples(self, predicted: Sequence[tuple[Tensor, Tensor | None]], labels: Tensor) -> Tensor:
        """Of the mean prediction; with the auxiliary classifier's own loss, or the distance to what it predicts."""
        own = torch.stack([logits.log_softmax(1) for logits, _ in predicted]).logsumexp(0) - log(len(predicted))
        loss = F.nll_loss(own, labels)
        others = [auxiliary.log_softmax(1) for _, auxiliary in predicted if auxiliary is not None]
        if not others:
            return loss
        other = torch.stack(others).logsumexp(0) - log(len(others))
        if self.kind.outer.auxiliary == "learns":
            return loss + F.nll_loss(other, labels)
        return loss + FOLLOWING * F.mse_loss(own.exp(), other.exp())


def as_graph(work: Work) -> Work:
    """Record what ``work`` starts on the current GPU; the recording holds its memory for as long as it lives."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    return graph.replay


class Recordings:
    """The recordings that can still be used: those of one network, for the batch sizes that came last."""

    def __init__(self) -> None:
        self._network: tuple[Any, ...] = ()
        self._runners: dict[TaskKind, TaskRunner] = {}
        self.failure = ""

    def find(self, network: tuple[Any, ...], kind: TaskKind) -> TaskRunner | None:
        """The recorded runner, if there is one."""
        return self._runners.get(kind) if network == self._network else None

    def make_room(self, network: tuple[Any, ...], kind: TaskKind) -> None:
        """Let go of what cannot be used again, before the next one is made: masks only shrink, phases only advance."""
        usable = self._runners if network == self._network else {}
        self._network = network
        self._runners = {each: runner for each, runner in usable.items() if replace(each, size=kind.size) == kind}
        while len(self._runners) >= KEPT_SIZES:
            del self._runners[next(iter(self._runners))]

    def keep(self, kind: TaskKind, runner: TaskRunner) -> None:
        """Remember it for the next client."""
        self._runners[kind] = runner


recordings = Recordings()


def borrow_runner(payload: Payload, kind: TaskKind, device: torch.device, tasks: int) -> TaskRunner:
    """A runner of this kind for the payload's network, begun, for one caller at a time.

    On a GPU with a recording, unless its steps differ, so few ``tasks`` are to come that making one does not pay, or
    one has failed.
    """
    architecture, dtype = payload.architecture, payload.weights.dtype
    network = (architecture.spec, as_tuples(architecture.operation_mask), device, dtype)
    runner = recordings.find(network, kind)
    if runner is None:
        lent = borrow(architecture.spec, architecture.operation_mask, device, dtype)
        own = Architecture(architecture.spec).to(device, dtype)
        worth = kind.recordable and tasks >= WORTH_RECORDING
        if device.type == "cuda" and worth and not recordings.failure:
            recordings.make_room(network, kind)
            runner = _recorded(lent, own, kind)
        if runner is None:
            runner = TaskRunner(lent, own, kind)
    runner.begin(payload)
    return runner


def _recorded(network: TrainableNetwork, architecture: Architecture, kind: TaskKind) -> TaskRunner | None:
    """A runner with a recording, kept for later; None, and the reason in ``recordings``, if it cannot be made."""
    try:
        runner = TaskRunner(network, architecture, kind, as_graph)
    except RuntimeError as error:  # what torch raises for CUDA's refusals, lack of memory among them
        recordings.failure = f"tasks are not recorded: {' '.join(str(error).split())[:200]}"
        return None
    recordings.keep(kind, runner)
    return runner
