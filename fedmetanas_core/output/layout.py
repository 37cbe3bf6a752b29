"""Where everything in a drawn cell stands.

A cell is laid out in layers from left to right: its inputs, its nodes by the longest path that leads to them, its
output. Every operation is a label box in front of the node it feeds, and an edge that passes a layer gets a lane of
its own there. All that stands in a layer is stacked with a gap and curves bend only between layers, so neither can
two boxes overlap nor can an edge run through a box that is not its own.
"""

import itertools
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedmetanas_core.output.words import NUM_INPUTS, Cell
from fedmetanas_core.text import printable

# Sizes in SVG user units, that is pixels at 100 %.
CHARACTER_WIDTH = 7.3  # of the 12 px monospaced labels, the widest of the common fonts rounded up
LABEL_HEIGHT = 24.0
LABEL_GAP = 8.0
LABEL_PADDING = 10.0
LABEL_TO_NODE = 46.0  # room for the curves from the labels into their node
NODE_RADIUS = 19.0
LANE_HEIGHT = 6.0
SLOT_GAP = 18.0
LAYER_GAP = 84.0
ARROW_GAP = 6.0  # a line ends inside the head of its arrow
ORDERING_SWEEPS = 8  # left-right and right-left; with at most a dozen slots in a layer more change nothing
# Points that a line goes through, first where it begins: (x, y), straight; six numbers, a cubic Bezier curve.
Stroke = list[tuple[float, ...]]


@dataclass(frozen=True)
class Box:
    """A label's rectangle in pixels, and its text."""

    left: float
    top: float
    width: float
    height: float
    text: str


@dataclass(eq=False)
class Slot:
    """What stands in one layer: an input, a node with the labels of its edges, the output, or one edge's lane."""

    layer: int
    source: int  # the source this slot is or carries
    edges: list["Edge"] = field(default_factory=list)  # those that end here, from top to bottom
    is_lane: bool = False
    y: float = 0.0  # of the centre

    @property
    def height(self) -> float:
        if self.is_lane:
            return LANE_HEIGHT
        labels = sum(1 for edge in self.edges if edge.operation)
        return max(2 * NODE_RADIUS, labels * (LABEL_HEIGHT + LABEL_GAP) - LABEL_GAP)


@dataclass(eq=False)
class Edge:
    """One edge: from its source through its lanes to the slot it ends in; without an operation it joins the output."""

    operation: str | None
    path: list[Slot]  # the source's slot, one lane for every layer passed, the slot it ends in


@dataclass
class CellLayout:
    """A cell with every position known, in pixels from its own upper left corner."""

    cell: Cell
    slots: list[Slot]
    edges: list[Edge]
    label_boxes: dict[int, Box]  # by the edge's place in `edges`
    layer_left: list[float]
    label_widths: list[float]
    width: float
    height: float

    def circle_x(self, layer: int) -> float:
        """The x of the circles in `layer`."""
        room = self.label_widths[layer] + LABEL_TO_NODE if self.label_widths[layer] else 0.0
        return self.layer_left[layer] + room + NODE_RADIUS

    def stroke(self, edge: Edge) -> "Stroke":
        """The line of an edge, from its source's circle to just before the one it ends in."""
        start, end = edge.path[0], edge.path[-1]
        x, y = self.circle_x(start.layer) + NODE_RADIUS, start.y
        steps: Stroke = [(x, y)]

        def bend(to_x: float, to_y: float) -> None:
            middle = (x + to_x) / 2
            steps.append((middle, y, middle, to_y, to_x, to_y))

        for lane in edge.path[1:-1]:
            bend(self.layer_left[lane.layer], lane.y)
            x, y = self.circle_x(lane.layer) + NODE_RADIUS, lane.y
            steps.append((x, y))
        if edge.operation is not None:
            bend(self.layer_left[end.layer], label_y(edge))
            x, y = self.layer_left[end.layer] + self.label_widths[end.layer], label_y(edge)
            steps.append((x, y))
        bend(self.circle_x(end.layer) - NODE_RADIUS - ARROW_GAP, end.y)
        return steps

    def arrow(self, edge: Edge) -> list[tuple[float, float]]:
        """The corners of the head of an edge."""
        x, y = self.circle_x(edge.path[-1].layer) - NODE_RADIUS, edge.path[-1].y
        return [(x, y), (x - 9, y - 4.5), (x - 9, y + 4.5)]


def layout_cell(cell: Cell) -> CellLayout:
    """Place everything in `cell`."""
    slots, edges = _slots_and_edges(cell)
    layers = [[slot for slot in slots if slot.layer == number] for number in range(1 + max(s.layer for s in slots))]
    _order_layers(layers, edges)
    _place_vertically(layers, edges)
    height = max(slot.y + slot.height / 2 for slot in slots)

    label_widths = [
        max((_label_width(edge.operation) for slot in layer for edge in slot.edges if edge.operation), default=0.0)
        for layer in layers
    ]
    layer_left, x = [], 0.0
    for label_width in label_widths:
        layer_left.append(x)
        x += (label_width + LABEL_TO_NODE if label_width else 0.0) + 2 * NODE_RADIUS + LAYER_GAP
    layout = CellLayout(cell, slots, edges, {}, layer_left, label_widths, x - LAYER_GAP, height)
    for number, edge in enumerate(edges):
        if edge.operation is not None:
            end = edge.path[-1]
            layout.label_boxes[number] = Box(
                layer_left[end.layer],
                label_y(edge) - LABEL_HEIGHT / 2,
                label_widths[end.layer],
                LABEL_HEIGHT,
                edge.operation,
            )
    return layout


