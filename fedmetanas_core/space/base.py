"""What every network of a run can do: be one flat tensor, and collect the moments that its batch norms meet."""

from abc import abstractmethod
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn

from fedmetanas_core.space.flat import FlatModule, Layout
from fedmetanas_core.space.operations import BatchNorm


class Moments:
    """Mean and second moment of every channel of every batch norm, over batches of any size, in float64.

    ``batch`` is where a pass writes the means and variances of its batch, laid out as the running statistics.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.batch = torch.zeros(layout.size, dtype=torch.float64, device=device)
        is_mean = torch.zeros(layout.size, dtype=torch.bool)
        for name, view in layout.views(is_mean).items():
            view.fill_(name.endswith("running_mean"))
        # Both follow the order of the norms, so that the means and the variances of one channel stand at one place.
        self.mean_places, self.variance_places = is_mean.nonzero().flatten(), (~is_mean).nonzero().flatten()
        self.count = 0
        self.mean = torch.zeros(len(self.mean_places), dtype=torch.float64, device=device)
        self.square = torch.zeros_like(self.mean)

    def add(self, images: int) -> None:
        """Take in what a pass over so many images has written into ``batch``."""
        mean, variance = self.batch[self.mean_places], self.batch[self.variance_places]
        self.count += images
        fraction = images / self.count
        self.mean += fraction * (mean - self.mean)
        self.square += fraction * (variance + mean.square() - self.square)

    def statistics(self) -> Tensor:
        """Means and biased variances of everything added, of the whole population; ValueError if nothing was."""
        if not self.count:
            raise ValueError("no batch was added")
        result = torch.empty_like(self.batch)
        result[self.mean_places] = self.mean
        result[self.variance_places] = (self.square - self.mean.square()).clamp_min(0.0)
        return result


class TrainableNetwork(FlatModule):
    """A network of a space. ``head`` begins the names of its last, linear layer; everything else is the body."""

    head = "classifier."
    moments: Moments | None = None

    @cached_property
    def _everything(self) -> tuple[nn.Module, ...]:
        """All modules; asking for them by name takes as long as several passes of a small network."""
        return tuple(self.modules())

    @cached_property
    def _norms(self) -> dict[str, BatchNorm]:
        return {name: module for name, module in self.named_modules() if isinstance(module, BatchNorm)}

    def train(self, mode: bool = True) -> Self:
        """As torch's, without its walk through the modules."""
        if self.training != mode:
            for module in self._everything:
                module.__dict__["training"] = mode
        return self

    @abstractmethod
    def initialise(self, generator: torch.Generator) -> None:
        """Draw fresh weights; batch norm starts as the identity."""

    def collect_moments(self) -> None:
        """From now on each training pass adds the moments of its batch, until ``store_moments``."""
        self.moments = Moments(self.statistic_layout, self.statistics.device)
        views = self.statistic_layout.views(self.moments.batch)
        for name, norm in self._norms.items():
            norm.collector = views[f"{name}.running_mean"], views[f"{name}.running_var"]

    def store_moments(self) -> None:
        """Make what was collected the running statistics. Raises ValueError if nothing was."""
        if self.moments is None:
            raise ValueError("no moments are being collected")
        self.statistics.copy_(self.moments.statistics())
        self.drop_moments()

    def drop_moments(self) -> None:
        """Collect no more, and forget what was collected."""
        self.moments = None
        for norm in self._norms.values():
            norm.collector = None
