"""The layout of a pruned network, worked out from its mask alone, is the one that its modules have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.models import layouts
from fedmetanas_core.space.spec import SpaceSpec
from fedmetanas_core.space.supernet import Supernet


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    keep=st.floats(0.05, 1.0),
    norm=st.sampled_from(["batch", "affine", "group"]),
    personal=st.integers(0, 1),
    num_nodes=st.integers(1, 4),
)
def test_layouts_of_any_mask(seed: int, keep: float, norm: str, personal: int, num_nodes: int) -> None:
    spec = SpaceSpec(2, 4, num_nodes, 1, 3, 8, 8, inputs="all", norm=norm, personal_cells=personal)
    mask = torch.rand(Architecture(spec).operation_mask.shape, generator=torch.Generator().manual_seed(seed)) < keep
    supernet = Supernet(spec, mask, "meta")
    assert layouts(spec, mask) == (supernet.weight_layout, supernet.statistic_layout)


@pytest.mark.parametrize("side", [8, 28])
def test_layouts_of_everything(side: int) -> None:
    spec = SpaceSpec(2, 3, 2, 1, 3, side, side)
    mask = Architecture(spec).operation_mask
    supernet = Supernet(spec, mask, "meta")
    assert layouts(spec, mask) == (supernet.weight_layout, supernet.statistic_layout)
