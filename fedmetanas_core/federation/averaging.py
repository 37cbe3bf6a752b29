"""How updates become the next state: weighted means in float64, moments pooled, in client order."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedmetanas_core.space.flat import Layout


class WeightedMean:
    """A running weighted sum in float64; memory is that of one tensor, however many are added."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.weight = 0.0

    def add(self, value: Tensor, weight: float) -> None:
        """Add a tensor with a positive weight."""
        term = value.to(torch.float64) * weight
        self.total = term if self.total is None else self.total.add_(term)
        self.weight += weight

    def mean(self) -> Tensor:
        """The weighted mean in float64; ValueError if nothing was added."""
        if self.total is None:
            raise ValueError("nothing was averaged")
        return self.total / self.weight


def weighted_mean(values: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """sum(weight * value) / sum(weight), accumulated in float64, in the dtype of the first value."""
    mean, dtype = WeightedMean(), None
    for value, weight in zip(values, weights, strict=True):
        dtype = dtype or value.dtype
        mean.add(value, weight)
    return mean.mean().to(dtype)


def pooled_statistics(values: Sequence[Tensor], weights: Sequence[float], layout: Layout) -> Tensor:
    """Batch-norm moments of the pooled data from each client's own moments.

    ``values`` are flat statistics laid out by ``layout``, where every ``running_mean`` is followed by the
    ``running_var`` of the same module. mean = sum p_k mean_k; var = sum p_k (var_k + mean_k^2) - mean^2. Averaging
    the variances alone would lose the spread between clients, which under skewed labels is most of it.
    """
    means, seconds = WeightedMean(), WeightedMean()
    is_variance = torch.zeros(layout.size, dtype=torch.bool)
    for name, view in layout.views(is_variance).items():
        view.fill_(name.endswith("running_var"))
    variance_of = _variance_positions(layout)
    for value, weight in zip(values, weights, strict=True):
        exact = value.to(torch.float64)
        means.add(exact, weight)
        seconds.add(exact[variance_of] + exact[~is_variance].square(), weight)
    pooled = means.mean()
    pooled[variance_of] = (seconds.mean() - pooled[~is_variance].square()).clamp_min(0.0)
    return pooled.to(values[0].dtype)


def _variance_positions(layout: Layout) -> Tensor:
    """For each position of a running mean, in order, the position of the variance of the same channel."""
    positions = layout.views(torch.arange(layout.size))
    found = [
        positions[name.removesuffix("running_mean") + "running_var"]
        for name in positions
        if name.endswith("running_mean")
    ]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)
