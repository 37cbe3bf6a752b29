"""Parts of a network by name: what some methods train, share or keep separately."""

from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.fixed import FixedNetwork, FixedSpec, Space
from fedmetanas_core.space.flat import Layout
from fedmetanas_core.space.spec import SpaceSpec


def in_part(name: str, part: str, spec: Space) -> bool:
    """Whether the parameter or buffer of this name belongs to the part; ValueError for an unknown one.

    ``head``: the last, linear layer; ``body``: everything else. ``personal``: the head and the last cells. ``trunk``:
    all but an auxiliary classifier. ``all`` and ``none`` are what they say.
    """
    if part in ("all", "none"):
        return part == "all"
    if part == "trunk":
        return not name.startswith("auxiliary.")
    head = name.startswith((FixedNetwork if isinstance(spec, FixedSpec) else TrainableNetwork).head)
    if part in ("head", "body"):
        return head == (part == "head")
    if part != "personal":
        raise ValueError(f"{part!r} is no part of a network")
    owner, _, rest = name.partition(".")
    own_cell = isinstance(spec, SpaceSpec) and owner == "cells"
    return head or (own_cell and int(rest.partition(".")[0]) >= cast(SpaceSpec, spec).first_personal_cell)


@lru_cache(maxsize=16)
def part_layout(layout: Layout, part: str, spec: Space) -> Layout:
    """What of a layout belongs to the part, in its order."""
    return Layout(tuple(entry for entry in layout.entries if in_part(entry[0], part, spec)))


@lru_cache(maxsize=8)
def part_mask(layout: Layout, part: str, spec: Space) -> Tensor:
    """Boolean, flat: which elements of a layout belong to the part."""
    mask = torch.zeros(layout.size, dtype=torch.bool)
    for name, view in layout.views(mask).items():
        view.fill_(in_part(name, part, spec))
    return mask
