"""The geometry of the space, by hand and by the published figures."""

import pytest
from helpers import random_one_hot, small_spec, stream

from fedmetanas_core.errors import RefusalError
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.cost import measure_cost
from fedmetanas_core.space.spec import NONE, PRIMITIVES, SpaceSpec

PAPER = SpaceSpec(16, 8, 4, 3, 10, 32, 32)


def test_primitives_keep_their_order_on_the_wire() -> None:
    assert PRIMITIVES == (
        "none",
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
    )
    assert NONE == 0


def test_edges_are_numbered_node_major() -> None:
    assert PAPER.num_edges == 14
    listed = [(node, source) for node in range(4) for source in range(2 + node)]
    assert [PAPER.edge(node, source) for node, source in listed] == list(range(14))
    assert [PAPER.first_edge(node) for node in range(5)] == [0, 2, 5, 9, 14]


def test_pairs_are_lexicographic_and_one_three_six_ten() -> None:
    assert [len(PAPER.pairs(node)) for node in range(4)] == [1, 3, 6, 10]
    assert PAPER.max_pairs == 10
    assert PAPER.pairs(0) == [(0, 1)]
    assert PAPER.pairs(2) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_the_incidence_joins_every_pair_to_its_two_edges_and_no_other() -> None:
    incidence = Architecture(PAPER).incidence
    for node in range(4):
        for pair in range(10):
            found = incidence[node, pair].nonzero().flatten().tolist()
            if pair >= len(PAPER.pairs(node)):
                assert found == []
            else:
                assert found == [PAPER.edge(node, source) for source in PAPER.pairs(node)[pair]]


def test_both_cell_types_have_264_logits_of_which_the_alive_ones_count_as_in_the_paper() -> None:
    architecture = Architecture(PAPER)
    alive = sum(int(mask.sum()) for _, mask in architecture.rows())
    assert alive == 2 * (14 * 8 + 1 + 3 + 6 + 10) == 264


@pytest.mark.parametrize(
    ("cells", "expected"), [(1, {0}), (2, {0, 1}), (3, {1, 2}), (5, {1, 3}), (8, {2, 5}), (20, {6, 13})]
)
def test_reductions_stand_at_one_third_and_two_thirds(cells: int, expected: set[int]) -> None:
    spec = small_spec(num_cells=cells)
    assert spec.reductions == expected
    assert {i for i, cell in enumerate(spec.cells) if cell.kind == "reduce"} == expected


def test_channels_of_the_paper_network() -> None:
    cells = PAPER.cells
    assert PAPER.stem_channels == 48
    assert [cell.channels for cell in cells] == [16, 16, 32, 32, 32, 64, 64, 64]
    assert [cell.channels_previous for cell in cells] == [48, 64, 64, 128, 128, 128, 256, 256]
    assert [cell.channels_before_previous for cell in cells] == [48, 48, 64, 64, 128, 128, 128, 256]
    assert [cell.after_reduction for cell in cells] == [False, False, False, True, False, False, True, False]
    assert PAPER.out_channels == 256


@pytest.mark.parametrize(("height", "width"), [(7, 8), (8, 7), (1, 100)])
def test_an_image_too_small_is_refused_with_its_size(height: int, width: int) -> None:
    with pytest.raises(RefusalError, match=f"{height}x{width}.*8x8"):
        SpaceSpec(4, 3, 3, 1, 10, height, width)


def test_the_imagenet_stem_needs_64_pixels_and_says_what_else_to_do() -> None:
    with pytest.raises(RefusalError, match="64x64 or set stem=cifar"):
        SpaceSpec(4, 3, 3, 3, 10, 63, 64, stem="imagenet")
    assert SpaceSpec(4, 3, 3, 3, 10, 64, 64, stem="imagenet").height == 64
    assert SpaceSpec(4, 3, 3, 1, 10, 8, 8).width == 8


@pytest.mark.parametrize(
    ("spec", "parameters"),
    [
        (PAPER, 1_930_618),
        (SpaceSpec(16, 8, 4, 3, 100, 32, 32), 1_953_748),
        (SpaceSpec(16, 8, 4, 1, 10, 28, 28), 1_929_754),
    ],
)
def test_parameters_are_the_published_ones(spec: SpaceSpec, parameters: int) -> None:
    assert measure_cost(spec, Architecture(spec).operation_mask).parameters == parameters


def paper_macs() -> int:
    """Multiply-adds of the unpruned 32x32x3 supernet, summed operation by operation from their definitions."""
    total = 27 * 48 * 32 * 32 + 256 * 10  # stem and classifier
    previous, before, side, before_side = 48, 48, 32, 32
    for channels, reduces in ((16, 0), (16, 0), (32, 1), (32, 0), (32, 0), (64, 1), (64, 0), (64, 0)):
        total += (before + previous) * channels * side * side  # FactorizedReduce costs what one 1x1 convolution does
        out_side = side // 2 if reduces else side
        pixels = out_side * out_side
        for source, edges in enumerate((4, 4, 3, 2, 1)):
            for kernel in (3, 5):
                once = (channels * kernel * kernel + channels * channels) * pixels
                total += edges * (2 * once + once)  # separable, twice; dilated, once
            if reduces and source < 2:
                total += edges * channels * channels * pixels  # skip_connect as FactorizedReduce
        before, previous, before_side, side = previous, 4 * channels, side, out_side
    assert (before_side, side) == (8, 8)
    return total


def test_macs_of_the_paper_supernet_are_those_of_its_operations_and_about_300_million() -> None:
    macs = measure_cost(PAPER, Architecture(PAPER).operation_mask).macs
    assert macs == paper_macs()
    assert abs(macs - 300e6) < 1e6


def test_a_one_hot_network_costs_far_less_and_its_payload_counts_four_bytes_each() -> None:
    architecture = random_one_hot(Architecture(PAPER), stream(0))
    cost = measure_cost(PAPER, architecture.operation_mask)
    assert 15e6 < cost.macs < 80e6  # the specification's sample lies between 31 and 60 million
    assert 0.1e6 < cost.parameters < 0.5e6
    assert cost.payload_bytes == 4 * (cost.parameters + cost.statistics)
