"""A client's images as the search sees them, and how they are paired into tasks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Prepare = Callable[[Tensor, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class LocalData:
    """``images`` (n, channels, height, width) in [0, 1] and ``labels`` (n,).

    ``prepare`` turns a batch of images into network input: normalised, and augmented if it is given a generator.
    """

    images: Tensor
    labels: Tensor
    prepare: Prepare

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Prepared images and labels at these indices."""
        return self.prepare(self.images[indices], generator), self.labels[indices]

    def batches(self, size: int, least: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Everything once, in order, not augmented; a last batch of fewer than ``least`` joins the one before it."""
        parts = list(torch.split(torch.arange(len(self)), size))
        if len(parts) > 1 and len(parts[-1]) < least:
            parts[-2:] = [torch.cat(parts[-2:])]
        for indices in parts:
            yield self.batch(indices)

    def subset(self, indices: Tensor) -> "LocalData":
        """Some of the images, in this order."""
        return LocalData(self.images[indices], self.labels[indices], self.prepare)


def task_size(count: int, batch_size: int, batches: int = 2) -> int:
    """Images in each of the ``batches`` of a step, for a client that has ``count``: too few are shared out evenly."""
    return max(1, min(batch_size, count // batches))


def draw_steps(
    count: int, batch_size: int, generator: torch.Generator, batches: int = 2, single: bool = False
) -> list[tuple[Tensor, ...]]:
    """Shuffle ``count`` examples and cut them into steps of so many disjoint batches: support and query, for example.

    A client with fewer images than one step's batches shares them out evenly; one with fewer images than batches uses
    the same ones for all. What does not fill a step is left out; with one batch a step nothing is, and the last one is
    filled up with the first examples. ``single`` gives one step.
    """
    order = torch.randperm(count, generator=generator)
    if count < batches:
        return [tuple([order] * batches)]
    size = task_size(count, batch_size, batches)
    if batches == 1:
        order = torch.cat([order, order[: -count % size]])
    cut = torch.split(order[: len(order) // size * size], size)
    steps = [tuple(cut[first : first + batches]) for first in range(0, len(cut) - batches + 1, batches)]
    return steps[:1] if single else steps


def hold_out(data: LocalData, fraction: float, generator: torch.Generator) -> tuple[LocalData, LocalData]:
    """(the rest, a random part of this size); at least one image each, which is the same one if there is but one."""
    if len(data) < 2:
        return data, data
    count = min(len(data) - 1, max(1, round(fraction * len(data))))
    order = torch.randperm(len(data), generator=generator)
    return data.subset(order[count:]), data.subset(order[:count])
