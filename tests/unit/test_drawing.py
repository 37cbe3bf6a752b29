"""The drawn genotype: well-formed, complete, and with nothing on top of anything else."""

import itertools
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmetanas_core.errors import RefusalError
from fedmetanas_core.output.drawing import MARGIN, draw_genotype, kind_of
from fedmetanas_core.output.layout import NODE_RADIUS, Box, layout_cell
from fedmetanas_core.output.words import cells_of, genotype_in_words

SVG = "{http://www.w3.org/2000/svg}"
OPERATIONS = (
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
SMALL: dict[str, Any] = {
    "normal": [[["sep_conv_3x3", 0], ["skip_connect", 1]], [["dil_conv_5x5", 0], ["max_pool_3x3", 2]]],
    "reduce": [[["avg_pool_3x3", 1], ["sep_conv_5x5", 0]], [["dil_conv_3x3", 3 - 1], ["skip_connect", 1]]],
    "concat": [2, 3],
}
operation_names = st.sampled_from(OPERATIONS) | st.text(min_size=1, max_size=30)


@st.composite
def genotypes(draw: st.DrawFn) -> dict[str, Any]:
    num_nodes = draw(st.integers(1, 6))

    def cell() -> list[list[list[Any]]]:
        return [
            [[draw(operation_names), source] for source in draw(st.lists(st.integers(0, 1 + index), max_size=3))]
            for index in range(num_nodes)
        ]

    nodes = st.lists(st.integers(2, 1 + num_nodes), min_size=1, max_size=num_nodes, unique=True)
    return {"normal": cell(), "reduce": cell(), "concat": draw(nodes)}


def overlap(one: Box, other: Box) -> bool:
    """Whether the two rectangles share any area."""
    apart_x = one.left + one.width <= other.left or other.left + other.width <= one.left
    apart_y = one.top + one.height <= other.top or other.top + other.height <= one.top
    return not (apart_x or apart_y)


@settings(max_examples=150, deadline=None)
@given(genotypes())
def test_labels_and_circles_never_overlap(genotype: dict[str, Any]) -> None:
    for cell in cells_of(genotype):
        layout = layout_cell(cell)
        boxes = list(layout.label_boxes.values())
        assert len(boxes) == sum(len(edges) for edges in cell.nodes)
        for slot in layout.slots:
            if not slot.is_lane:
                left = layout.circle_x(slot.layer) - NODE_RADIUS
                boxes.append(Box(left, slot.y - NODE_RADIUS, 2 * NODE_RADIUS, 2 * NODE_RADIUS, ""))
        for one, other in itertools.combinations(boxes, 2):
            assert not overlap(one, other)
        for box in boxes:
            assert box.left >= -0.01
            assert box.top >= -0.01
            assert box.left + box.width <= layout.width + 0.01
            assert box.top + box.height <= layout.height + 0.01


@settings(max_examples=100, deadline=None)
@given(genotypes())
def test_an_edge_passes_other_labels_and_nodes_at_a_distance(genotype: dict[str, Any]) -> None:
    for cell in cells_of(genotype):
        layout = layout_cell(cell)
        for edge in layout.edges:
            for lane in edge.path[1:-1]:
                for other in layout.slots:
                    if other is not lane and other.layer == lane.layer:
                        assert abs(other.y - lane.y) >= other.height / 2 + 5


@settings(max_examples=75, deadline=None)
@given(genotypes())
def test_the_svg_is_xml_with_every_edge_and_every_label(genotype: dict[str, Any]) -> None:
    root = ElementTree.fromstring(draw_genotype(genotype))
    edges = [path for path in root.iter(f"{SVG}path") if "edge" in path.get("class", "").split()]
    entries = [entry for key in ("normal", "reduce") for node in genotype[key] for entry in node]
    assert len(edges) == len(entries) + 2 * len(genotype["concat"])
    labels = [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "label"]
    expected = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in operation) for operation, _ in entries]
    assert sorted(label or "" for label in labels) == sorted(expected)


