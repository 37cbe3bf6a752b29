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

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Everything once, in order, without augmentation."""
        for indices in torch.split(torch.arange(len(self)), size):
            yield self.batch(indices)


def task_size(count: int, batch_size: int) -> int:
    """Images in each batch of a client that has ``count``: less than two full batches are cut in half."""
    return max(1, min(batch_size, count // 2))


def draw_tasks(
    count: int, batch_size: int, generator: torch.Generator, single: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """Shuffle ``count`` examples and cut them into tasks of one support and one query batch, disjoint.

    A client with fewer images than two batches cuts them in half; one image serves as support and as query. What does
    not fill a pair of batches is left out. ``single`` gives one task.
    """
    order = torch.randperm(count, generator=generator)
    if count == 1:
        return [(order, order)]
    size = task_size(count, batch_size)
    batches = list(torch.split(order[: count // size * size], size))
    tasks = list(zip(batches[::2], batches[1::2], strict=False))
    return tasks[:1] if single else tasks
