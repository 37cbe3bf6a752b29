"""A client's tasks of one round; on a GPU recorded once and replayed.

A task is thousands of small kernels, and starting one takes longer than running it. A CUDA graph starts all of them at
once, but with the same arguments every time: so everything that a task reads and changes lies in tensors that stay
where they are, and numbers that change from round to round (temperature, noise, rate of weights) are tensors as well.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmetanas_core.federation.update import Payload
from fedmetanas_core.search.relaxation import Noise, draw_noise, noise_shapes, relax_with
from fedmetanas_core.search.steps import Loss, TaskLearner, alpha_optimizer, meta_step
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.supernet import Supernet, as_tuples, borrow_supernet

Work = Callable[[], None]
Batch = tuple[Tensor, Tensor]

WARM_UP = 3  # runs before recording, in which libraries choose their kernels and optimisers make their state
KEPT_SIZES = 2  # each recording holds the maps of a whole task; full batches and, now and then, a small client's
WORTH_RECORDING = 10  # tasks of a client's round: making a recording takes as long as five or so


@dataclass(frozen=True)
class OuterOptions:
    """The outer steps: SGD with momentum on weights, Adam or SGD on alphas; and how a pass is computed."""

    momentum: float = 0.9
    weight_decay: float = 3e-4
    alpha_rate: float = 3e-4
    alpha_optimizer: str = "adam"
    sample: str = "per_type"
    precision: str = "float32"  # of the network's passes; weights, alphas and their gradients are float32 anyhow


@dataclass(frozen=True)
class TaskKind:
    """What is the same for all tasks of a round, as values: tasks of one kind can share a recording.

    ``size`` images in a batch. ``trains`` means batch norm by the batch's own moments; ``mixes`` that operations are
    mixed at all; ``adapts`` that alphas learn.
    """

    size: int
    trains: bool
    mixes: bool
    adapts: bool
    alpha_weight_decay: float
    learner: TaskLearner
    outer: OuterOptions

    @property
    def passes(self) -> int:
        """Forward passes of one task."""
        each = 2 if self.learner.alternate and self.adapts else 1
        return self.learner.inner_steps * each + 1


class TaskRunner:
    """Runs tasks of one kind on one network; ``begin`` starts a round.

    ``record`` turns work into what repeats it, and may run it meanwhile; without one nothing is recorded.
    """

    def __init__(
        self,
        supernet: Supernet,
        architecture: Architecture,
        kind: TaskKind,
        record: Callable[[Work], Work] | None = None,
    ) -> None:
        self.supernet, self.architecture, self.kind = supernet, architecture, kind
        like, spec = supernet.weights.detach(), supernet.spec
        shape = (kind.size, spec.in_channels, spec.height, spec.width)
        self._images = [torch.zeros(shape, device=like.device, dtype=like.dtype) for _ in range(2)]
        self._labels = [torch.zeros(kind.size, device=like.device, dtype=torch.long) for _ in range(2)]
        shapes = noise_shapes(architecture, kind.outer.sample)
        sizes = [prod(shape) for shape in shapes]
        self._noise = architecture.operation_logits.detach().new_zeros(kind.passes * sum(sizes))
        places = [torch.split(place, sizes) for place in torch.split(self._noise, sum(sizes))]
        self._noises: list[Noise] = [(one.view(shapes[0]), other.view(shapes[1])) for one, other in places]
        self._temperature = like.new_ones(())
        self._noise_scale = 0.0
        self._losses = like.new_zeros(2)
        self._make_optimizers(record is not None)
        supernet.train(kind.trains)
        self._run = self._work if record is None else record(self._work)

    def _make_optimizers(self, recorded: bool) -> None:
        outer, weights = self.kind.outer, self.supernet.weights
        # A recording reads the rate from where it lies; torch's fused SGD is the one that can.
        rate: float | Tensor = torch.zeros((), device=weights.device) if recorded else 0.0
        self.weight_optimizer = torch.optim.SGD(
            [weights], rate, outer.momentum, weight_decay=outer.weight_decay, fused=recorded or None
        )
        self.alpha_optimizer: torch.optim.Optimizer | None = None
        if self.kind.adapts:
            decay = {"betas": (0.5, 0.999), "weight_decay": self.kind.alpha_weight_decay}
            alphas = [logits for logits, _ in self.architecture.rows()]
            self.alpha_optimizer = alpha_optimizer(outer.alpha_optimizer, alphas, outer.alpha_rate, **decay)

    def begin(self, payload: Payload) -> None:
        """Take in what the server sent, and forget the last client: its momentum would point the wrong way."""
        self.supernet.load(payload.weights, payload.statistics)
        self.supernet.train(self.kind.trains)
        self.architecture.load_state_dict(payload.architecture.state_dict())
        self.architecture.version = payload.architecture.version
        self._temperature.fill_(payload.plan.temperature)
        self._noise_scale = payload.plan.noise_scale
        self._noise.zero_()
        for optimizer in (self.weight_optimizer, self.alpha_optimizer):
            for state in optimizer.state.values() if optimizer is not None else ():
                for value in state.values():
                    if isinstance(value, Tensor):
                        value.zero_()

    def set_rate(self, rate: float) -> None:
        """The outer rate of weights from now on."""
        group = self.weight_optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate

    def __call__(self, support: Batch, query: Batch, generator: torch.Generator) -> Tensor:
        """One task on batches of the kind's size: (support loss, query loss), on the device."""
        for index, (images, labels) in enumerate((support, query)):
            self._images[index].copy_(images)
            self._labels[index].copy_(labels)
        if self.kind.mixes and self._noise_scale > 0:
            self._draw(generator)
        self._run()
        return self._losses.clone()

    def _draw(self, generator: torch.Generator) -> None:
        """The noise of all passes, in one copy for which the processor does not wait."""
        arguments = self.architecture, self._noise_scale, generator, self.kind.outer.sample
        drawn = torch.cat([part.flatten() for _ in range(self.kind.passes) for part in draw_noise(*arguments)])
        self._noise.copy_(drawn.pin_memory() if self._noise.is_cuda else drawn, non_blocking=True)

    def _work(self) -> None:
        noises = iter(self._noises)
        alphas = [logits for logits, _ in self.architecture.rows()]
        inner = [self._loss(0, noises)] * self.kind.learner.inner_steps
        losses = meta_step(
            self.supernet.weights,
            alphas,
            inner,
            self._loss(1, noises),
            self.kind.learner,
            self.weight_optimizer,
            self.alpha_optimizer,
        )
        self._losses.copy_(torch.stack(losses))

    def _loss(self, batch: int, noises: Iterator[Noise]) -> Loss:
        """Cross-entropy of a batch at whatever values hold when it is called, with the next draw of noise."""

        def loss() -> Tensor:
            weights = None
            if self.kind.mixes:
                weights = relax_with(self.architecture, self._temperature, next(noises), self.kind.outer.sample)
            images = self._images[batch]
            reduced = self.kind.outer.precision == "bfloat16"
            with torch.autocast(images.device.type, torch.bfloat16, enabled=reduced):
                return F.cross_entropy(self.supernet(images, weights), self._labels[batch])

        return loss


