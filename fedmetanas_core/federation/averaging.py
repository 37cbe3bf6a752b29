"""How updates become the next state: weighted means in float64, moments pooled, in client order."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fedmetanas_core.space.flat import Layout

CHUNK = 2**16  # values that are summed at a time


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum(weight * value) / sum(weight), summed in float64, in the shape and dtype of the first value.

    Beside the values and the result nothing of their size is held. ValueError if there is nothing to average.
    """
    if not values or len(values) != len(weights):
        raise ValueError(f"{len(values)} values and {len(weights)} weights make no mean")
    result, total_weight = torch.empty(values[0].shape, dtype=values[0].dtype), sum(weights)
    pieces = [torch.split(value.reshape(-1), CHUNK) for value in (result.view(-1), *values)]
    for into, *parts in zip(*pieces, strict=True):
        total = torch.zeros(into.shape, dtype=torch.float64)
        for part, weight in zip(parts, weights, strict=True):
            total += part.to(torch.float64) * weight
        into.copy_(total / total_weight)
    return result


def pooled_statistics(values: Sequence[Tensor], weights: Sequence[float], layout: Layout) -> Tensor:
    """Batch-norm moments of the pooled data from each client's own moments.

    ``values`` are flat statistics laid out by ``layout``, where every ``running_mean`` is followed by the
    ``running_var`` of the same module. mean = sum p_k mean_k; var = sum p_k (var_k + mean_k^2) - mean^2. Averaging
    the variances alone would lose the spread between clients, which under skewed labels is most of it.
    """
    mean_of, variance_of = _positions(layout)
    exact = [value.to(torch.float64) for value in values]
    pooled = weighted_mean(exact, weights)
    second = weighted_mean([each[variance_of] + each[mean_of].square() for each in exact], weights)
    pooled[variance_of] = (second - pooled[mean_of].square()).clamp_min(0.0)
    return pooled.to(values[0].dtype)


@lru_cache(maxsize=8)
def _positions(layout: Layout) -> tuple[Tensor, Tensor]:
    """The positions of all running means, and of the variances of the same channels."""
    positions = layout.views(torch.arange(layout.size))
    none = torch.empty(0, dtype=torch.long)
    modules = [name.removesuffix("running_mean") for name in positions if name.endswith("running_mean")]
    means, variances = ([positions[module + kind] for module in modules] for kind in ("running_mean", "running_var"))
    return torch.cat([none, *means]), torch.cat([none, *variances])
