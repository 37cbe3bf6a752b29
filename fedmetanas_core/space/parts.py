"""Parts of a network by name: what some methods train, share or keep separately."""

from functools import lru_cache

import torch
from torch import Tensor

from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.fixed import FixedNetwork, FixedSpec, Space
from fedmetanas_core.space.flat import Layout

# The head is the last, linear layer, the body all else; the personal part is the head and the last cells, and the trunk
# is all but an auxiliary classifier.
PARTS = ("all", "none", "head", "body", "personal", "trunk")


def in_part(name: str, part: str, spec: Space) -> bool:
    """Whether the parameter or buffer of this name belongs to the part."""
    head = name.startswith((FixedNetwork if isinstance(spec, FixedSpec) else TrainableNetwork).head)
    if part in ("head", "body"):
        return head == (part == "head")
    if part == "none":
        return False
    if part == "trunk":
        return not name.startswith("auxiliary.")
    if part == "all" or isinstance(spec, FixedSpec):
        return part == "all" or head
    owner, _, rest = name.partition(".")
    return head or (owner == "cells" and int(rest.partition(".")[0]) >= spec.first_personal_cell)


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
