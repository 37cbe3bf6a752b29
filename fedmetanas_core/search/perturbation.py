"""DARTS-PT: an operation is worth what is lost without it, not what its alpha says (Wang et al. 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmetanas_core.search.evaluation import logits_of
from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.search.relaxation import Relaxation
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.base import TrainableNetwork

MOST_IMAGES = 256  # of a client's, for each operation tried


def perturbation_scores(
    network: TrainableNetwork,
    architecture: Architecture,
    data: LocalData,
    temperature: float,
    relaxation: Relaxation,
) -> Tensor:
    """How much the mean loss grows when an operation is left out, float32 (groups, edges, 8).

    0 for pruned operations, and for one that is alone on its edge. Noise-free, by running statistics, over the client's
    training images or the first of them; the paper measures accuracy, which on few images does not move. Leaves the
    network in evaluation mode.
    """
    network.eval()
    subset = data.subset(torch.arange(min(len(data), MOST_IMAGES), device=data.labels.device))

    def loss(tried: Architecture) -> float:
        with torch.no_grad():
            weights = relaxation.mean(tried, temperature)
        return float(F.cross_entropy(logits_of(lambda images: network(images, weights), subset), subset.labels))

    whole = loss(architecture)
    scores = torch.zeros(architecture.operation_mask.shape)
    for place in (architecture.operation_mask & (architecture.operation_mask.sum(-1, keepdim=True) > 1)).nonzero():
        trial = architecture.clone()
        trial.operation_mask[tuple(place)] = False
        scores[tuple(place)] = loss(trial) - whole
    return scores
