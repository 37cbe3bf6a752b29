"""Which updates point against what the others have in common.

The updates of clients with different images are nearly at right angles to each other, so that neither their lengths
nor their distances tell a reversed one from an honest one. Along the one direction that separates the others' mean
from zero best, given how much each coordinate varies among them (Fisher's linear discriminant with a diagonal
covariance), they do differ; and what a single round leaves open, a client's rounds together decide.
"""

from collections.abc import Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from fedmetanas_core.federation.averaging import CHUNK

FEWEST = 5  # below, the others' mean and variance say nothing
_NOTHING = 1e-12  # of a coordinate's mean square: what varies less does not vary


def agreement(changes: Sequence[Tensor], among: Sequence[bool] | None = None) -> list[float]:
    """How far each of n flat changes points along the others' common direction, in standard deviations.

    With mean m and variance v of every coordinate over the others that are ``among`` (all, unless given): the sum of
    x m / v over the root of the sum of m m / v.
    """
    along, scale = torch.zeros(len(changes), dtype=torch.float64), torch.zeros(len(changes), dtype=torch.float64)
    counts = (
        torch.ones(len(changes), 1, dtype=torch.float64) if among is None else torch.tensor(among).double()[:, None]
    )
    others = counts.sum() - counts
    for start in range(0, changes[0].numel(), CHUNK):
        here = torch.stack([each.reshape(-1)[start : start + CHUNK].double() for each in changes])
        own = counts * here
        mean, square = (own.sum(0) - own) / others, ((own * here).sum(0) - own * here) / others
        variance = square - mean.square()
        weight = torch.where(variance > _NOTHING * square, mean / variance, 0.0)
        along += (here * weight).sum(1)
        scale += (mean * weight).sum(1)
    return (along / scale.clamp_min(1e-300).sqrt()).tolist()


def opposed(changes: Mapping[int, Tensor], history: MutableMapping[str, float]) -> dict[int, str]:
    """The clients that have, over all their rounds, pointed against the others, and a reason for each.

    ``history`` is the sum of every client's agreement so far; this round's is added. It is measured twice, the second
    time against those alone that the first has for honest: the reversed ones no longer blur the direction then.
    """
    if len(changes) >= FEWEST:
        before, flat = [history.get(str(client), 0.0) for client in changes], list(changes.values())
        first = [earlier + score > 0 for earlier, score in zip(before, agreement(flat), strict=True)]
        scores = agreement(flat, first if sum(first) >= FEWEST else None)
        for client, earlier, score in zip(changes, before, scores, strict=True):
            history[str(client)] = earlier + score
    return {
        client: f"points against what the others have in common ({history[str(client)]:.2f} over its rounds)"
        for client in changes
        if history.get(str(client), 0.0) < 0
    }
