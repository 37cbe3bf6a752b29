"""How updates become the next state: weighted means in float64, moments pooled, in client order.

A client may hold only a part of what the server has. Each value is then averaged over those who hold it, and one that
nobody holds stays as it was.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from fedmetanas_core.space.flat import Layout

CHUNK = 2**16  # values that are summed at a time


class Combine(Protocol):
    """Makes one value of the clients' values; see ``weighted_mean`` for the arguments."""

    def __call__(
        self,
        values: Sequence[Tensor],
        weights: Sequence[float],
        held: Sequence[Tensor | None] | None = None,
        before: Tensor | None = None,
    ) -> Tensor: ...


def places(parts: Sequence[Layout], whole: Layout) -> list[Tensor | None]:
    """Where the elements of each part lie in the whole, by the names of their tensors; None if they are the same.

    Equal parts share one tensor.
    """
    found = {part: whole.select(torch.arange(whole.size), part) for part in set(parts) if part != whole}
    return [found.get(part) for part in parts]


def weighted_mean(
    values: Sequence[Tensor],
    weights: Sequence[float],
    held: Sequence[Tensor | None] | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """sum(weight * value) / sum(weight), summed in float64, in the shape and dtype of the first value.

    With ``held``, flat: the i-th value lies at those places of the result, each another one (None: at all), where every
    place is averaged over the values that cover it and is that of ``before`` where none does; the result has the shape
    and dtype of ``before``. Beside the values and the result nothing of their size is held where all values are whole.
    ValueError if there is nothing to average, or places do not fit their value.
    """
    if not values or len(values) != len(weights):
        raise ValueError(f"{len(values)} values and {len(weights)} weights make no mean")
    like = values[0] if before is None else before
    parts = [_Part(value, None if held is None else held[index]) for index, value in enumerate(values)]
    result = torch.empty(like.shape, dtype=like.dtype)
    for start in range(0, result.numel(), CHUNK):
        into = result.view(-1)[start : start + CHUNK]
        total, mass = torch.zeros(len(into), dtype=torch.float64), torch.zeros(len(into), dtype=torch.float64)
        for part, weight in zip(parts, weights, strict=True):
            part.add_to(total, mass, start, weight)
        if before is not None:
            total = torch.where(mass > 0, total, before.view(-1)[start : start + CHUNK].to(torch.float64))
        into.copy_(total / torch.where(mass > 0, mass, torch.ones_like(mass)))
    return result


class _Part:
    """A flat value, and where it lies, in ascending order."""

    def __init__(self, value: Tensor, where: Tensor | None) -> None:
        self.value, self.where = value.reshape(-1), where
        if where is None:
            return
        if where.shape != self.value.shape:
            raise ValueError(f"{len(self.value)} values and {len(where)} places make no part")
        if not bool((where[1:] > where[:-1]).all()):  # else sorting would only take time
            order = where.argsort()
            self.value, self.where = self.value[order], where[order]

    def add_to(self, total: Tensor, mass: Tensor, start: int, weight: float) -> None:
        """Add what lies in the piece of the result that begins at ``start``."""
        if self.where is None:
            total += self.value[start : start + len(total)].to(torch.float64) * weight
            mass += weight
            return
        first, last = torch.searchsorted(self.where, torch.tensor([start, start + len(total)])).tolist()
        if first == last:
            return
        here: Tensor | slice = self.where[first:last] - start
        begin, end = int(self.where[first]) - start, int(self.where[last - 1]) - start
        if end - begin == last - first - 1:  # no gap, so nothing has to be looked up
            here = slice(begin, end + 1)
        total[here] += self.value[first:last].to(torch.float64) * weight
        mass[here] += weight


def pooled_statistics(
    values: Sequence[Tensor],
    weights: Sequence[float],
    layout: Layout,
    parts: Sequence[Layout] | None = None,
    before: Tensor | None = None,
    combine: Combine = weighted_mean,
) -> Tensor:
    """Batch-norm moments of the pooled data from each client's own moments.

    ``values`` are flat statistics laid out by ``layout``, or each by its own of ``parts``, where every ``running_mean``
    has a ``running_var`` of the same module. mean = sum p_k mean_k; var = sum p_k (var_k + mean_k^2) - mean^2.
    Averaging the variances alone would lose the spread between clients, which under skewed labels is most of it. See
    ``weighted_mean`` for ``before``, of which ``combine`` may be another form.
    """
    own = [layout] * len(values) if parts is None else parts
    raw = [_raw_moments(value, part) for value, part in zip(values, own, strict=True)]
    held = None if parts is None else places(parts, layout)
    pooled = combine(raw, weights, held, None if before is None else _raw_moments(before, layout))
    mean_of, variance_of = moment_positions(layout)
    pooled[variance_of] = (pooled[variance_of] - pooled[mean_of].square()).clamp_min(0.0)
    return pooled.to(values[0].dtype)


def _raw_moments(value: Tensor, layout: Layout) -> Tensor:
    """Means, and second moments in place of variances; float64."""
    mean_of, variance_of = moment_positions(layout)
    raw = value.to(torch.float64, copy=True)
    raw[variance_of] += raw[mean_of].square()
    return raw


@lru_cache(maxsize=32)
def moment_positions(layout: Layout) -> tuple[Tensor, Tensor]:
    """The positions of all running means, and of the variances of the same channels."""
    positions = layout.views(torch.arange(layout.size))
    none = torch.empty(0, dtype=torch.long)
    modules = [name.removesuffix("running_mean") for name in positions if name.endswith("running_mean")]
    means, variances = ([positions[module + kind] for module in modules] for kind in ("running_mean", "running_var"))
    return torch.cat([none, *means]), torch.cat([none, *variances])