def test_sources_are_those_of_the_genotype() -> None:
    root = ElementTree.fromstring(draw_genotype(SMALL))
    sources = [path.get("data-source") for path in root.iter(f"{SVG}path") if path.get("data-source")]
    # two cells: (0, 1), (0, node 1), concat of both nodes; then (1, 0), (node 1, 1), concat
    assert sources == [
        *("c_{k-2}", "c_{k-1}", "c_{k-2}", "node 1", "node 1", "node 2"),
        *("c_{k-1}", "c_{k-2}", "node 1", "c_{k-1}", "node 1", "node 2"),
    ]


def test_the_svg_needs_nothing_from_outside_and_fits_its_frame() -> None:
    svg = draw_genotype(SMALL)
    assert not re.search(r"href|url\(|@import|<script|font-face", svg)
    assert "prefers-color-scheme: dark" in svg
    for operation in OPERATIONS:
        assert f">{operation}<" in svg
    legend = ("separable convolution", "dilated convolution", "pooling", "skip connection", "concatenated")
    for words in legend:
        assert words in svg
    assert "other operation" not in svg, "the legend shows what occurs"
    root = ElementTree.fromstring(svg)
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"


def test_the_legend_wraps_rather_than_widen_the_drawing() -> None:
    root = ElementTree.fromstring(draw_genotype(SMALL))
    keys = [text for text in root.iter("{http://www.w3.org/2000/svg}text") if text.get("class") == "key"]
    assert len(keys) == 5
    inner = float(root.get("width", "0")) - 2 * MARGIN
    for key in keys:
        assert float(key.get("x", "0")) + 7.4 * len(key.text or "") <= inner
    tops = [float(key.get("y", "0")) for key in keys]
    assert len(set(tops)) > 1
    assert tops == sorted(tops)
    assert max(tops) < float(root.get("height", "0"))


def test_a_hostile_operation_name_is_only_text() -> None:
    name = '</text><script>alert("x & y")</script>'
    genotype = {"normal": [[[name, 0]]], "reduce": [[["skip_connect", 1]]], "concat": [2]}
    svg = draw_genotype(genotype)
    assert "<script" not in svg
    assert name in [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_drawing_the_same_genotype_twice_gives_the_same_file() -> None:
    assert draw_genotype(SMALL) == draw_genotype(SMALL)


def test_kinds() -> None:
    assert [kind_of(operation) for operation in OPERATIONS] == ["pool", "pool", "skip", "sep", "sep", "dil", "dil"]
    assert kind_of("conv_1x1") == "other"


def test_words() -> None:
    assert genotype_in_words(SMALL) == (
        "normal cell\n"
        "  node 1 = sep_conv_3x3(c_{k-2}) + skip_connect(c_{k-1})\n"
        "  node 2 = dil_conv_5x5(c_{k-2}) + max_pool_3x3(node 1)\n"
        "  c_{k} = concat(node 1, node 2)\n"
        "reduction cell\n"
        "  node 1 = avg_pool_3x3(c_{k-1}) + sep_conv_5x5(c_{k-2})\n"
        "  node 2 = dil_conv_3x3(node 1) + skip_connect(c_{k-1})\n"
        "  c_{k} = concat(node 1, node 2)"
    )


def test_a_node_without_any_operation_is_said_and_drawn() -> None:
    empty = {**SMALL, "normal": [[], SMALL["normal"][1]]}
    assert genotype_in_words(empty).splitlines()[1:3] == [
        "  node 1 = nothing",
        "  node 2 = dil_conv_5x5(c_{k-2}) + max_pool_3x3(node 1)",
    ]
    assert draw_genotype(empty).count("data-source") == draw_genotype(SMALL).count("data-source") - 2


@pytest.mark.parametrize(
    "changes",
    [
        {"normal": None},
        {"normal": []},
        {"normal": "abc"},
        {"normal": [[["skip_connect", 2]]]},
        {"normal": [[["skip_connect", -1]]]},
        {"normal": [[["skip_connect", True]]]},
        {"normal": [[["skip_connect", "0"]]]},
        {"normal": [[["skip_connect"]]]},
        {"normal": [[[3, 0]]]},
        {"normal": [[["", 0]]]},
        {"concat": []},
        {"concat": [9]},
    ],
)
def test_a_malformed_genotype_is_refused(changes: dict[str, Any]) -> None:
    for action in (draw_genotype, genotype_in_words):
        with pytest.raises(RefusalError, match="genotype is malformed"):
            action({**SMALL, **changes})
