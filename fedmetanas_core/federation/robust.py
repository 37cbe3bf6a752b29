"""Combinations of updates that a minority of false ones cannot take over; every client counts the same.

Coordinate-wise median and trimmed mean: Yin et al. 2018. Krum and Multi-Krum: Blanchard et al. 2017.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

import torch
from torch import Tensor

from fedmetanas_core.federation.averaging import CHUNK


@dataclass(frozen=True)
class TrimmedMean:
    """The mean of every coordinate without the largest and the smallest ``share`` of its values, rounded down.

    A share of one half is the median. Where a value is held by some clients only, it is over these.
    """

    share: float

    def __call__(
        self,
        values: Sequence[Tensor],
        weights: Sequence[float],
        held: Sequence[Tensor | None] | None = None,
        before: Tensor | None = None,
    ) -> Tensor:
        """See averaging.weighted_mean; ``weights`` have no say."""
        if not values or len(values) != len(weights):
            raise ValueError(f"{len(values)} values and {len(weights)} weights make no mean")
        like = values[0] if before is None else before
        spread = [_spread(value, None if held is None else held[at], like.numel()) for at, value in enumerate(values)]
        result = torch.empty(like.shape, dtype=like.dtype)
        for start in range(0, result.numel(), CHUNK):
            into = result.view(-1)[start : start + CHUNK]
            here = torch.stack([each[start : start + CHUNK].to(torch.float64) for each in spread])
            middle, count = self._middle(here)
            if before is not None:
                middle = torch.where(count > 0, middle, before.view(-1)[start : start + CHUNK].to(torch.float64))
            into.copy_(middle)
        return result

    def _middle(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of (clients, coordinates), NaN where nobody holds one: the trimmed mean, and how many hold each."""
        ordered = values.sort(dim=0).values  # NaN comes last
        count = (~values.isnan()).sum(0)
        cut = torch.minimum((self.share * count).floor().long(), ((count - 1) // 2).clamp_min(0))
        rank = torch.arange(len(values)).unsqueeze(1)
        kept = (rank >= cut) & (rank < count - cut)
        return torch.where(kept, ordered, 0.0).sum(0) / kept.sum(0).clamp_min(1), count


def _spread(value: Tensor, where: Tensor | None, size: int) -> Tensor:
    """A flat value at its places, NaN elsewhere."""
    if where is None:
        return value.reshape(-1)
    whole = torch.full((size,), torch.nan, dtype=value.dtype)
    whole[where] = value.reshape(-1)
    return whole


def krum(changes: Sequence[Tensor], share: float) -> list[int]:
    """Multi-Krum: the n - f - 2 of n updates with the smallest sum of squared distances to their n - f - 2 nearest.

    f is ``share`` of n, rounded down; at least one update is kept. Returns their positions, ascending. ``changes`` are
    flat and of one length.
    """
    count = len(changes)
    near = max(1, count - floor(share * count) - 2)
    stacked = torch.stack([change.double() for change in changes])
    distances = torch.cdist(stacked, stacked, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest = distances.sort(dim=1).values[:, 1 : near + 1]  # the first is the update itself
    scores = nearest.sum(1)
    return sorted(scores.argsort(stable=True)[:near].tolist())