def _slots_and_edges(cell: Cell) -> tuple[list[Slot], list[Edge]]:
    slots = [Slot(0, source) for source in range(NUM_INPUTS)]
    edges: list[Edge] = []
    lanes: list[Slot] = []

    def connect(operation: str | None, source: int, end: Slot) -> None:
        start = slots[source]
        passed = [Slot(layer, source, is_lane=True) for layer in range(start.layer + 1, end.layer)]
        edge = Edge(operation, [start, *passed, end])
        lanes.extend(passed)
        end.edges.append(edge)
        edges.append(edge)

    for index, inputs in enumerate(cell.nodes):
        node = Slot(1 + max((slots[source].layer for _, source in inputs), default=0), NUM_INPUTS + index)
        for operation, source in inputs:
            connect(printable(operation), source, node)
        slots.append(node)
    output = Slot(1 + max(slot.layer for slot in slots), len(slots))
    for source in cell.concat:
        connect(None, source, output)
    return [*slots, output, *lanes], edges


def _label_width(operation: str) -> float:
    characters = sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in operation)
    return characters * CHARACTER_WIDTH + 2 * LABEL_PADDING


def label_y(edge: Edge) -> float:
    """The height at which an edge enters its end slot: its label's centre, or the output's own."""
    end = edge.path[-1]
    if edge.operation is None:
        return end.y
    first = end.y - (len(end.edges) - 1) * (LABEL_HEIGHT + LABEL_GAP) / 2
    return first + end.edges.index(edge) * (LABEL_HEIGHT + LABEL_GAP)


def _neighbours(edges: Sequence[Edge], forward: bool) -> dict[Slot, list[Slot]]:
    """For every slot, those it is tied to in the layer before (`forward`) or after it."""
    found: dict[Slot, list[Slot]] = {}
    for edge in edges:
        for left, right in itertools.pairwise(edge.path):
            of, neighbour = (right, left) if forward else (left, right)
            found.setdefault(of, []).append(neighbour)
    return found


def _order_layers(layers: list[list[Slot]], edges: list[Edge]) -> None:
    """Sort every layer in place so that few edges cross: barycentre sweeps, of which the best order is kept."""
    best, fewest = [list(layer) for layer in layers], _crossings(layers, edges)
    for sweep in range(ORDERING_SWEEPS):
        forward = sweep % 2 == 0
        neighbours = _neighbours(edges, forward)
        # The inputs stay in their order, so that all drawings read alike.
        for number in range(1, len(layers)) if forward else range(len(layers) - 2, 0, -1):
            beside = layers[number - 1 if forward else number + 1]
            wanted = _barycentres(layers[number], beside, neighbours)
            layers[number].sort(key=wanted.__getitem__)
        crossings = _crossings(layers, edges)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    for layer, order in zip(layers, best, strict=True):
        layer[:] = order
    rank = {slot: place for layer in layers for place, slot in enumerate(layer)}
    for slot in rank:
        slot.edges.sort(key=lambda edge: rank[edge.path[-2]])


def _barycentres(
    layer: Sequence[Slot], beside: Sequence[Slot], neighbours: Mapping[Slot, Sequence[Slot]]
) -> dict[Slot, float]:
    """For every slot the mean place of its neighbours in the layer `beside`; one without any goes last."""
    rank = {slot: place for place, slot in enumerate(beside)}
    places = {slot: [rank[other] for other in neighbours.get(slot, ())] for slot in layer}
    return {slot: sum(found) / len(found) if found else len(beside) for slot, found in places.items()}


def _crossings(layers: list[list[Slot]], edges: Sequence[Edge]) -> int:
    rank = {slot: place for layer in layers for place, slot in enumerate(layer)}
    steps: dict[int, list[tuple[int, int]]] = {}
    for edge in edges:
        for left, right in itertools.pairwise(edge.path):
            steps.setdefault(left.layer, []).append((rank[left], rank[right]))
    return sum(
        (a[0] - b[0]) * (a[1] - b[1]) < 0 for pairs in steps.values() for a, b in itertools.combinations(pairs, 2)
    )


def _place_vertically(layers: list[list[Slot]], edges: Sequence[Edge]) -> None:
    """Set every slot's y: near the mean of what it is tied to, in the layer's order, with gaps; the topmost at 0."""
    for layer in layers:
        _spread(layer, [0.0] * len(layer))
    before, after = _neighbours(edges, True), _neighbours(edges, False)
    for _ in range(ORDERING_SWEEPS):
        for layer in layers:
            wanted = []
            for slot in layer:
                tied = [*before.get(slot, []), *after.get(slot, [])]
                wanted.append(sum(other.y for other in tied) / len(tied) if tied else slot.y)
            _spread(layer, wanted)
    top = min(slot.y - slot.height / 2 for layer in layers for slot in layer)
    for layer in layers:
        for slot in layer:
            slot.y -= top


def _spread(layer: Sequence[Slot], wanted: Sequence[float]) -> None:
    """The y closest to `wanted` in least squares that keep order and gaps (pool adjacent violators)."""
    offsets = [0.0]
    for upper, lower in itertools.pairwise(layer):
        offsets.append(offsets[-1] + (upper.height + lower.height) / 2 + SLOT_GAP)
    pools: list[tuple[float, int]] = []  # (sum, count) of the slots that touch
    for target, offset in zip(wanted, offsets, strict=False):
        total, count = target - offset, 1
        while pools and pools[-1][0] / pools[-1][1] >= total / count:
            pooled_total, pooled_count = pools.pop()
            total, count = total + pooled_total, count + pooled_count
        pools.append((total, count))
    means = [total / count for total, count in pools for _ in range(count)]
    for slot, offset, mean in zip(layer, offsets, means, strict=False):
        slot.y = offset + mean
