"""All weights of a network in one tensor, all running statistics in another, each reachable by name.

Copying, averaging, clipping, the inner step of MAML and the payload then act on one contiguous tensor; pruning,
derivation and export act on named views of it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Names and shapes in the order in which they lie in a flat tensor."""

    entries: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, named: Iterable[tuple[str, Tensor]]) -> "Layout":
        """The layout of these tensors, in this order."""
        return cls(tuple((name, tuple(tensor.shape)) for name, tensor in named))

    @cached_property
    def size(self) -> int:
        """Elements in all."""
        return sum(prod(shape) for _, shape in self.entries)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Named views of a flat tensor of ``size`` elements; raises ValueError for any other size."""
        if flat.shape != (self.size,):
            raise ValueError(
                f"a flat tensor of shape {tuple(flat.shape)} does not fit a layout of {self.size} elements"
            )
        views, start = {}, 0
        for name, shape in self.entries:
            length = prod(shape)
            views[name] = flat[start : start + length].view(shape)
            start += length
        return views

    def select(self, flat: Tensor, smaller: "Layout") -> Tensor:
        """The part of ``flat`` that ``smaller`` names, in the order of ``smaller``; KeyError for a foreign name."""
        views = self.views(flat)
        chosen = [views[name].reshape(-1) for name, _ in smaller.entries]
        return torch.cat(chosen) if chosen else flat.new_empty(0)


class FlatModule(nn.Module):
    """A module whose parameters and buffers are views of ``weights`` and ``statistics``.

    Subclasses build their parts in ``__init__`` under the meta device and then call ``allocate``.
    """

    weights: nn.Parameter
    statistics: Tensor
    weight_layout: Layout
    statistic_layout: Layout

    def allocate(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Give every parameter and buffer its place in the two flat tensors (zeros at first)."""
        self.weight_layout = Layout.of(self.named_parameters())
        self.statistic_layout = Layout.of(self.named_buffers())
        flat = torch.zeros(self.weight_layout.size, device=device, dtype=dtype)
        # Not zeros_like: of what has no storage (``meta``) it is computed in Python, after a long import.
        flat_gradient = torch.zeros(flat.shape, dtype=flat.dtype, device=flat.device)
        statistics = torch.zeros(self.statistic_layout.size, device=device, dtype=dtype)
        gradients = self.weight_layout.views(flat_gradient)
        for name, view in self.weight_layout.views(flat).items():
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(view)
            parameter.grad = gradients[name]
            self.get_submodule(owner)._parameters[leaf] = parameter
        for name, view in self.statistic_layout.views(statistics).items():
            owner, _, leaf = name.rpartition(".")
            self.get_submodule(owner)._buffers[leaf] = view
        # Kept out of nn.Module's registration: they are the storage of what is registered already.
        flat_parameter = nn.Parameter(flat)
        flat_parameter.grad = flat_gradient
        object.__setattr__(self, "weights", flat_parameter)
        object.__setattr__(self, "statistics", statistics)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts (``to``, ``cuda``, ``double``) act on the two flat tensors; the views are made anew."""
        self._replace(fn(self.weights.detach()), fn(self.statistics))
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and unpickled modules arrive with tensors of their own; make them views again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._replace(self.weights.detach(), self.statistics)

    def _replace(self, weights: Tensor, statistics: Tensor) -> None:
        self.allocate(weights.device, weights.dtype)
        self.load(weights, statistics)

    def load(self, weights: Tensor, statistics: Tensor) -> None:
        """Copy flat tensors in; raises ValueError when a size differs."""
        if weights.shape != self.weights.shape or statistics.shape != self.statistics.shape:
            raise ValueError(
                f"got {weights.numel()} weights and {statistics.numel()} statistics, "
                f"this network has {self.weights.numel()} and {self.statistics.numel()}"
            )
        with torch.no_grad():
            self.weights.copy_(weights)
            self.statistics.copy_(statistics)
