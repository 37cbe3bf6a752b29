"""Accuracy, and batch-norm statistics that belong to the weights they travel with."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.edge_weights import EdgeWeights

EVALUATION_BATCH = 256  # images; large enough to amortise the calls, small enough to stay in cache at 32x32


def logits_of(model: Callable[[Tensor], Tensor], data: LocalData) -> Tensor:
    """Logits of all images (n, classes), without gradients."""
    with torch.no_grad():
        return torch.cat([model(images) for images, _ in data.batches(EVALUATION_BATCH)])


def count_correct(logits: Tensor, data: LocalData) -> int:
    """Images whose largest logit is the label's."""
    return int((logits.argmax(1) == data.labels).sum())


def confusion(logits: Tensor, data: LocalData) -> Tensor:
    """How many images of each class (rows) got each class as their largest logit (columns); on the CPU, int64."""
    classes = logits.shape[1]
    return torch.bincount(data.labels * classes + logits.argmax(1), minlength=classes**2).view(classes, -1).cpu()


def accuracy(model: Callable[[Tensor], Tensor], data: LocalData) -> float:
    """The share of images whose largest logit is the label's, in [0, 1]."""
    return count_correct(logits_of(model, data), data) / len(data)


def refresh_statistics(network: TrainableNetwork, data: LocalData, edge_weights: EdgeWeights | None = None) -> None:
    """Recompute all running statistics as the moments of this data at the present weights, noise-free.

    One pass without gradients; each batch is normalised by its own moments, as in training, so that none may hold a
    single image. Leaves the network in evaluation mode.
    """
    network.collect_moments()
    network.train()
    with torch.no_grad():
        for images, _ in data.batches(EVALUATION_BATCH, least=2):
            network(images, edge_weights)
        network.store_moments()
    network.eval()