def as_graph(work: Work) -> Work:
    """Record what ``work`` starts on the current GPU; the recording holds its memory for as long as it lives."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*capturable.*")  # Adam, of the steps before and after recording
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

    On a GPU with a recording, unless so few ``tasks`` are to come that making one does not pay, or one has failed.
    """
    architecture, dtype = payload.architecture, payload.weights.dtype
    network = (architecture.spec, as_tuples(architecture.operation_mask), device, dtype)
    runner = recordings.find(network, kind)
    if runner is None:
        supernet = borrow_supernet(architecture.spec, architecture.operation_mask, device, dtype)
        own = Architecture(architecture.spec).to(device, dtype)
        if device.type == "cuda" and tasks >= WORTH_RECORDING and not recordings.failure:
            recordings.make_room(network, kind)
            runner = _recorded(supernet, own, kind)
        if runner is None:
            runner = TaskRunner(supernet, own, kind)
    runner.begin(payload)
    return runner


def _recorded(supernet: Supernet, architecture: Architecture, kind: TaskKind) -> TaskRunner | None:
    """A runner with a recording, kept for later; None, and the reason in ``recordings``, if it cannot be made."""
    try:
        runner = TaskRunner(supernet, architecture, kind, as_graph)
    except RuntimeError as error:  # what torch raises for CUDA's refusals, lack of memory among them
        recordings.failure = f"tasks are not recorded: {' '.join(str(error).split())[:200]}"
        return None
    recordings.keep(kind, runner)
    return runner
