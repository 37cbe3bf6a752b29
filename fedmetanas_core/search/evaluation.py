"""Accuracy, and batch-norm statistics that belong to the weights they travel with."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.space.supernet import EdgeWeights, Supernet

EVALUATION_BATCH = 256  # images; large enough to amortise the calls, small enough to stay in cache at 32x32


def logits_of(model: Callable[[Tensor], Tensor], data: LocalData) -> Tensor:
    """Logits of all images (n, classes), without gradients."""
    with torch.no_grad():
        return torch.cat([model(images) for images, _ in data.batches(EVALUATION_BATCH)])


def count_correct(logits: Tensor, data: LocalData) -> int:
    """Images whose largest logit is the label's."""
    return int((logits.argmax(1) == data.labels).sum())


def accuracy(model: Callable[[Tensor], Tensor], data: LocalData) -> float:
    """The share of images whose largest logit is the label's, in [0, 1]."""
    return count_correct(logits_of(model, data), data) / len(data)


def refresh_statistics(supernet: Supernet, data: LocalData, edge_weights: EdgeWeights | None = None) -> None:
    """Recompute all running statistics as the moments of this data at the present weights, noise-free.

    One pass without gradients; each batch is normalised by its own moments, as in training. Leaves the network in
    evaluation mode.
    """
    supernet.collect_moments()
    supernet.train()
    with torch.no_grad():
        for images, _ in data.batches(EVALUATION_BATCH):
            supernet(images, edge_weights)
        supernet.store_moments()
    supernet.eval()


def adapt(
    network: Supernet,
    data: LocalData,
    epochs: int,
    batch_size: int,
    rate: float,
    clip: float,
    generator: torch.Generator,
    edge_weights: EdgeWeights | None = None,
) -> None:
    """Take the task learner's weight steps over the data, in place; leaves the network in evaluation mode.

    This is the adaptation that meta-learning prepares for (paper, equation 6, weights only). The running statistics
    stay the federation's: moments of one client's few classes would normalise away what tells the classes apart.
    """
    network.eval()
    for _ in range(epochs):
        for indices in torch.split(torch.randperm(len(data), generator=generator), batch_size):
            images, labels = data.batch(indices)
            network.weights.grad.zero_()  # type: ignore[union-attr]
            F.cross_entropy(network(images, edge_weights), labels).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_([network.weights], clip)
            with torch.no_grad():
                network.weights.add_(network.weights.grad, alpha=-rate)  # type: ignore[arg-type]
