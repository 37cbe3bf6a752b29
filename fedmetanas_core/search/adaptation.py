"""A client that was never seen takes the found network and adapts its weights in a few steps (equation 6)."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmetanas_core.search.evaluation import accuracy, refresh_statistics
from fedmetanas_core.search.local_data import LocalData, draw_steps
from fedmetanas_core.seeds import torch_stream
from fedmetanas_core.space.base import TrainableNetwork

STEPS = (0, 1, 5, 20)


@dataclass(frozen=True)
class StepOptions:
    """How one step is made: SGD at ``rate`` with ``momentum`` on ``batch_size`` images, gradients clipped at ``clip``.

    ``running_statistics``: batch norm by those that the network came with, which stay as they are. The moments of one
    client's few classes would normalise away what tells the classes apart.
    """

    rate: float
    batch_size: int
    momentum: float = 0.0
    clip: float = 5.0
    running_statistics: bool = True
    seed: int = 0


def adaptation_curve(
    network: TrainableNetwork, data: LocalData, held_out: LocalData, options: StepOptions, steps: Sequence[int] = STEPS
) -> tuple[list[float], TrainableNetwork]:
    """Accuracy on ``held_out`` after each number of steps on ``data``, ascending, and the network after the last.

    The given network is left as it is. Augmentation, if ``data`` has one, is not used.
    """
    own, found, done = copy.deepcopy(network), [], 0
    batches = _batches(data, options)
    velocity = torch.zeros_like(own.weights)
    for wanted in steps:
        for _ in range(wanted - done):
            _step(own, *next(batches), velocity, options)
        done = wanted
        if done and not options.running_statistics:
            refresh_statistics(own, data)
        own.eval()
        found.append(accuracy(own, held_out))
    return found, own


def from_scratch(network: TrainableNetwork, seed: int) -> TrainableNetwork:
    """A network of the same architecture that has learned nothing."""
    fresh = copy.deepcopy(network)
    fresh.initialise(torch_stream(seed, "from scratch"))
    return fresh.eval()


def _batches(data: LocalData, options: StepOptions) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of shuffled images, one epoch after the other."""
    generator = torch_stream(options.seed, "adaptation batches")
    while True:
        for (indices,) in draw_steps(len(data), options.batch_size, generator, batches=1):
            yield data.batch(indices.to(data.labels.device))


def _step(network: TrainableNetwork, images: Tensor, labels: Tensor, velocity: Tensor, options: StepOptions) -> None:
    network.train(not options.running_statistics and len(images) > 1)
    gradient = network.weights.grad
    assert gradient is not None
    gradient.zero_()
    F.cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        gradient *= min(1.0, options.clip / (float(gradient.norm()) + 1e-6))
        velocity.mul_(options.momentum).add_(gradient)
        network.weights.sub_(velocity, alpha=options.rate)
